// Reading and writing N neighbouring elements at once: 16-byte transactions where the pack is 16 bytes or more.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace transfuse::device {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Round to nearest even, as torch does.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

// `from` must be aligned to the pack (16 bytes at most). Packs over 16 bytes take several transactions.
// Plain loads, not the read-only path: a kernel may read back what it wrote itself.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  using Whole = Pack<T, N>;
  Whole pack;
  if constexpr (sizeof(Whole) % 16 == 0) {
    uint4 parts[sizeof(Whole) / 16];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Whole) / 16); ++i) parts[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(&pack, parts, sizeof(Whole));
  } else {
    static_assert(N == 1, "packs are single elements or multiples of 16 bytes");
    pack.at[0] = from[0];
  }
  return pack;
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  using Whole = Pack<T, N>;
  if constexpr (sizeof(Whole) % 16 == 0) {
    uint4 parts[sizeof(Whole) / 16];
    memcpy(parts, &pack, sizeof(Whole));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Whole) / 16); ++i) reinterpret_cast<uint4*>(to)[i] = parts[i];
  } else {
    static_assert(N == 1, "packs are single elements or multiples of 16 bytes");
    to[0] = pack.at[0];
  }
}

}  // namespace transfuse::device
