// What the kernels of attention share: their inputs, where a sequence lies, and the scores of a tile.
//
//   s_ij = softcap(scale * q_i.k_j) + bias_ij - slope |p_i - j|,  -inf where hidden,  p_i = first + i;  in base 2
//
// so that the softmax is exp2. i and j count in the sequence. A tile's accumulators lie as device/mma.h says: element e
// of accumulator n of a warp is row g + 8 (e / 2) of the warp's 16, column 8 n + 2 t + e % 2.
#pragma once

#include <cstdint>

#include "attention/fragments.cuh"
#include "device/philox.h"

namespace transfuse::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.4028234663852886e38f;

// A (batch, heads, rows, columns) tensor; strides in elements, 0 where it is broadcast; data null where it is absent.
struct Strided {
  const void* data;
  int64_t batch, head, row, column;

  template <typename T>
  __device__ __forceinline__ const T* at(int b, int h) const {
    return static_cast<const T*>(data) + b * batch + h * head;
  }
  template <typename T>
  __device__ __forceinline__ T* to(int b, int h) const {
    return const_cast<T*>(at<T>(b, h));
  }
};

// The inputs of every kernel of attention. Packed rows (q_starts, k_starts) are batch row 0 of the tensors.
struct Problem {
  Strided q, k, v;  // (batch, heads | kv_heads, q_len | k_len, head_dim | v_dim) T, columns contiguous
  Strided mask;     // (batch|1, heads|1, q_len|1, k_len|1) bool
  Strided bias;     // the same, T or float
  Strided slopes;   // (batch|1, heads, 1, 1) float
  const int32_t *q_starts, *k_starts;  // (batch + 1) where rows are packed, else null
  const int32_t* k_lengths;            // (batch) where rows of a cache are filled unevenly, else null
  const int64_t* seed;                 // (2), null without dropout
  int batch, heads, group, q_len, k_len, head_dim, v_dim;  // q_len, k_len: of the longest sequence
  int left, right, first;                                  // -1 where a window has no side
  bool lower_right, bias_is_float;
  float scale, softcap;  // 0: none
  uint64_t threshold;    // dropout_p * 2^32
  float grow;            // 1 / (1 - dropout_p)
};

// Head h of batch row b: which rows are its own.
struct Sequence {
  int b, h, q_begin, q_rows, k_begin, k_rows, first;

  __device__ __forceinline__ Sequence(const Problem& p, int b, int h) : b(b), h(h) {
    q_begin = p.q_starts ? p.q_starts[b] : 0;
    q_rows = p.q_starts ? p.q_starts[b + 1] - q_begin : p.q_len;
    k_begin = p.k_starts ? p.k_starts[b] : 0;
    k_rows = p.k_starts ? p.k_starts[b + 1] - k_begin : p.k_len;
    if (p.k_lengths) k_rows = min(max(p.k_lengths[b], 0), p.k_len);
    first = p.lower_right ? k_rows - q_rows : p.first;
  }

  // Row 0 of the sequence in a tensor of queries; in k or v.
  template <typename T>
  __device__ __forceinline__ const T* queries(const Strided& t) const {
    return t.at<T>(b, h) + q_begin * t.row;
  }
  template <typename T>
  __device__ __forceinline__ const T* keys(const Strided& t, int group) const {
    return t.at<T>(b, h / group) + k_begin * t.row;
  }
};

// Which keys queries [i_low, i_high) see: none outside [low, high), all inside [inner_low, inner_high).
struct KeyRange {
  int low, high, inner_low, inner_high;

  __device__ __forceinline__ KeyRange(const Problem& p, const Sequence& at, int i_low, int i_high) {
    const auto clamped = [&](int j) { return min(max(j, 0), at.k_rows); };
    low = p.left < 0 ? 0 : clamped(at.first + i_low - p.left);
    high = p.right < 0 ? at.k_rows : clamped(at.first + i_high + p.right);
    inner_low = p.left < 0 ? 0 : clamped(at.first + i_high - 1 - p.left);
    inner_high = p.right < 0 ? at.k_rows : clamped(at.first + i_low + p.right + 1);
  }
};

__device__ __forceinline__ bool in_window(const Problem& p, const Sequence& at, int i, int j) {
  return j < at.k_rows && (p.left < 0 || j >= at.first + i - p.left) && (p.right < 0 || j <= at.first + i + p.right);
}

struct Score {
  float s, through;  // in base 2; the derivative of soft capping
};

// A score with all that may be added to it; the window is not asked.
template <typename T>
__device__ __forceinline__ Score rich_score(const Problem& p, const Sequence& at, float dot, int i, int j,
                                            float slope) {
  if (j >= at.k_rows) return {-INFINITY, 0.0f};
  i = min(i, at.q_rows - 1);  // a row beyond the last is never stored
  if (p.mask.data && !p.mask.at<bool>(at.b, at.h)[i * p.mask.row + j * p.mask.column]) return {-INFINITY, 0.0f};
  float x = dot * p.scale, through = 1.0f;
  if (p.softcap > 0.0f) {
    const float t = tanhf(x / p.softcap);
    x = p.softcap * t;
    through = 1.0f - t * t;
  }
  if (p.bias.data) {
    const int64_t offset = i * p.bias.row + j * p.bias.column;
    x += p.bias_is_float ? p.bias.at<float>(at.b, at.h)[offset] : device::to_float(p.bias.at<T>(at.b, at.h)[offset]);
  }
  x -= slope * fabsf(static_cast<float>(at.first + i - j));
  const float s = x * kLog2e;
  return {s < kLowest && x >= kLowest ? kLowest : s, through};  // finfo.min is a number and not -inf
}

// The row of the dropout mask that query i draws from.
__device__ __forceinline__ int64_t dropout_row(const Problem& p, const Sequence& at, int i) {
  return (int64_t(at.b) * p.heads + at.h) * p.q_len + i;
}

// Calls drop(e) for each element of an accumulator that is dropped, of rows i and i + 8 and keys j and j + 1, j even. A
// lane has two of the four keys that one draw decides.
template <typename Drop>
__device__ __forceinline__ void each_dropped(const Problem& p, const Sequence& at, int i, int j, Drop drop) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const device::Words words = device::dropout_words(p.seed, dropout_row(p, at, i + 8 * r), j / 4);
    const bool upper = j % 4 == 2;
    if ((upper ? words.at[2] : words.at[0]) < p.threshold) drop(2 * r);
    if ((upper ? words.at[3] : words.at[1]) < p.threshold) drop(2 * r + 1);
  }
}

// Over the four lanes that share a row of accumulators.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The first of a warp's 16 rows in its block's tile; a lane's row and column of element e of accumulator n.
__device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }
__device__ __forceinline__ int row_of(int e) {
  return warp_row() + static_cast<int>(threadIdx.x) % 32 / 4 + e / 2 * 8;
}
__device__ __forceinline__ int column_of(int n, int e) {
  return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2;
}

// Two neighbouring elements, to where their width aligns.
template <typename T>
__device__ __forceinline__ void store_two(T* to, float low, float high) {
  struct alignas(2 * sizeof(T)) Both {
    device::Pack<T, 1> at[2];
  };
  *reinterpret_cast<Both*>(to) = {{{{device::from_float<T>(low)}}, {{device::from_float<T>(high)}}}};
}

// sum += A B^T [16, 8 TILES] of A's tile's rows from `row` on, the warp's, and all rows of B's, both D wide.
// UNROLL: of its steps; few of them keep few addresses and fragments in registers.
template <typename T, int D, int UNROLL = (sizeof(T) == 4 ? 4 : D / kStep<T> <= 16 ? D / kStep<T> : 8), int TILES>
__device__ __forceinline__ void multiply_rows(float (&sum)[TILES][4], T* a_tile, T* b_tile, int row = warp_row()) {
#pragma unroll UNROLL
  for (int d = 0; d < D / kStep<T>; ++d) {
    uint32_t a[4];
    load_a<T, D>(a, a_tile, row, d);
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
      uint32_t b[2][2];
      load_b_transposed<T, D>(b, b_tile, n * 8, d);
      multiply<T>(sum[n], a, b[0]);
      multiply<T>(sum[n + 1], a, b[1]);
    }
  }
}

// sum += P B [16, 8 OUT_TILES]: P [16, 8 TILES] an earlier product's accumulators, used up; B the tile's first columns.
// fp32 goes step by step, the rest of P moving up: steps of an unrolled loop would be interleaved and spill.
template <typename T, int D, int TILES, int OUT_TILES>
__device__ __forceinline__ void multiply_columns(float (&sum)[OUT_TILES][4], float (&p)[TILES][4], T* b_tile) {
#pragma unroll sizeof(T) == 4 ? 1 : 8 * TILES / kStep<T>
  for (int j = 0; j < 8 * TILES / kStep<T>; ++j) {
    uint32_t a[4];
    to_a<T>(a, p, sizeof(T) == 4 ? 0 : j);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4 * TILES - 4; ++i) p[i / 4][i % 4] = p[i / 4 + 1][i % 4];
    }
#pragma unroll
    for (int n = 0; n < OUT_TILES; n += 2) {
      uint32_t b[2][2];
      load_b<T, D>(b, b_tile, j, n * 8);
      multiply<T>(sum[n], a, b[0]);
      multiply<T>(sum[n + 1], a, b[1]);
    }
  }
}

}  // namespace transfuse::attention
