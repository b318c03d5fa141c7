// What the kernels of attention's backward share: their inputs and the gradient of one tile of scores.
//
//   P = 2^(s - L)     dP = D (dO V^T)     dS = P (dP - delta)     L = lse log2 e, delta = rowsum(dO out) - dlse
//
// L is +inf in rows that see nothing: P is 0 there whatever the scores are. A tile stands queries by keys or, KEYS,
// keys by queries, so that P and dS are A fragments of the products that follow as they come out of the exponential.
#pragma once

#include "attention/scores.cuh"
#include "device/reduce.h"

namespace transfuse::attention {

struct BackwardParams : Problem {
  Strided dout;        // (batch, heads, q_len, v_dim) T, columns contiguous
  Strided statistics;  // (batch, heads, q_len, 2) float: L, delta
  Strided dq, dk, dv;  // like q, k, v
  Strided dbias;       // (batch, heads, q_len, k_len) T or float; null unless the bias has this shape
  Strided dslopes;     // (batch, heads, tiles of queries, 1) float, partial sums
  bool dbias_is_float;
  int tiles, parts;
};

// Whether the window or an end hides scores of queries [i_low, i_low + rows) and keys [j_low, j_low + columns).
__device__ __forceinline__ bool is_cut(const Problem& p, const Sequence& at, int i_low, int rows, int j_low,
                                       int columns) {
  const int i_last = i_low + rows - 1, j_last = j_low + columns - 1;
  return i_last >= at.q_rows || j_last >= at.k_rows || (p.left >= 0 && j_low < at.first + i_last - p.left) ||
         (p.right >= 0 && j_last > at.first + i_low + p.right);
}

// As each_dropped where rows are keys j and j + 8 and columns queries i and i + 1. The four lanes whose keys one draw
// decides make one of the four draws each and tell one another.
template <typename Drop>
__device__ __forceinline__ void each_dropped_of_keys(const Problem& p, const Sequence& at, int i, int j, Drop drop) {
  const int own = static_cast<int>(threadIdx.x) / 4 % 4;
  const int64_t row = dropout_row(p, at, i + own % 2);
  const device::Words words = device::dropout_words(p.seed, row, (j + own / 2 * 8) / 4);
  unsigned drops = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) drops |= (words.at[w] < p.threshold ? 1u : 0u) << w;
#pragma unroll
  for (int other = 0; other < 4; ++other) {  // draw own ^ other was made by the lane of that number
    const unsigned theirs = __shfl_xor_sync(0xffffffffu, drops, other * 4);
    if (theirs >> own & 1u) drop(own ^ other);
  }
}

// Of a tile whose element (0, 0) is query i_low and key j_low, s = Q K^T and dp = dO V^T (transposed: KEYS):
//   s becomes D P, dp the gradient of scale Q K^T; found(n, e, i, j, dS) is told the gradient of the score itself.
// statistics(n, e) gives an element's L and delta.
template <typename T, bool KEYS, bool RICH, int TILES, typename Statistics, typename Found>
__device__ __forceinline__ void differentiate(const Problem& p, const Sequence& at, float (&s)[TILES][4],
                                              float (&dp)[TILES][4], int i_low, int j_low, float slope, bool cut,
                                              Statistics statistics, Found found) {
  const float to_base2 = p.scale * kLog2e;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    unsigned dropped = 0;
    if (RICH && p.seed) {
      const auto drop = [&](int e) { dropped |= 1u << e; };
      if constexpr (KEYS) {
        each_dropped_of_keys(p, at, i_low + column_of(n, 0), j_low + row_of(0), drop);
      } else {
        each_dropped(p, at, i_low + row_of(0), j_low + column_of(n, 0), drop);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = i_low + (KEYS ? column_of(n, e) : row_of(e)), j = j_low + (KEYS ? row_of(e) : column_of(n, e));
      const float2 row = statistics(n, e);
      const Score score = RICH ? rich_score<T>(p, at, s[n][e], i, j, slope) : Score{s[n][e] * to_base2, 1.0f};
      float weight = exp2f(score.s - row.x);
      if (cut && !(i < at.q_rows && in_window(p, at, i, j))) weight = 0.0f;
      const float keep = !RICH ? 1.0f : dropped >> e & 1u ? 0.0f : p.grow;
      const float ds = weight * (dp[n][e] * keep - row.y);
      found(n, e, i, j, ds);
      s[n][e] = weight * keep;
      dp[n][e] = ds * score.through;
    }
  }
}

}  // namespace transfuse::attention
