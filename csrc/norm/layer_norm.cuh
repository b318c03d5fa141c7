// layer_norm forward:  s = round(x + residual)     (s = x without a residual)
//                      y = (s - mean) * rstd * weight + bias,   rstd = 1 / sqrt(mean((s - mean)^2) + eps)
//
// One read of x (and residual), one write of y (and s): bytes decide the speed, so accesses are 16 bytes wide and the
// row stays in registers as fp32 between the sum, the sum of squared deviations and the write. The variance is taken
// in a second pass over the registers: E[x^2] - E[x]^2 would cancel for rows with a large mean.
//
//   layer_norm_row     N <= 8192. blockDim = (32 * warps a row, rows a block); a thread holds 32 elements of its row,
//                      8 bf16 (4 fp32, 1 scalar) neighbours at a time:
//                        N <= 1024   one warp a row, 4 rows a block, no shared memory, no barrier
//                        N <= 8192   one block a row, ceil(N / 1024) warps, one barrier a reduction
//   layer_norm_loop    any N. One block of 512 threads a row, which it reads three times; a row that long is still in
//                      the L2 cache the second time.
//
// Shared memory: 256 bytes, static. Saved for backward: mean, rstd (fp32). Backward of the sum is backward of both.
// The launcher guarantees: contiguous columns; VEC = 16 bytes of T only if every pointer is 16-byte aligned and N and
// every row stride are multiples of VEC, VEC = 1 otherwise; outputs overlap nothing. Any M, any N, also 0.
#pragma once

#include <cstdint>

#include "device/reduce.h"
#include "device/vector_access.h"

namespace transfuse::norm {

constexpr int kElementsPerThread = 32;  // 32 fp32 registers a thread; 64 threads' worth of latency a row stays hidden
constexpr int kMaxRowThreads = 256;
constexpr int kMaxRegisterColumns = kElementsPerThread * kMaxRowThreads;  // 8192
constexpr int kLoopThreads = 512;

struct LayerNormParams {
  const void* x;         // (M, N) T
  const void* residual;  // (M, N) T or null
  const void* weight;    // (N) W or null
  const void* bias;      // (N) W or null
  void* y;               // (M, N) T
  void* summed;          // (M, N) T, null without a residual
  float* mean;           // (M)
  float* rstd;           // (M)
  int64_t M, N;
  int64_t x_stride, residual_stride, y_stride, summed_stride;  // between rows, in elements
  float eps;
};

// One row's pointers.
template <typename T, typename W>
struct Row {
  const T* x;
  const T* residual;
  T* summed;
  T* y;
  const W* weight;
  const W* bias;

  __device__ Row(const LayerNormParams& p, int64_t row)
      : x(static_cast<const T*>(p.x) + row * p.x_stride),
        residual(p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr),
        summed(p.residual ? static_cast<T*>(p.summed) + row * p.summed_stride : nullptr),
        y(static_cast<T*>(p.y) + row * p.y_stride),
        weight(static_cast<const W*>(p.weight)),
        bias(static_cast<const W*>(p.bias)) {}

  // s[col .. col + VEC), written to `summed` on the way.
  template <int VEC>
  __device__ __forceinline__ void read(int64_t col, float (&s)[VEC]) const {
    auto pack = device::load<VEC>(x + col);
    if (residual) {
      const auto added = device::load<VEC>(residual + col);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        pack.at[j] = device::from_float<T>(device::to_float(pack.at[j]) + device::to_float(added.at[j]));
      }
      device::store<VEC>(summed + col, pack);
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) s[j] = device::to_float(pack.at[j]);
  }

  // The same values a second time: this thread wrote `summed` itself, so it sees its own writes without a barrier.
  template <int VEC>
  __device__ __forceinline__ void read_again(int64_t col, float (&s)[VEC]) const {
    const auto pack = device::load<VEC>((residual ? summed : x) + col);
#pragma unroll
    for (int j = 0; j < VEC; ++j) s[j] = device::to_float(pack.at[j]);
  }

  template <int VEC>
  __device__ __forceinline__ void write(int64_t col, const float (&s)[VEC], float mean, float rstd) const {
    float out[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) out[j] = (s[j] - mean) * rstd;
    if (weight) {
      const auto w = device::load<VEC>(weight + col);
#pragma unroll
      for (int j = 0; j < VEC; ++j) out[j] *= device::to_float(w.at[j]);
    }
    if (bias) {
      const auto b = device::load<VEC>(bias + col);
#pragma unroll
      for (int j = 0; j < VEC; ++j) out[j] += device::to_float(b.at[j]);
    }
    device::Pack<T, VEC> pack;
#pragma unroll
    for (int j = 0; j < VEC; ++j) pack.at[j] = device::from_float<T>(out[j]);
    device::store<VEC>(y + col, pack);
  }
};

// IEEE square root and division, once a row: rsqrtf would spend two units in the last place of every element.
__device__ __forceinline__ float reciprocal_deviation(float squares, int64_t N, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(N) + eps);
}

template <typename T, typename W, int VEC>
__global__ void __launch_bounds__(kMaxRowThreads) layer_norm_row(const LayerNormParams p) {
  constexpr int kPacks = kElementsPerThread / VEC;
  __shared__ float sum_smem[device::kWarp], square_smem[device::kWarp];
  const int N = static_cast<int>(p.N);

  for (int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; m < p.M; m += int64_t(gridDim.x) * blockDim.y) {
    const Row<T, W> row(p, m);
    float s_reg[kPacks][VEC];  // s[m, (i * blockDim.x + threadIdx.x) * VEC + j]

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int col = (i * blockDim.x + threadIdx.x) * VEC;
      if (col < N) {
        row.read(col, s_reg[i]);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum += s_reg[i][j];
      }
    }
    const float mean = device::row_sum(sum, sum_smem) / static_cast<float>(N);

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (static_cast<int>(i * blockDim.x + threadIdx.x) * VEC < N) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) squares += (s_reg[i][j] - mean) * (s_reg[i][j] - mean);
      }
    }
    const float rstd = reciprocal_deviation(device::row_sum(squares, square_smem), N, p.eps);

    if (threadIdx.x == 0) {
      p.mean[m] = mean;
      p.rstd[m] = rstd;
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int col = (i * blockDim.x + threadIdx.x) * VEC;
      if (col < N) row.write(col, s_reg[i], mean, rstd);
    }
  }
}

template <typename T, typename W, int VEC>
__global__ void __launch_bounds__(kLoopThreads) layer_norm_loop(const LayerNormParams p) {
  __shared__ float sum_smem[device::kWarp], square_smem[device::kWarp];
  const int64_t first = int64_t(threadIdx.x) * VEC, step = int64_t(blockDim.x) * VEC;

  for (int64_t m = blockIdx.x; m < p.M; m += gridDim.x) {
    const Row<T, W> row(p, m);
    float s_reg[VEC];

    float sum = 0.0f;
    for (int64_t col = first; col < p.N; col += step) {
      row.read(col, s_reg);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum += s_reg[j];
    }
    const float mean = device::row_sum(sum, sum_smem) / static_cast<float>(p.N);

    float squares = 0.0f;
    for (int64_t col = first; col < p.N; col += step) {
      row.read_again(col, s_reg);
#pragma unroll
      for (int j = 0; j < VEC; ++j) squares += (s_reg[j] - mean) * (s_reg[j] - mean);
    }
    const float rstd = reciprocal_deviation(device::row_sum(squares, square_smem), p.N, p.eps);

    if (threadIdx.x == 0) {
      p.mean[m] = mean;
      p.rstd[m] = rstd;
    }
    for (int64_t col = first; col < p.N; col += step) {
      row.read_again(col, s_reg);
      row.write(col, s_reg, mean, rstd);
    }
  }
}

}  // namespace transfuse::norm
