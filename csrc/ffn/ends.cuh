// The end of a product: all that linear_act and ffn do to its elements before they are written. Of u, the product (and
// g, a second one beside it), with k the dropout's factors:
//
//   forward   u += bias;  out = k h, where h = act(u), gated h = act(g) u;  u and g written where asked for
//   backward  the product is dh, u and g are read;  dh *= k;  out = du = dh act'(u), gated du = dh act(g) and
//             dg = dh u act'(g);  k h computed again and the sums of du over the rows written where asked for
//
// Everything is chosen at run time and done on V neighbouring elements of a row, 16 bytes of T, after the accumulators
// went through shared memory: by then nothing else needs registers, and accesses are 16 bytes wide.
#pragma once

#include <cstdint>

#include "device/philox.h"
#include "device/vector_access.h"
#include "ffn/activations.cuh"

namespace transfuse::ffn {

// A matrix with contiguous columns; data is null where it is absent.
struct Rows {
  void* data;
  int64_t stride;  // elements from row to row
};

struct EndParams {
  Rows out, up, gate, dgate, hidden;  // (M, N) T
  const void* bias;                   // (N) T
  float* sums;                        // (groups of rows, N)
  const int64_t* seed;                // (2), null without dropout
  uint64_t threshold;                 // dropout_p * 2^32
  float grow;                         // 1 / (1 - dropout_p)
  Activation activation;
  bool backward, gated;
  bool aligned;  // every matrix and the bias allow 16-byte accesses at multiples of 16 bytes of every row
  int M, N;
};

// V elements of a row, those at `count` and beyond 0; of P or, in float, of more than one access.
template <typename P, int V>
__device__ __forceinline__ void read(float (&to)[V], const P* from, int count, bool aligned) {
  if (aligned && count >= V) {
    const device::Pack<P, V> pack = device::load<V>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = device::to_float(pack.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = i < count ? device::to_float(from[i]) : 0.0f;
  }
}

template <typename P, int V>
__device__ __forceinline__ void write(P* to, const float (&from)[V], int count, bool aligned) {
  if (aligned && count >= V) {
    device::Pack<P, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.at[i] = device::from_float<P>(from[i]);
    device::store(to, pack);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < count) to[i] = device::from_float<P>(from[i]);
    }
  }
}

// Row m, columns n .. n + V - 1 of the call's matrices.
template <typename T, int V>
struct Place {
  const EndParams& p;
  int64_t m;
  int n;

  __device__ __forceinline__ void get(float (&to)[V], const Rows& from) const {
    read(to, static_cast<const T*>(from.data) + m * from.stride + n, p.N - n, p.aligned);
  }
  __device__ __forceinline__ void put(const Rows& to, const float (&from)[V]) const {
    if (to.data) write(static_cast<T*>(to.data) + m * to.stride + n, from, p.N - n, p.aligned);
  }
};

// c and g are used up; sum += du.
template <typename T, int V>
__device__ __forceinline__ void finish(const EndParams& p, int64_t m, int n, float (&c)[V], float (&g)[V],
                                       float (&sum)[V]) {
  const Place<T, V> at{p, m, n};
  float keep[V];
#pragma unroll
  for (int i = 0; i < V; ++i) keep[i] = 1.0f;
  if (p.seed) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const device::Words words = device::dropout_words(p.seed, m, (n + i) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) keep[i + j] = words.at[j] < p.threshold ? 0.0f : p.grow;
    }
  }
  float u[V], value[V], slope[V];
  if (p.backward) {
    at.get(u, p.up);
    if (p.gated) at.get(g, p.gate);
  } else {
    if (p.bias) {
      float bias[V];
      read(bias, static_cast<const T*>(p.bias) + n, p.N - n, p.aligned);
#pragma unroll
      for (int i = 0; i < V; ++i) c[i] += bias[i];
    }
    at.put(p.up, c);
    if (p.gated) at.put(p.gate, g);
#pragma unroll
    for (int i = 0; i < V; ++i) u[i] = c[i];
  }
  if (!p.gated) {
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] = u[i], u[i] = 1.0f;  // h = act(g) u from here on
  }
  activate(p.activation, g, value, slope, p.backward);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float dh = c[i] * keep[i];
    c[i] = dh * (p.gated ? value[i] : slope[i]);  // du
    g[i] = dh * u[i] * slope[i];                  // dg
    value[i] *= u[i] * keep[i];                   // k h
  }
  if (!p.backward) return at.put(p.out, value);
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += c[i];
  at.put(p.out, c);
  if (p.gated) at.put(p.dgate, g);
  at.put(p.hidden, value);
}

// sums[group][n] = the sums that threads `first_of_row + rows * i` hold of columns n .. n + V - 1, added in order of i;
// smem: rows * columns floats. All threads of the block call.
template <int V>
__device__ __forceinline__ void write_sums(const EndParams& p, float* smem, const float (&sum)[V], int row, int rows,
                                           int column, int columns, int64_t group, int n_low) {
#pragma unroll
  for (int i = 0; i < V; ++i) smem[row * columns + column + i] = sum[i];
  __syncthreads();
  for (int j = threadIdx.x; j < columns; j += blockDim.x) {
    if (n_low + j >= p.N) break;
    float total = 0.0f;
    for (int r = 0; r < rows; ++r) total += smem[r * columns + j];
    p.sums[group * p.N + n_low + j] = total;
  }
}

}  // namespace transfuse::ffn
