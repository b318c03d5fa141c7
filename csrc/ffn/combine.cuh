// ffn combine:  C = C_0 + C_1 + ..., beside it G where gated, in this order, and their end (ends.cuh): the second pass
// of products that were split over K, and the end of a product that something else computed.
//
// A block owns ROWS rows of 32 V columns, V elements of 16 bytes of T; its four warps take one row each at a time.
// Shared memory: 4 x 32 V fp32, for the sums over the block's rows.
// The launcher guarantees: all matrices' columns contiguous, the parts' rows aligned to 16 bytes.
#pragma once

#include <cstdint>

#include "ffn/ends.cuh"

namespace transfuse::ffn {

struct CombineParams {
  const void *c, *g;         // (parts, M, N) P, g null unless gated
  int64_t part, row;         // strides of both
  int parts, rows_a_block;
  EndParams end;  // with M and N
};

constexpr int kCombineWarps = 4;

template <typename T, typename P>
__global__ void __launch_bounds__(kCombineWarps * 32) ffn_combine_kernel(const __grid_constant__ CombineParams p) {
  constexpr int kV = 16 / sizeof(T), kColumns = 32 * kV;
  __shared__ alignas(16) float sums_smem[kCombineWarps * kColumns];
  const EndParams& end = p.end;
  const int tiles_n = (end.N + kColumns - 1) / kColumns;
  const int64_t tile_m = blockIdx.x / tiles_n;
  const int n_low = static_cast<int>(blockIdx.x % tiles_n) * kColumns, warp = threadIdx.x / 32;
  const int column = threadIdx.x % 32 * kV, n = n_low + column;
  const int64_t m_low = tile_m * p.rows_a_block;
  float sum[kV] = {};
  if (n < end.N) {
#pragma unroll 1
    for (int row = warp; row < p.rows_a_block && m_low + row < end.M; row += kCombineWarps) {
      float c[kV] = {}, g[kV] = {};
      for (int part = 0; part < p.parts; ++part) {
        const int64_t at = part * p.part + (m_low + row) * p.row + n;
        float more[kV];
        read(more, static_cast<const P*>(p.c) + at, end.N - n, true);
#pragma unroll
        for (int i = 0; i < kV; ++i) c[i] += more[i];
        if (p.g) {
          read(more, static_cast<const P*>(p.g) + at, end.N - n, true);
#pragma unroll
          for (int i = 0; i < kV; ++i) g[i] += more[i];
        }
      }
      finish<T>(end, m_low + row, n, c, g, sum);
    }
  }
  if (end.sums) write_sums(end, sums_smem, sum, warp, kCombineWarps, column, kColumns, tile_m, n_low);
}

}  // namespace transfuse::ffn
