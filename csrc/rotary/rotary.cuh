// rotary:  y_lo = x_lo cos_lo + x_hi sin_lo,   y_hi = x_hi cos_hi + x_lo sin_hi    in fp32, rounded once
//
// for the first rotary_dim dimensions of every head of q and k, lo and hi their halves; the other dimensions, and v, are
// copied. q goes to a tensor of its shape, k and v to positions start + i of a cache, or to tensors of their shapes: so
// one kernel turns heads, appends to a cache (no q, nothing turned), or does both at once, where k takes no detour
// through memory.
//
// The heads of q, then k, then v are numbered through. A block owns `tokens` tokens and, of each, every `tiles`-th run of
// `lanes` heads; a thread owns one column, N elements of each half, whose cosines and sines it reads once for all its
// heads: threads = tokens * lanes * columns. Neighbouring threads hold neighbouring columns.
// No shared memory. Saved for backward: cos and sin alone; the transposed map has sin_lo and sin_hi swapped.
//
// The launcher guarantees: with N > 1 every row of N-element packs is aligned to 16 bytes, halves and whole heads are
// multiples of N, columns contiguous, and all but cos and sin of T; sizes agree. A position outside the cache is not
// written.
#pragma once

#include <cstdint>

#include "device/vector_access.h"
#include "tensor.h"

namespace transfuse::rotary {

constexpr int kThreads = 128;

// A (batch, tokens, heads, columns) tensor; strides in elements, 0 where it is broadcast.
struct Rows {
  void* data;
  int64_t batch, token, head, column;
  DType dtype;

  template <typename U>
  __device__ __forceinline__ U* at(int64_t b, int64_t i, int h, int c) const {
    return static_cast<U*>(data) + b * batch + i * token + h * head + c * column;
  }
};

struct Params {
  Rows q, k, v;              // (batch, length, heads | kv_heads, head_dim | v_dim) T
  Rows q_out, k_out, v_out;  // q's shape, T; (batch, room, kv_heads, head_dim | v_dim)
  Rows cos, sin;             // (batch|1, length, 1, 2 * half): T or float
  Rows starts;               // (batch) int32 or int64; data null: `start` for all
  int64_t start, all_tokens, length, room;
  int q_heads, kv_heads, v_heads;  // v_heads: kv_heads, or 0 without v
  int half, head_dim, v_dim;
  int columns, lanes, tokens, tiles;  // columns: threads a head
  bool inverse;
};

template <typename T, int N>
__device__ __forceinline__ device::Pack<T, N> load(const Rows& rows, int64_t b, int64_t i, int h, int c) {
  return device::load<N>(rows.at<const T>(b, i, h, c));
}

template <int N, typename U, typename T>
__device__ __forceinline__ void store_as(const Rows& rows, int64_t b, int64_t i, int h, int c,
                                         const device::Pack<T, N>& pack) {
  device::Pack<U, N> cast;
#pragma unroll
  for (int e = 0; e < N; ++e) cast.at[e] = device::from_float<U>(device::to_float(pack.at[e]));
  device::store<N>(rows.at<U>(b, i, h, c), cast);
}

// Packs of several are of the output's dtype already; single elements take any.
template <typename T, int N>
__device__ __forceinline__ void store(const Rows& rows, int64_t b, int64_t i, int h, int c,
                                      const device::Pack<T, N>& pack) {
  if constexpr (N > 1) {
    device::store<N>(rows.at<T>(b, i, h, c), pack);
  } else if (rows.dtype == DType::Float32) {
    store_as<N, float>(rows, b, i, h, c, pack);
  } else if (rows.dtype == DType::Float16) {
    store_as<N, __half>(rows, b, i, h, c, pack);
  } else {
    store_as<N, __nv_bfloat16>(rows, b, i, h, c, pack);
  }
}

template <typename T, int N>
__device__ __forceinline__ void read_angles(float (&to)[N], const Rows& rows, int64_t b, int64_t i, int c) {
  if (rows.dtype == DType::Float32) {
    const auto pack = load<float, N>(rows, b, i, 0, c);
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = pack.at[e];
  } else {
    const auto pack = load<T, N>(rows, b, i, 0, c);
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = device::to_float(pack.at[e]);
  }
}

template <typename T, int N>
struct Angles {
  float cos_low[N], cos_high[N], sin_low[N], sin_high[N];

  __device__ __forceinline__ void read(const Params& p, int64_t b, int64_t i, int c) {
    read_angles<T, N>(cos_low, p.cos, b, i, c);
    read_angles<T, N>(cos_high, p.cos, b, i, p.half + c);
    read_angles<T, N>(sin_low, p.sin, b, i, p.inverse ? p.half + c : c);
    read_angles<T, N>(sin_high, p.sin, b, i, p.inverse ? c : p.half + c);
  }
};

// Columns c and half + c of a head of token (b, i), turned, to position `to`.
template <typename T, int N>
__device__ __forceinline__ void turn(const Rows& x, const Rows& y, const Angles<T, N>& by, int half, int64_t b,
                                     int64_t i, int64_t to, int h, int c) {
  const auto low = load<T, N>(x, b, i, h, c), high = load<T, N>(x, b, i, h, half + c);
  device::Pack<T, N> y_low, y_high;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float x_low = device::to_float(low.at[e]), x_high = device::to_float(high.at[e]);
    y_low.at[e] = device::from_float<T>(x_low * by.cos_low[e] + x_high * by.sin_low[e]);
    y_high.at[e] = device::from_float<T>(x_high * by.cos_high[e] + x_low * by.sin_high[e]);
  }
  store(y, b, to, h, c, y_low);
  store(y, b, to, h, half + c, y_high);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % p.columns * N, lane = thread / p.columns % p.lanes;
  const int64_t token = int64_t(blockIdx.x / p.tiles) * p.tokens + thread / (p.columns * p.lanes);
  if (thread >= p.columns * p.lanes * p.tokens || token >= p.all_tokens) return;
  const int64_t b = token / p.length, i = token % p.length;
  int64_t to = p.start + i;
  if (p.starts.data) {
    to = i + (p.starts.dtype == DType::Int32 ? int64_t(*p.starts.at<const int32_t>(b, 0, 0, 0))
                                             : *p.starts.at<const int64_t>(b, 0, 0, 0));
  }
  const bool inside = to >= 0 && to < p.room;
  const int heads = p.q_heads + p.kv_heads + p.v_heads, step = p.columns * N;
  for (int c = column; c == column || c < p.half; c += step) {
    Angles<T, N> by;
    if (c < p.half) by.read(p, b, i, c);
    for (int n = static_cast<int>(blockIdx.x % p.tiles) * p.lanes + lane; n < heads; n += p.lanes * p.tiles) {
      const bool of_q = n < p.q_heads, of_v = n >= p.q_heads + p.kv_heads;
      if (!of_q && !inside) break;  // nor are the heads after it
      const Rows& x = of_q ? p.q : of_v ? p.v : p.k;
      const Rows& y = of_q ? p.q_out : of_v ? p.v_out : p.k_out;
      const int h = of_q ? n : n - p.q_heads - (of_v ? p.kv_heads : 0);
      const int64_t place = of_q ? i : to;
      if (!of_v && c < p.half) turn<T, N>(x, y, by, p.half, b, i, place, h, c);
      if (c != column) continue;  // what is only copied is copied once
      const int end = of_v ? p.v_dim : p.head_dim;
      for (int d = (of_v ? 0 : 2 * p.half) + c; d < end; d += step) {
        store(y, b, place, h, d, load<T, N>(x, b, i, h, d));
      }
    }
  }
}

}  // namespace transfuse::rotary
