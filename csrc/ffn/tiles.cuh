// An operand's tile in shared memory and the fragments that mma.sync takes from it, for 16-bit elements and for fp32.
//
// A tile is rows of COLUMNS elements, as they lie in memory, in chunks of 16 bytes. INNER says that its columns are the
// inner dimension K of the product: its rows are then those of A, or the columns of B. Otherwise its rows are K, and
// 16-bit fragments are read transposed; fp32, which ldmatrix cannot transpose, by single loads.
//
// Chunks are swizzled so that what one access of a warp reads falls into different banks: the same chunk of eight rows
// (ldmatrix), or two neighbouring chunks of four rows (fp32, rows are K).
#pragma once

#include <cstdint>
#include <cstring>

#include "device/cp_async.h"
#include "device/mma.h"

namespace transfuse::ffn {

using device::kChunk, device::kStep;

template <typename T, int ROWS, int COLUMNS, bool INNER>
struct Tile {
  static constexpr int kElements = ROWS * COLUMNS, kChunks = COLUMNS / kChunk<T>;
  static_assert(kChunks == 4 || kChunks % 8 == 0);

  T* data;

  // Row base + row, base a multiple of 8 (of 4 where fp32 is read by single loads): the swizzle follows from `row`
  // alone, so that one address serves all bases. Chunk 2 * pair + half.
  __device__ __forceinline__ T* at(int base, int row, int pair, int half) const {
    const int key = kChunks == 4 ? row / 2 % 4 : INNER || sizeof(T) == 2 ? row % 8 : row % 4 * 2;
    return data + (base + row) * COLUMNS + ((2 * pair) ^ (half ^ key)) * kChunk<T>;
  }

  // Where a thread's first copy begins in a matrix; its chunk of the tile's columns.
  template <int THREADS>
  __device__ __forceinline__ static const T* source(const T* matrix, int64_t stride, int row, int column) {
    return matrix + (row + static_cast<int>(threadIdx.x) / kChunks) * stride + column +
           static_cast<int>(threadIdx.x) % kChunks * kChunk<T>;
  }

  // Rows first .. first + COUNT - 1 of the tile from `source`; 0 beyond the `rows` rows and `columns` columns that the
  // matrix has from there on. By all THREADS; not awaited.
  template <int COUNT, int THREADS>
  __device__ __forceinline__ void load(int first, const T* source, int64_t stride, int rows, int columns) const {
    constexpr int kRowsAPass = THREADS / kChunks;
    static_assert(THREADS % kChunks == 0 && COUNT % kRowsAPass == 0);
    static_assert(kRowsAPass % 8 == 0 || (kRowsAPass == 4 && !INNER && sizeof(T) == 4));
    const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int bytes = min(max(columns - chunk * kChunk<T>, 0), kChunk<T>) * static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < COUNT; i += kRowsAPass) {
      device::cp_async<16>(at(first + i, row, chunk / 2, chunk % 2), source + i * stride, row + i < rows ? bytes : 0);
    }
  }

  // A: rows m .. m + 15 of it, step `step` of the tile's K.
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], int m, int step) const {
    const int lane = threadIdx.x % 32;
    if constexpr (INNER) {
      device::ldmatrix(a, at(m, lane % 16, step, lane / 16));
    } else if constexpr (sizeof(T) == 2) {
      device::ldmatrix_transposed(a, at(step * 16, lane / 16 * 8 + lane % 8, m / 16, lane / 8 % 2));
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = single(step * 8 + r / 2 * 4, m / 8 + r % 2);
    }
  }

  // B of two neighbouring products: columns n .. n + 15 of it.
  __device__ __forceinline__ void load_b(uint32_t (&b)[2][2], int n, int step) const {
    const int lane = threadIdx.x % 32;
    if constexpr (!INNER && sizeof(T) == 4) {
#pragma unroll
      for (int r = 0; r < 4; ++r) b[r / 2][r % 2] = single(step * 8 + r % 2 * 4, n / 8 + r / 2);
    } else {
      uint32_t m[4];
      if constexpr (INNER) {
        device::ldmatrix(m, at(n, lane / 16 * 8 + lane % 8, step, lane / 8 % 2));
      } else {
        device::ldmatrix_transposed(m, at(step * 16, lane % 16, n / 16, lane / 16));
      }
      b[0][0] = m[0], b[0][1] = m[1], b[1][0] = m[2], b[1][1] = m[3];
    }
  }

 private:
  // Of rows k .. k + 3, this lane's row, and of the eight columns from 8 * eight on, its column.
  __device__ __forceinline__ uint32_t single(int k, int eight) const {
    const int column = threadIdx.x % 32 / 4;
    uint32_t bits;
    memcpy(&bits, at(k, threadIdx.x % 4, eight, column / 4) + column % 4, 4);
    return bits;
  }
};

// d += a b. fp32 takes three tf32 products, of which low * low would be below its last place (Ootomo, Yokota 2022). The
// two smaller ones go to `small`, for with an infinite operand they are NaN or infinite where d is right (see `whole`).
// The larger one is added outside the tensor core, which rounds its sums toward zero: over a long K that adds up.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], float (&small)[4], const uint32_t (&a)[4],
                                         const uint32_t (&a_low)[4], const uint32_t (&b)[2],
                                         const uint32_t (&b_low)[2]) {
  if constexpr (sizeof(T) == 2) {
    device::mma_m16n8k16<T>(d, a, b);
  } else {
    device::mma_m16n8k8_tf32(small, a_low, b);
    device::mma_m16n8k8_tf32(small, a, b_low);
    float product[4] = {};
    device::mma_m16n8k8_tf32(product, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += product[i];
  }
}

__device__ __forceinline__ float whole(float d, float small) { return fabsf(small) < INFINITY ? d + small : d; }

}  // namespace transfuse::ffn
