// The gradient of an attention bias that was broadcast: the sum of dS (gradients.cuh) over all batch rows, heads,
// queries and keys that share an element of the bias. A bias of each score's own is written by backward.cuh.
//
//   bias of (., ., q_len, k_len)   a block owns BLOCK_M x BLOCK_N elements   loops over batch rows and heads
//   bias of (., ., 1, k_len)       BLOCK_N columns                           that share them; those and tiles of queries
//   bias of (., ., q_len, 1)       BLOCK_M rows                              those and tiles of keys
//   bias of (., ., 1, 1)           one element                               those and all tiles
//
// `splits` blocks share that run, each with a partial of its own; the caller adds the partials up. Tiles outside the
// window are not read. Always rich: there is a bias.
// Shared memory, dynamic: STAGES of q, dO [BLOCK_M][D] and k, v [BLOCK_N][D]; at the end the sums [BLOCK_M][BLOCK_N].
// The launcher guarantees: as for backward.cuh.
#pragma once

#include "attention/gradients.cuh"
#include "device/shared_memory.h"

namespace transfuse::attention {

struct BiasGradientParams : BackwardParams {
  void* partial;  // (splits, batch|1, heads|1, q_len|1, k_len|1) T or float
  bool partial_is_float;
  bool rows, columns;                                // whether the bias has a row for each query, a column for each key
  int splits, bias_heads, batches_each, heads_each;  // batch rows and heads that share an element
  int q_tiles, k_tiles;
};

template <typename T, int D, int BLOCK_M, int BLOCK_N, int STAGES>
class BiasGradient {
 public:
  static constexpr int kThreads = BLOCK_M * 2;
  static constexpr int kStage = 2 * (BLOCK_M + BLOCK_N) * D;
  static constexpr int kSharedBytes = STAGES * kStage * static_cast<int>(sizeof(T));
  static_assert(kSharedBytes <= 99 * 1024 && BLOCK_M * (BLOCK_N + 1) * 4 <= kSharedBytes);

  __device__ __forceinline__ explicit BiasGradient(const BiasGradientParams& p) : p_(p) {
    smem_ = reinterpret_cast<T*>(device::dynamic_shared_memory());
    int64_t block = blockIdx.x;
    const auto next = [&](int count) {
      const int index = static_cast<int>(block % count);
      block /= count;
      return index;
    };
    own_k_tile_ = p.columns ? next(p.k_tiles) : 0;
    own_q_tile_ = p.rows ? next(p.q_tiles) : 0;
    split_ = next(p.splits);
    bias_h_ = next(p.bias_heads);
    bias_b_ = static_cast<int>(block);
  }

  __device__ __forceinline__ void run() {
    const int64_t tiles = int64_t(p_.rows ? 1 : p_.q_tiles) * (p_.columns ? 1 : p_.k_tiles);
    const int64_t units = tiles * p_.batches_each * p_.heads_each;
    const int64_t run = (units + p_.splits - 1) / p_.splits;
    end_ = min((split_ + 1) * run, units);
    int64_t unit = seen_from(split_ * run);
    load(0, unit);
    for (int stage = 0; unit < end_; stage ^= STAGES - 1) {
      const int64_t next = seen_from(unit + 1);
      if constexpr (STAGES == 2) load(stage ^ 1, next);
      device::cp_async_wait<STAGES - 1>();
      __syncthreads();
      step(stage, unit);
      __syncthreads();
      if constexpr (STAGES == 1) load(0, next);
      unit = next;
    }
    device::cp_async_wait<0>();
    write();
  }

 private:
  static constexpr int kTiles = BLOCK_N / 8;

  // One tile of scores of one head.
  struct Place : Sequence {
    int i_low, j_low;
  };

  __device__ __forceinline__ Place place(int64_t unit) const {
    const int k_tiles = p_.columns ? 1 : p_.k_tiles, q_tiles = p_.rows ? 1 : p_.q_tiles;
    const int k_tile = p_.columns ? own_k_tile_ : static_cast<int>(unit % k_tiles);
    const int q_tile = p_.rows ? own_q_tile_ : static_cast<int>(unit / k_tiles % q_tiles);
    const int sharing = static_cast<int>(unit / k_tiles / q_tiles);
    const Sequence at(p_, bias_b_ + sharing / p_.heads_each, bias_h_ + sharing % p_.heads_each);
    return {at, q_tile * BLOCK_M, k_tile * BLOCK_N};
  }

  // The first unit from `unit` on, or the end, whose queries see some of its keys.
  __device__ __forceinline__ int64_t seen_from(int64_t unit) const {
    for (; unit < end_; ++unit) {
      const Place at = place(unit);
      if (at.i_low >= at.q_rows) continue;
      const KeyRange keys(p_, at, at.i_low, min(at.i_low + BLOCK_M, at.q_rows));
      if (at.j_low < keys.high && at.j_low + BLOCK_N > keys.low) break;
    }
    return unit;
  }

  __device__ __forceinline__ T* q_smem(int stage) const { return smem_ + stage * kStage; }
  __device__ __forceinline__ T* dout_smem(int stage) const { return q_smem(stage) + BLOCK_M * D; }
  __device__ __forceinline__ T* k_smem(int stage) const { return dout_smem(stage) + BLOCK_M * D; }
  __device__ __forceinline__ T* v_smem(int stage) const { return k_smem(stage) + BLOCK_N * D; }

  __device__ __forceinline__ void load(int stage, int64_t unit) const {
    if (unit < end_) {
      const Place at = place(unit);
      const auto queries = [&](T* to, const Strided& t, int width) {
        load_tile<T, D, BLOCK_M, kThreads>(to, at.template queries<T>(t), t.row, at.i_low, at.q_rows, width);
      };
      const auto keys = [&](T* to, const Strided& t, int width) {
        load_tile<T, D, BLOCK_N, kThreads>(to, at.template keys<T>(t, p_.group), t.row, at.j_low, at.k_rows, width);
      };
      queries(q_smem(stage), p_.q, p_.head_dim);
      queries(dout_smem(stage), p_.dout, p_.v_dim);
      keys(k_smem(stage), p_.k, p_.head_dim);
      keys(v_smem(stage), p_.v, p_.v_dim);
    }
    device::cp_async_commit();
  }

  __device__ __forceinline__ void step(int stage, int64_t unit) {
    const Place at = place(unit);
    float2 rows[2] = {{INFINITY, 0.0f}, {INFINITY, 0.0f}};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = at.i_low + row_of(2 * r);
      const float* from = at.template queries<float>(p_.statistics);
      if (i < at.q_rows) rows[r] = *reinterpret_cast<const float2*>(from + i * p_.statistics.row);
    }
    float s[kTiles][4] = {}, dp[kTiles][4] = {};
    multiply_rows<T, D, 4>(s, q_smem(stage), k_smem(stage));
    multiply_rows<T, D, 4>(dp, dout_smem(stage), v_smem(stage));
    const float slope = p_.slopes.data ? *p_.slopes.at<float>(at.b, at.h) : 0.0f;
    differentiate<T, false, true>(
        p_, at, s, dp, at.i_low, at.j_low, slope, true, [&](int, int e) { return rows[e / 2]; },
        [&](int n, int e, int, int, float ds) { sum_[n][e] += ds; });
  }

  // Sums over what the bias has one row or one column of, by one thread or one warp each.
  __device__ __forceinline__ void write() const {
    float* sums = reinterpret_cast<float*>(smem_);
    constexpr int kStride = BLOCK_N + 1;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[row_of(e) * kStride + column_of(n, e)] = sum_[n][e];
    }
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x), i_low = own_q_tile_ * BLOCK_M, j_low = own_k_tile_ * BLOCK_N;
    if (p_.rows && p_.columns) {
      for (int index = thread; index < BLOCK_M * BLOCK_N; index += kThreads) {
        const int row = index / BLOCK_N, column = index % BLOCK_N;
        store(i_low + row, j_low + column, sums[row * kStride + column]);
      }
    } else if (p_.rows) {
      float total = 0.0f;
      for (int column = 0; thread < BLOCK_M && column < BLOCK_N; ++column) total += sums[thread * kStride + column];
      if (thread < BLOCK_M) store(i_low + thread, 0, total);
    } else if (p_.columns) {
      float total = 0.0f;
      for (int row = 0; thread < BLOCK_N && row < BLOCK_M; ++row) total += sums[row * kStride + thread];
      if (thread < BLOCK_N) store(0, j_low + thread, total);
    } else if (thread < 32) {
      float total = 0.0f;
      for (int index = thread; index < BLOCK_M * BLOCK_N; index += 32) {
        total += sums[index / BLOCK_N * kStride + index % BLOCK_N];
      }
      total = device::warp_sum(total);
      if (thread == 0) store(0, 0, total);
    }
  }

  __device__ __forceinline__ void store(int i, int j, float x) const {
    const int64_t q_len = p_.rows ? p_.q_len : 1, k_len = p_.columns ? p_.k_len : 1;
    if (i >= q_len || j >= k_len) return;
    const int64_t owner = int64_t(split_) * (p_.batch / p_.batches_each) + bias_b_;
    const int64_t offset = ((owner * p_.bias_heads + bias_h_) * q_len + i) * k_len + j;
    if (p_.partial_is_float) {
      static_cast<float*>(p_.partial)[offset] = x;
    } else {
      static_cast<T*>(p_.partial)[offset] = device::from_float<T>(x);
    }
  }

  const BiasGradientParams& p_;
  T* smem_;
  int split_, bias_b_, bias_h_, own_q_tile_, own_k_tile_;
  int64_t end_;
  float sum_[kTiles][4] = {};
};

template <typename T, int D, int BLOCK_M, int BLOCK_N, int STAGES>
__global__ void __launch_bounds__(BLOCK_M * 2, 1) attention_bias_gradient_kernel(const BiasGradientParams p) {
  BiasGradient<T, D, BLOCK_M, BLOCK_N, STAGES>(p).run();
}

}  // namespace transfuse::attention
