// Tiles in shared memory and the warp-level products over them, for 16-bit elements and for fp32.
//
// A tile is rows of D elements in chunks of 16 bytes; chunk c of row r lies at chunk c ^ (r % 8), so that the eight rows
// which one ldmatrix phase reads fall into eight different groups of banks. One step of a product reads two chunks:
// 16 elements of 16 bits (m16n8k16), or 8 of fp32, multiplied as three tf32 products of their high and low parts
// (m16n8k8; low * low is below fp32's last place). ldmatrix moves 32-bit elements just as pairs of 16-bit ones, so
// fragments of A and of B^T are loaded alike; B itself (v) is read transposed, which for fp32 takes single loads.
#pragma once

#include <cstdint>
#include <cstring>

#include "device/cp_async.h"
#include "device/mma.h"
#include "device/vector_access.h"

namespace transfuse::attention {

using device::kChunk, device::kStep;

// Chunk 2 * pair + half. With `pair` known when compiling, only its last two bits meet the row's: all other steps are
// constant offsets to four addresses, where a plain chunk ^ (row % 8) would take a register each.
template <typename T, int D>
__device__ __forceinline__ T* chunk_at(T* tile, int row, int pair, int half) {
  return tile + row * D + pair / 4 * 8 * kChunk<T> + ((pair % 4 * 2) ^ (half ^ (row % 8))) * kChunk<T>;
}

// tile[r][:] = rows[first + r][:], 0 beyond `end` rows and `width` columns; by all THREADS, not awaited.
template <typename T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(T* tile, const T* rows, int64_t row_stride, int first, int end, int width) {
  constexpr int kChunks = D / kChunk<T>;
  static_assert(ROWS * kChunks % THREADS == 0 && kChunks >= 8);
#pragma unroll 2
  for (int i = 0; i < ROWS * kChunks / THREADS; ++i) {  // unrolled further, all addresses would stay in registers
    const int index = i * THREADS + static_cast<int>(threadIdx.x);
    const int row = index / kChunks, chunk = index % kChunks;
    const bool inside = first + row < end && chunk * kChunk<T> < width;
    const T* from = inside ? rows + (first + row) * row_stride + chunk * kChunk<T> : rows;
    device::cp_async<16>(chunk_at<T, D>(tile, row, chunk / 2, chunk % 2), from, inside ? 16 : 0);
  }
}

// A, 16 rows from `row` on, step `step`.
template <typename T, int D>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], T* tile, int row, int step) {
  const int lane = threadIdx.x % 32;
  device::ldmatrix(a, chunk_at<T, D>(tile, row + lane % 16, step, lane / 16));
}

// B of two neighbouring products from B^T: rows `row` .. row + 15 of the tile are columns of B.
template <typename T, int D>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2], T* tile, int row, int step) {
  const int lane = threadIdx.x % 32;
  uint32_t m[4];
  device::ldmatrix(m, chunk_at<T, D>(tile, row + lane / 16 * 8 + lane % 8, step, lane / 8 % 2));
  b[0][0] = m[0], b[0][1] = m[1], b[1][0] = m[2], b[1][1] = m[3];
}

// B of two neighbouring products, columns `column` .. column + 15: rows of the tile are rows of B, from step * kStep on.
// For fp32 the inner index runs through them in the order 0 2 4 6 1 3 5 7, as `to_a` does.
template <typename T, int D>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], T* tile, int step, int column) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t m[4];
    device::ldmatrix_transposed(m, chunk_at<T, D>(tile, step * 16 + lane % 16, column / 16, lane / 16));
    b[0][0] = m[0], b[0][1] = m[1], b[1][0] = m[2], b[1][1] = m[3];
  } else {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = step * 8 + lane % 4 * 2 + r;
        memcpy(&b[n][r], chunk_at<T, D>(tile, row, column / 8 + n, lane / 16) + lane / 4 % 4, 4);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
  const device::Pack<T, 1> parts[2] = {{{device::from_float<T>(low)}}, {{device::from_float<T>(high)}}};
  uint32_t bits;
  memcpy(&bits, parts, 4);
  return bits;
}

// A of step `step` from accumulators [N / 8][4] of an earlier product, rounded to T.
template <typename T, int TILES>
__device__ __forceinline__ void to_a(uint32_t (&a)[4], const float (&p)[TILES][4], int step) {
  if constexpr (sizeof(T) == 2) {
    a[0] = pair<T>(p[2 * step][0], p[2 * step][1]);
    a[1] = pair<T>(p[2 * step][2], p[2 * step][3]);
    a[2] = pair<T>(p[2 * step + 1][0], p[2 * step + 1][1]);
    a[3] = pair<T>(p[2 * step + 1][2], p[2 * step + 1][3]);
  } else {
    memcpy(&a[0], &p[step][0], 4), memcpy(&a[1], &p[step][2], 4);
    memcpy(&a[2], &p[step][1], 4), memcpy(&a[3], &p[step][3], 4);
  }
}

// d += a b. The three tf32 products start from zero and d is added outside the tensor core, which rounds its sums toward
// zero: over many keys that adds up.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2) {
    device::mma_m16n8k16<T>(d, a, b);
  } else {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    device::split(a_high, a_low, a);
    device::split(b_high, b_low, b);
    float product[4] = {};
    device::mma_m16n8k8_tf32(product, a_low, b_high);
    device::mma_m16n8k8_tf32(product, a_high, b_low);
    device::mma_m16n8k8_tf32(product, a_high, b_high);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += product[i];
  }
}

}  // namespace transfuse::attention
