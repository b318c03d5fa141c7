// attention weights:  P_ij = exp(s_ij - lse_i), scores as in scores.cuh; a row whose lse is -inf sees nothing, P_i = 0
//
// One block owns BLOCK_M queries of one head and BLOCK_N keys, each of its warps 16 of the queries:
//   S = Q K^T   [16 x BLOCK_N] a warp, in registers
// Shared memory, dynamic: q [BLOCK_M][D], k [BLOCK_N][D], swizzled (fragments.cuh); one stage: a tile is all there is.
// What bounds it is writing P, q_len * k_len numbers. Nothing is saved for backward.
// The launcher guarantees what forward.cuh's does, of q and k.
#pragma once

#include <cstdint>

#include "attention/scores.cuh"
#include "device/shared_memory.h"

namespace transfuse::attention {

struct WeightsParams : Problem {
  Strided lse;      // (batch, heads, q_len, 1) float
  Strided weights;  // (batch, heads, q_len, k_len) T
  int q_tiles, k_tiles;
  bool rich, pairs;  // pairs: two neighbouring weights may be written at once, from even columns on
};

template <typename T, int D, int BLOCK_M, int BLOCK_N>
constexpr int kWeightsShared = (BLOCK_M + BLOCK_N) * D * static_cast<int>(sizeof(T));

template <typename T, int D, int BLOCK_M, int BLOCK_N>
__global__ void __launch_bounds__(BLOCK_M * 2) attention_weights_kernel(const WeightsParams p) {
  constexpr int kThreads = BLOCK_M * 2, kTiles = BLOCK_N / 8;
  T* const q_smem = reinterpret_cast<T*>(device::dynamic_shared_memory());
  T* const k_smem = q_smem + BLOCK_M * D;
  const int j_low = static_cast<int>(blockIdx.x % p.k_tiles) * BLOCK_N;
  const int64_t rest = blockIdx.x / p.k_tiles;
  const int i_low = static_cast<int>(rest % p.q_tiles) * BLOCK_M;
  const Sequence at(p, static_cast<int>(rest / p.q_tiles / p.heads), static_cast<int>(rest / p.q_tiles % p.heads));

  load_tile<T, D, BLOCK_M, kThreads>(q_smem, at.queries<T>(p.q), p.q.row, i_low, at.q_rows, p.head_dim);
  load_tile<T, D, BLOCK_N, kThreads>(k_smem, at.keys<T>(p.k, p.group), p.k.row, j_low, at.k_rows, p.head_dim);
  device::cp_async_commit();
  device::cp_async_wait<0>();
  __syncthreads();
  float s[kTiles][4] = {};
  multiply_rows<T, D, 2>(s, q_smem, k_smem);

  const float slope = p.slopes.data ? *p.slopes.at<float>(at.b, at.h) : 0.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = i_low + row_of(2 * r);
    if (i >= at.q_rows) continue;
    const float lse = p.lse.at<float>(at.b, at.h)[i * p.lse.row] * kLog2e, base = lse == -INFINITY ? 0.0f : lse;
    T* const to = p.weights.to<T>(at.b, at.h) + i * p.weights.row;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int j = j_low + column_of(n, 0);
      const auto weight = [&](int e) {
        if (!in_window(p, at, i, j + e)) return 0.0f;
        const float dot = s[n][2 * r + e];
        const float score = p.rich ? rich_score<T>(p, at, dot, i, j + e, slope).s : dot * (p.scale * kLog2e);
        return exp2f(score - base);
      };
      const float low = weight(0), high = weight(1);
      if (p.pairs && j + 1 < at.k_rows) {
        store_two(to + j, low, high);
      } else {
        if (j < at.k_rows) to[j] = device::from_float<T>(low);
        if (j + 1 < at.k_rows) to[j + 1] = device::from_float<T>(high);
      }
    }
  }
}

}  // namespace transfuse::attention
