// layer_norm forward:  s = round(x + residual)     (s = x without a residual)
//                      y = (s - mean) * rstd * weight + bias,   rstd = 1 / sqrt(mean((s - mean)^2) + eps)
// rms_norm forward:    the same with 0 for the mean and no bias; a null `mean` says so.
//
// One read of x (and residual), one write of y (and s): bytes decide the speed, so accesses are 16 bytes wide and the
// row stays in registers as fp32 between the sum, the sum of squared deviations and the write. The variance is taken
// in a second pass over the registers: E[x^2] - E[x]^2 would cancel for rows with a large mean.
//
//   layer_norm_row     N <= 8192. blockDim = (32 * warps a row, rows a block); a thread holds E = 32 elements of a row
//                      (16 where VEC = 1) in packs of VEC neighbours, the i-th at (i * blockDim.x + threadIdx.x) * VEC:
//                        N <= 32 E   one warp a row, 4 rows a block, no shared memory, no barrier
//                        beyond      one block a row, ceil(N / 32 E) warps, one barrier a reduction
//   layer_norm_loop    any N. One block of 512 threads a row, which it reads three times in rounds of E / 2 elements a
//                      thread; a row that long is still in the L2 cache the second time.
//
// Shared memory: 256 bytes, static. Saved for backward: mean, rstd (fp32).
// The launcher guarantees: contiguous columns; VEC = 16 bytes of T only if every pointer is 16-byte aligned and N and
// every row stride are multiples of VEC, VEC = 1 otherwise; outputs overlap nothing. Any M, any N, also 0.
#pragma once

#include <cstdint>

#include "norm/row_columns.cuh"

namespace transfuse::norm {

constexpr int kMaxRowColumns = 8192;
constexpr int kLoopThreads = 512;

// Elements of a thread in layer_norm_row. 32 bring 2 KB (bf16) or 4 KB (fp32) a warp in flight, at 72 to 100 registers.
// Single elements cost an address each: 32 of them would take 166 registers.
template <int VEC>
constexpr int kRowElements = VEC == 1 ? 16 : 32;

struct LayerNormParams {
  const void* x;         // (M, N) T
  const void* residual;  // (M, N) T or null
  const void* weight;    // (N) W or null
  const void* bias;      // (N) W or null
  void* y;               // (M, N) T
  void* summed;          // (M, N) T, null without a residual
  float* mean;           // (M), null for rms_norm
  float* rstd;           // (M)
  int64_t M, N;
  int64_t x_stride, residual_stride, y_stride, summed_stride;  // between rows, in elements
  float eps;
};

// ELEMENTS of one row in one thread's registers, from column `begin` of the row on.
template <typename T, typename W, int VEC, int ELEMENTS>
class RowTile : private RowColumns<VEC, ELEMENTS> {
 public:
  __device__ __forceinline__ RowTile(const LayerNormParams& p, int64_t m, int64_t begin)
      : RowColumns<VEC, ELEMENTS>(p.N, begin), p_(p), m_(m) {}

  // s_reg = s, and `summed` is written on the way.
  __device__ __forceinline__ void read() {
    TPack x_reg[kPacks];
    load_all(x_reg, at<const T>(p_.x, p_.x_stride));
    if (p_.residual) {
      TPack residual_reg[kPacks];
      load_all(residual_reg, at<const T>(p_.residual, p_.residual_stride));
      T* summed = at<T>(p_.summed, p_.summed_stride);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const float sum = device::to_float(x_reg[i].at[j]) + device::to_float(residual_reg[i].at[j]);
          x_reg[i].at[j] = device::from_float<T>(sum);
        }
        if (inside(i)) device::store<VEC>(summed + column(i), x_reg[i]);
      }
    }
    widen(x_reg);
  }

  // The same values a second time. This thread wrote `summed` itself and so sees it without a barrier.
  __device__ __forceinline__ void read_again() {
    TPack s_packs[kPacks];
    load_all(s_packs, p_.residual ? at<const T>(p_.summed, p_.summed_stride) : at<const T>(p_.x, p_.x_stride));
    widen(s_packs);
  }

  __device__ __forceinline__ float sum() const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) total += s_reg_[i][j];  // 0 outside the row
    }
    return total;
  }

  __device__ __forceinline__ float squared_deviations(float mean) const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float pack_total = 0.0f;
#pragma unroll
      for (int j = 0; j < VEC; ++j) pack_total += (s_reg_[i][j] - mean) * (s_reg_[i][j] - mean);
      if (inside(i)) total += pack_total;
    }
    return total;
  }

  // y = (s - mean) * rstd * weight + bias
  __device__ __forceinline__ void write_normalised(float mean, float rstd) const {
    T* y = at<T>(p_.y, p_.y_stride);
    const W* weight = static_cast<const W*>(p_.weight) + begin_;
    const W* bias = static_cast<const W*>(p_.bias) + begin_;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const WPack w = p_.weight && inside(i) ? device::load<VEC>(weight + column(i)) : filled(1.0f);
      const WPack b = p_.bias && inside(i) ? device::load<VEC>(bias + column(i)) : filled(0.0f);
      TPack pack;
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const float normed = (s_reg_[i][j] - mean) * rstd;
        pack.at[j] = device::from_float<T>(normed * device::to_float(w.at[j]) + device::to_float(b.at[j]));
      }
      if (inside(i)) device::store<VEC>(y + column(i), pack);
    }
  }

 private:
  using Columns = RowColumns<VEC, ELEMENTS>;
  using Columns::begin_;
  using Columns::column;
  using Columns::inside;
  using Columns::kPacks;
  using Columns::load_all;
  using TPack = device::Pack<T, VEC>;
  using WPack = device::Pack<W, VEC>;

  template <typename E, typename V>
  __device__ __forceinline__ E* at(V* data, int64_t row_stride) const {
    return this->template row<E>(data, m_, row_stride);
  }

  __device__ __forceinline__ static WPack filled(float value) {
    WPack pack;
#pragma unroll
    for (int j = 0; j < VEC; ++j) pack.at[j] = device::from_float<W>(value);
    return pack;
  }

  __device__ __forceinline__ void widen(const TPack (&packs)[kPacks]) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) s_reg_[i][j] = device::to_float(packs[i].at[j]);
    }
  }

  const LayerNormParams& p_;
  const int64_t m_;
  float s_reg_[kPacks][VEC];
};

// IEEE square root and division, once a row: rsqrtf would spend two units in the last place of every element.
__device__ __forceinline__ float reciprocal_deviation(float squares, int64_t N, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(N) + eps);
}

__device__ __forceinline__ void write_statistics(const LayerNormParams& p, int64_t m, float mean, float rstd) {
  if (threadIdx.x == 0) {
    if (p.mean) p.mean[m] = mean;
    p.rstd[m] = rstd;
  }
}

template <typename T, typename W, int VEC>
__global__ void __launch_bounds__(kMaxRowColumns / kRowElements<VEC>) layer_norm_row(const LayerNormParams p) {
  __shared__ float smem[2][device::kWarp];
  RowSums row_sum(smem);

  for (int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; m < p.M; m += int64_t(gridDim.x) * blockDim.y) {
    RowTile<T, W, VEC, kRowElements<VEC>> row(p, m, 0);
    row.read();
    const float mean = p.mean ? row_sum(row.sum()) / static_cast<float>(p.N) : 0.0f;
    const float rstd = reciprocal_deviation(row_sum(row.squared_deviations(mean)), p.N, p.eps);
    write_statistics(p, m, mean, rstd);
    row.write_normalised(mean, rstd);
  }
}

template <typename T, typename W, int VEC>
__global__ void __launch_bounds__(kLoopThreads) layer_norm_loop(const LayerNormParams p) {
  constexpr int kElements = kRowElements<VEC> / 2;
  using Tile = RowTile<T, W, VEC, kElements>;
  __shared__ float smem[2][device::kWarp];
  RowSums row_sum(smem);
  const int step = static_cast<int>(blockDim.x) * kElements;  // columns of the row a round

  for (int64_t m = blockIdx.x; m < p.M; m += gridDim.x) {
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
    for (int64_t begin = 0; begin < p.N; begin += step) {
      Tile tile(p, m, begin);
      tile.read();
      if (p.mean) {
        sum += tile.sum();
      } else {
        squares += tile.squared_deviations(0.0f);
      }
    }
    if (p.mean) {
      mean = row_sum(sum) / static_cast<float>(p.N);
      for (int64_t begin = 0; begin < p.N; begin += step) {
        Tile tile(p, m, begin);
        tile.read_again();
        squares += tile.squared_deviations(mean);
      }
    }
    const float rstd = reciprocal_deviation(row_sum(squares), p.N, p.eps);
    write_statistics(p, m, mean, rstd);

    for (int64_t begin = 0; begin < p.N; begin += step) {
      Tile tile(p, m, begin);
      tile.read_again();
      tile.write_normalised(mean, rstd);
    }
  }
}

}  // namespace transfuse::norm
