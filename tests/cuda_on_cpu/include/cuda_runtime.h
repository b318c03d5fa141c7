// Stands in for NVIDIA's header of this name, and for what nvcc knows by itself: the keywords, vector types, built-in
// variables, warp functions and intrinsics that csrc/ uses, as the CUDA C++ programming guide defines them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#ifdef CUDA_ON_CPU_KERNELS  // a .cu file: the standard headers that use alignas, before it becomes a macro
#include <atomic>
#include <functional>
#include <memory>
#endif

#include "cuda_runtime_api.h"
#include "engine.h"

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One copy will do: blocks run one after another. The engine finds these variables by their symbols. Dynamic shared
// memory comes from device/shared_memory.h: `extern __shared__` cannot compile here. CUDA allows alignas after
// __shared__, C++ does not after static: GCC's own word may stand there.
#define __shared__ static
#ifdef CUDA_ON_CPU_KERNELS
#define alignas(...) __attribute__((aligned(__VA_ARGS__)))
#endif

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  struct Frame {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> values;
  } frame{kernel, {std::forward<Args>(args)...}};
  const auto entry = [](void* data) {
    Frame& mine = *static_cast<Frame*>(data);
    std::apply(mine.kernel, mine.values);
  };
  cuda_on_cpu::run(*config, reinterpret_cast<const void*>(kernel), entry, &frame, sizeof(frame));
  return cudaSuccess;
}

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Barriers, votes and shuffles.
inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier(CUDA_ON_CPU_HERE); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_barrier(mask, CUDA_ON_CPU_HERE);
}
inline unsigned __activemask() { return cuda_on_cpu::live_lanes(); }
inline unsigned __ballot_sync(unsigned mask, bool predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(cuda_on_cpu::Vote::Ballot, mask, predicate, CUDA_ON_CPU_HERE);
}
inline int __all_sync(unsigned mask, bool predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(cuda_on_cpu::Vote::All, mask, predicate, CUDA_ON_CPU_HERE);
}
inline int __any_sync(unsigned mask, bool predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(cuda_on_cpu::Vote::Any, mask, predicate, CUDA_ON_CPU_HERE);
}

namespace cuda_on_cpu {
template <typename T>
T shuffle_any(Shuffle kind, unsigned mask, T value, int lane, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, lane, width, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SHUFFLE(name, kind)                                                                      \
  template <typename T>                                                                                      \
  T name(unsigned mask, T value, int lane, int width = 32, CUDA_ON_CPU_SITE) {                               \
    return cuda_on_cpu::shuffle_any(cuda_on_cpu::Shuffle::kind, mask, value, lane, width, CUDA_ON_CPU_HERE); \
  }
CUDA_ON_CPU_SHUFFLE(__shfl_sync, Index)
CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, Up)
CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, Down)
CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, Xor)
#undef CUDA_ON_CPU_SHUFFLE

// Threads of one host thread interleave only at barriers, so a plain update is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  T before;
  const auto update = [](void* at, void* operands) {
    auto [value, before] = *static_cast<std::pair<T, T*>*>(operands);
    T& now = *static_cast<T*>(at);
    *before = now;
    now = T(now + value);
  };
  std::pair<T, T*> operands{value, &before};
  cuda_on_cpu::atomic(address, sizeof(T), update, &operands);
  return before;
}

// Arithmetic. The approximate functions are the exact ones here: a kernel's error on a GPU is a GPU's to show.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
#define __expf(x) expf(x)  // glibc declares these names, and does not define them
#define __logf(x) logf(x)
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }

// A cache hint changes no value.
template <typename T>
T __ldg(const T* from) {
  return *from;
}
