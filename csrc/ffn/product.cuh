// ffn product:  C = A B (+ A2 B2), beside it G = A B_gate where gated, and their end (ends.cuh).   A (M, K), B (K, N)
//
// A block owns a tile [BLOCK_M, BLOCK_N] of C over one of `splits` ranges of K, its warps BLOCK_M / WARPS_M x BLOCK_N /
// WARPS_N of it. Gated, the tile's left half is C's and its right half G's, of BLOCK_N / 2 columns each: only loads and
// end know. Blocks go in groups of 8 rows of tiles, so that blocks at work together share rows of A and columns of B in
// L2.
//
//   per BLOCK_K of K:   A [BLOCK_M x BLOCK_K], B [BLOCK_K x BLOCK_N] by cp.async, STAGES on their way or in use
//   per mma step:       16 x 8 accumulators in registers; fp32 as three tf32 products
//   at the end:         accumulators to shared memory, from there by rows of 16-byte accesses through the end, or,
//                       where K is split, to `partials` in fp32, which combine.cuh adds in order and ends
//
// Shared memory, dynamic: STAGES tiles of A and B (tiles.cuh); after the last, C [BLOCK_M][BLOCK_N + 8] fp32.
// The launcher guarantees: all matrices' columns contiguous; the operands' rows aligned to 16 bytes, whatever their
// width; sizes within 31 bits.
#pragma once

#include <cstdint>

#include "device/shared_memory.h"
#include "ffn/ends.cuh"
#include "ffn/tiles.cuh"

namespace transfuse::ffn {

// LAYOUT, as Python numbers it.
constexpr int kForward = 0;  // x w^T: A (M, K), B^T (N, K)
constexpr int kInput = 1;    // dy w: A (M, K), B (K, N)
constexpr int kWeight = 2;   // dy^T x: A^T (K, M), B (K, N)

struct ProductParams {
  Rows a, b, b_gate, a2, b2;  // as LAYOUT says, T
  float* partials;            // (gated ? 2 : 1, splits, M, columns) or null
  int64_t columns;            // of a row of partials, a multiple of 16 bytes; those beyond N are not touched
  int K, splits, span;        // span: steps of BLOCK_K a split, over both pairs
  EndParams end;              // with M and N
};

template <typename T, int BLOCK_M_, int BLOCK_N_, int BLOCK_K_, int WARPS_M, int WARPS_N, int STAGES, int LAYOUT>
class Product {
 public:
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = BLOCK_K_;
  static constexpr int kThreads = WARPS_M * WARPS_N * 32;
  static constexpr int kBlocks = BLOCK_M >= 128 ? 2 : BLOCK_M >= 64 ? 3 : 4;  // that registers suffice for

  __device__ __forceinline__ Product(const ProductParams& p) : p_(p) {
    const int tiles_m = (p.end.M + BLOCK_M - 1) / BLOCK_M, columns = p.b_gate.data ? BLOCK_N / 2 : BLOCK_N;
    const int tiles_n = (p.end.N + columns - 1) / columns;
    const int64_t tiles = static_cast<int64_t>(tiles_m) * tiles_n, in_split = blockIdx.x % tiles;
    split_ = static_cast<int>(blockIdx.x / tiles);
    const int group = static_cast<int>(in_split / (kGroup * tiles_n));
    const int rest = static_cast<int>(in_split % (kGroup * tiles_n));
    const int height = min(tiles_m - group * kGroup, kGroup);
    tile_m_ = group * kGroup + rest % height;
    m_low_ = tile_m_ * BLOCK_M;
    n_low_ = rest / height * columns;
  }

  __device__ __forceinline__ void run() {
    const int of_pair = (p_.K + BLOCK_K - 1) / BLOCK_K, steps = p_.a2.data ? 2 * of_pair : of_pair;
    const int first = split_ * p_.span, last = min(first + p_.span, steps);
    if (first < of_pair) {
      start(p_.a, p_.b, first * BLOCK_K);
    } else if (first < last) {
      start(p_.a2, p_.b2, (first - of_pair) * BLOCK_K);
    }
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) load(first + i, last, of_pair, i);
    int stage = 0, next = STAGES - 1;
    for (int step = first; step < last; ++step) {
      device::cp_async_wait<STAGES - 2>();
      __syncthreads();  // this stage has arrived, and the one before it, which is loaded next, has been read
      load(step + STAGES - 1, last, of_pair, next);
      multiply_stage(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      next = next + 1 == STAGES ? 0 : next + 1;
    }
    device::cp_async_wait<0>();
    __syncthreads();
    to_shared();
    __syncthreads();
    end();
  }

 private:
  static constexpr int kGroup = 8, kHalf = BLOCK_N / 2;
  static constexpr bool kAInner = LAYOUT != kWeight, kBInner = LAYOUT == kForward;
  static constexpr int kWarpM = BLOCK_M / WARPS_M, kWarpN = BLOCK_N / WARPS_N;
  static constexpr int kRows = kWarpM / 16, kColumns = kWarpN / 8;  // accumulators of a warp
  static constexpr int kV = kChunk<T>, kPitch = BLOCK_N + 8;        // of C: two rows of a warp meet in no bank
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && BLOCK_K % kStep<T> == 0);

  using ATile = Tile<T, kAInner ? BLOCK_M : BLOCK_K, kAInner ? BLOCK_K : BLOCK_M, kAInner>;
  using BTile = Tile<T, kBInner ? BLOCK_N : BLOCK_K, kBInner ? BLOCK_K : BLOCK_N, kBInner>;
  static constexpr int kStageBytes = (ATile::kElements + BTile::kElements) * static_cast<int>(sizeof(T));
  static constexpr int kEndBytes = BLOCK_M * kPitch * 4;

 public:
  static constexpr int kSharedBytes = STAGES * kStageBytes > kEndBytes ? STAGES * kStageBytes : kEndBytes;

 private:
  __device__ __forceinline__ static unsigned char* shared(int stage) {
    return device::dynamic_shared_memory() + stage * kStageBytes;
  }
  __device__ __forceinline__ static ATile a_tile(int stage) { return {reinterpret_cast<T*>(shared(stage))}; }
  __device__ __forceinline__ static BTile b_tile(int stage) {
    return {reinterpret_cast<T*>(shared(stage)) + ATile::kElements};
  }
  __device__ __forceinline__ static const T* data(const Rows& rows) { return static_cast<const T*>(rows.data); }

  // The first copies of a pair of operands, from `k` on.
  __device__ __forceinline__ void start(const Rows& a, const Rows& b, int k) {
    k_ = k, a_stride_ = a.stride, b_stride_ = b.stride;
    a_from_ = ATile::template source<kThreads>(data(a), a.stride, kAInner ? m_low_ : k, kAInner ? k : m_low_);
    b_from_ = BTile::template source<kThreads>(data(b), b.stride, kBInner ? n_low_ : k, kBInner ? k : n_low_);
    if constexpr (kBInner) {
      const bool gated = p_.b_gate.data;
      const Rows& right = gated ? p_.b_gate : b;
      right_stride_ = right.stride;
      right_from_ = BTile::template source<kThreads>(data(right), right.stride, gated ? n_low_ : n_low_ + kHalf, k);
    }
  }

  // One group of copies, empty beyond the last step.
  __device__ __forceinline__ void load(int step, int last, int of_pair, int stage) {
    if (step < last) {
      if (step == of_pair) start(p_.a2, p_.b2, 0);  // first == of_pair starts alike
      const int k = p_.K - k_, m = p_.end.M - m_low_, n = p_.end.N - n_low_;
      const ATile a = a_tile(stage);
      const BTile b = b_tile(stage);
      a.template load<kAInner ? BLOCK_M : BLOCK_K, kThreads>(0, a_from_, a_stride_, kAInner ? m : k, kAInner ? k : m);
      a_from_ += kAInner ? BLOCK_K : BLOCK_K * a_stride_;
      if constexpr (kBInner) {
        b.template load<kHalf, kThreads>(0, b_from_, b_stride_, n, k);
        b.template load<kHalf, kThreads>(kHalf, right_from_, right_stride_, p_.b_gate.data ? n : n - kHalf, k);
        right_from_ += BLOCK_K;
      } else {
        b.template load<BLOCK_K, kThreads>(0, b_from_, b_stride_, k, n);
      }
      b_from_ += kBInner ? BLOCK_K : BLOCK_K * b_stride_;
      k_ += BLOCK_K;
    }
    device::cp_async_commit();
  }

  __device__ __forceinline__ float (&small(int i, int j))[4] {
    return small_[sizeof(T) == 4 ? i : 0][sizeof(T) == 4 ? j : 0];
  }
  __device__ __forceinline__ static int warp_m() { return static_cast<int>(threadIdx.x) / 32 / WARPS_N * kWarpM; }
  __device__ __forceinline__ static int warp_n() { return static_cast<int>(threadIdx.x) / 32 % WARPS_N * kWarpN; }

  __device__ __forceinline__ void multiply_stage(int stage) {
    const ATile a_smem = a_tile(stage);
    const BTile b_smem = b_tile(stage);
    // C += A B [kWarpM, kWarpN]. fp32 goes step by step: a step is many products, and more at once would spill.
#pragma unroll sizeof(T) == 4 ? 1 : BLOCK_K / kStep<T>
    for (int k = 0; k < BLOCK_K / kStep<T>; ++k) {
      uint32_t a[kRows][4], a_low[kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        a_smem.load_a(a[i], warp_m() + i * 16, k);
        if constexpr (sizeof(T) == 4) device::split(a[i], a_low[i], a[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t b[2][2], b_low[2][2];
        b_smem.load_b(b, warp_n() + j * 8, k);
        if constexpr (sizeof(T) == 4) device::split(b[0], b_low[0], b[0]), device::split(b[1], b_low[1], b[1]);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) multiply<T>(c_[i][j + h], small(i, j + h), a[i], a_low[i], b[h], b_low[h]);
        }
      }
    }
  }

  __device__ __forceinline__ void to_shared() {
    float* c_smem = reinterpret_cast<float*>(shared(0));
    const int row = warp_m() + threadIdx.x % 32 / 4, column = warp_n() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float2* to = reinterpret_cast<float2*>(c_smem + (row + i * 16 + r * 8) * kPitch + column + j * 8);
          if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; ++e) c_[i][j][e] = whole(c_[i][j][e], small(i, j)[e]);
          }
          *to = make_float2(c_[i][j][2 * r], c_[i][j][2 * r + 1]);
        }
      }
    }
  }

  // The block goes down the tile, a row of it by BLOCK_N / V threads (half of them where gated).
  __device__ __forceinline__ void end() const {
    const EndParams& end = p_.end;
    float* c_smem = reinterpret_cast<float*>(shared(0));
    const int columns = p_.b_gate.data ? BLOCK_N / 2 : BLOCK_N, threads_a_row = columns / kV;
    const int first = static_cast<int>(threadIdx.x) / threads_a_row, rows = kThreads / threads_a_row;
    const int column = static_cast<int>(threadIdx.x) % threads_a_row * kV, n = n_low_ + column;
    float sum[kV] = {};
    if (n < end.N) {
#pragma unroll 1
      for (int row = first; row < BLOCK_M && m_low_ + row < end.M; row += rows) {
        float c[kV], g[kV] = {};
        read(c, c_smem + row * kPitch + column, kV, true);
        if (p_.b_gate.data) read(g, c_smem + row * kPitch + column + columns, kV, true);
        if (p_.partials) {
          const int64_t at = static_cast<int64_t>(split_) * end.M + m_low_ + row;
          write(p_.partials + at * p_.columns + n, c, end.N - n, true);
          if (p_.b_gate.data) {
            write(p_.partials + (at + static_cast<int64_t>(p_.splits) * end.M) * p_.columns + n, g, end.N - n, true);
          }
        } else {
          finish<T>(end, m_low_ + row, n, c, g, sum);
        }
      }
    }
    if (end.sums && !p_.partials) {
      __syncthreads();
      write_sums(end, c_smem, sum, first, rows, column, columns, tile_m_, n_low_);
    }
  }

  const ProductParams& p_;
  int split_, tile_m_, m_low_, n_low_;
  // What the next copies read.
  int k_ = 0;
  const T *a_from_ = nullptr, *b_from_ = nullptr, *right_from_ = nullptr;  // right: of the right half of B's columns
  int64_t a_stride_ = 0, b_stride_ = 0, right_stride_ = 0;
  float c_[kRows][kColumns][4] = {};
  float small_[sizeof(T) == 4 ? kRows : 1][sizeof(T) == 4 ? kColumns : 1][4] = {};  // see `multiply`
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    ffn_product_kernel(const __grid_constant__ ProductParams p) {
  Kernel(p).run();
}

}  // namespace transfuse::ffn
