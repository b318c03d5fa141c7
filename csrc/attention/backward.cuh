// attention backward:  dV = (D P)^T dO    dK = scale (c dS)^T Q    dQ = scale (c dS) K    (P, dS: gradients.cuh)
//
// One kernel, twice. Its block owns OWN rows, each of its warps 16 of them, and loops over the rows on the other side:
//
//   dQ      owns queries of one head (q, dO)        loops over the keys they see (k, v)
//   dK, dV  owns keys of one key head (k, v), KEYS  loops over the queries that see them (q, dO), of its whole group
//
//   S  = own x  loop x^T   [16 x LOOP] a warp        dP = own y  loop y^T   [16 x LOOP]         x: q, k; y: dO, v
//   dX += dS loop x        [16 x OUT]  a warp        dY += P loop y         [16 x OUT], KEYS alone
//
// S and dP are formed in both: seven products for the five of the formulas, the price of a fixed order of sums and no
// atomics. A block writes OUT columns; where they are fewer than the rows have, several share the rows.
// Shared memory, dynamic: own x and y [OWN][D]; STAGES of loop x and y [LOOP][D], for KEYS of (L, delta) [LOOP] as well.
// RICH as in forward.cuh. With it the dQ kernel also writes dS, where the bias has each score's shape, and slopes'
// partial sums.
// The launcher guarantees: rows aligned as in forward.cuh, in all of q, k, v, dO, dQ, dK, dV.
#pragma once

#include "attention/gradients.cuh"
#include "device/shared_memory.h"

namespace transfuse::attention {

template <typename T, int D, int OUT, int OWN, int LOOP, int STAGES, bool KEYS, bool RICH>
class Backward {
 public:
  static constexpr int kThreads = OWN * 2;
  static constexpr int kStageBytes = 2 * LOOP * D * static_cast<int>(sizeof(T)) + (KEYS ? LOOP * 8 : 0);
  static constexpr int kSharedBytes = 2 * OWN * D * static_cast<int>(sizeof(T)) + STAGES * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024 && LOOP <= kThreads);

  // low: the first own row; part: of the columns.
  __device__ __forceinline__ Backward(const BackwardParams& p, const Sequence& at, int low, int part)
      : p_(p), at_(at), low_(low), column_(part * OUT) {
    smem_ = device::dynamic_shared_memory();
  }

  __device__ __forceinline__ void run() {
    range();
    load_own();
    if constexpr (!KEYS) read_statistics();
    load(0, 0);
    for (int unit = 0; unit < units_; ++unit) {
      const int stage = STAGES == 2 ? unit % 2 : 0;
      if constexpr (STAGES == 2) load(stage ^ 1, unit + 1);
      device::cp_async_wait<STAGES - 1>();  // all but the stage that was just started
      __syncthreads();
      step(stage, unit);
      __syncthreads();  // this stage is overwritten next
      if constexpr (STAGES == 1) load(0, unit + 1);
    }
    device::cp_async_wait<0>();
    write();
  }

 private:
  static constexpr int kTiles = LOOP / 8, kOutTiles = OUT / 8;

  __device__ __forceinline__ T* own_x() const { return reinterpret_cast<T*>(smem_); }
  __device__ __forceinline__ T* own_y() const { return own_x() + OWN * D; }
  __device__ __forceinline__ T* loop_x(int stage) const {
    return reinterpret_cast<T*>(smem_ + 2 * OWN * D * sizeof(T) + stage * kStageBytes);
  }
  __device__ __forceinline__ T* loop_y(int stage) const { return loop_x(stage) + LOOP * D; }
  __device__ __forceinline__ float2* loop_statistics(int stage) const {
    return reinterpret_cast<float2*>(loop_y(stage) + LOOP * D);
  }

  // Tiles of the loop: from first_tile_ on, tiles_ a head.
  __device__ __forceinline__ void range() {
    int low, high;
    if constexpr (KEYS) {
      const int j_high = min(low_ + OWN, at_.k_rows);
      const auto clamped = [&](int i) { return min(max(i, 0), at_.q_rows); };
      low = p_.right < 0 ? 0 : clamped(low_ - p_.right - at_.first);
      high = low_ >= at_.k_rows ? 0 : p_.left < 0 ? at_.q_rows : clamped(j_high + p_.left - at_.first);
    } else {
      const KeyRange keys(p_, at_, low_, min(low_ + OWN, at_.q_rows));
      low = keys.low, high = keys.high;
    }
    first_tile_ = low / LOOP;
    tiles_ = low < high ? (high + LOOP - 1) / LOOP - first_tile_ : 0;
    units_ = KEYS ? tiles_ * p_.group : tiles_;
  }

  __device__ __forceinline__ int head_of(int unit) const { return KEYS ? at_.h + unit / tiles_ : at_.h; }
  __device__ __forceinline__ int low_of(int unit) const {
    return (first_tile_ + (KEYS ? unit % tiles_ : unit)) * LOOP;
  }

  template <int ROWS>
  __device__ __forceinline__ void load_queries(T* x, T* y, const Sequence& at, int low) const {
    load_tile<T, D, ROWS, kThreads>(x, at.queries<T>(p_.q), p_.q.row, low, at.q_rows, p_.head_dim);
    load_tile<T, D, ROWS, kThreads>(y, at.queries<T>(p_.dout), p_.dout.row, low, at.q_rows, p_.v_dim);
  }
  template <int ROWS>
  __device__ __forceinline__ void load_keys(T* x, T* y, int low) const {
    load_tile<T, D, ROWS, kThreads>(x, at_.keys<T>(p_.k, p_.group), p_.k.row, low, at_.k_rows, p_.head_dim);
    load_tile<T, D, ROWS, kThreads>(y, at_.keys<T>(p_.v, p_.group), p_.v.row, low, at_.k_rows, p_.v_dim);
  }

  __device__ __forceinline__ void load_own() const {
    if constexpr (KEYS) {
      load_keys<OWN>(own_x(), own_y(), low_);
    } else {
      load_queries<OWN>(own_x(), own_y(), at_, low_);
    }
  }

  // One group of copies, empty after the last unit.
  __device__ __forceinline__ void load(int stage, int unit) const {
    if (unit < units_) {
      const int low = low_of(unit);
      if constexpr (KEYS) {
        Sequence at = at_;
        at.h = head_of(unit);
        load_queries<LOOP>(loop_x(stage), loop_y(stage), at, low);
        if (threadIdx.x < LOOP) {
          const int i = low + static_cast<int>(threadIdx.x);
          const float* from = at.queries<float>(p_.statistics);
          const bool inside = i < at.q_rows;
          device::cp_async<8>(loop_statistics(stage) + threadIdx.x, inside ? from + i * p_.statistics.row : from,
                              inside ? 8 : 0);
        }
      } else {
        load_keys<LOOP>(loop_x(stage), loop_y(stage), low);
      }
    }
    device::cp_async_commit();
  }

  // Of a lane's two queries; of those beyond the last as of such that see nothing.
  __device__ __forceinline__ void read_statistics() {
    const float* from = at_.queries<float>(p_.statistics);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = low_ + row_of(2 * r);
      if (i < at_.q_rows) statistics_[r] = *reinterpret_cast<const float2*>(from + i * p_.statistics.row);
    }
  }

  __device__ __forceinline__ void step(int stage, int unit) {
    Sequence at = at_;
    at.h = head_of(unit);
    const int low = low_of(unit), i_low = KEYS ? low : low_, j_low = KEYS ? low_ : low;
    float s[kTiles][4] = {}, dp[kTiles][4] = {};
    multiply_rows<T, D, 4>(s, own_x(), loop_x(stage));
    multiply_rows<T, D, 4>(dp, own_y(), loop_y(stage));
    const float slope = RICH && p_.slopes.data ? *p_.slopes.at<float>(at.b, at.h) : 0.0f;
    const bool cut = is_cut(p_, at, i_low, KEYS ? LOOP : OWN, j_low, KEYS ? OWN : LOOP);
    const auto statistics = [&](int n, int e) {
      return KEYS ? loop_statistics(stage)[column_of(n, e)] : statistics_[e / 2];
    };
    const auto found = [&](int, int, int i, int j, float ds) {
      if constexpr (RICH && !KEYS) {
        dslope_ -= ds * fabsf(static_cast<float>(at.first + i - j));
        if (p_.dbias.data && column_ == 0 && i < at.q_rows && j < at.k_rows) write_dbias(i, j, ds);
      }
    };
    differentiate<T, KEYS, RICH>(p_, at, s, dp, i_low, j_low, slope, cut, statistics, found);
    if constexpr (KEYS) multiply_columns<T, D>(dy_, s, loop_y(stage) + column_);
    multiply_columns<T, D>(dx_, dp, loop_x(stage) + column_);
  }

  __device__ __forceinline__ void write_dbias(int i, int j, float ds) const {
    const int64_t offset = i * p_.dbias.row + j * p_.dbias.column;
    if (p_.dbias_is_float) {
      p_.dbias.to<float>(at_.b, at_.h)[offset] = ds;
    } else {
      p_.dbias.to<T>(at_.b, at_.h)[offset] = device::from_float<T>(ds);
    }
  }

  __device__ __forceinline__ void write() {
    if constexpr (KEYS) {
      const int rows = p_.k_starts ? at_.k_rows : p_.k_len;  // zeros where a cache is not filled
      write_rows(p_.dk, at_.h / p_.group, at_.k_begin, rows, dx_, p_.scale, p_.head_dim);
      write_rows(p_.dv, at_.h / p_.group, at_.k_begin, rows, dy_, 1.0f, p_.v_dim);
    } else {
      write_rows(p_.dq, at_.h, at_.q_begin, at_.q_rows, dx_, p_.scale, p_.head_dim);
      if (RICH && p_.dslopes.data && column_ == 0) write_dslope();
    }
  }

  __device__ __forceinline__ void write_rows(const Strided& t, int h, int begin, int rows,
                                             const float (&sum)[kOutTiles][4], float factor, int width) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = low_ + row_of(2 * r);
      if (row >= rows) continue;
      T* to = t.to<T>(at_.b, h) + (begin + row) * t.row + column_;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        if (column_ + column_of(n, 0) >= width) continue;
        store_two(to + column_of(n, 0), sum[n][2 * r] * factor, sum[n][2 * r + 1] * factor);
      }
    }
  }

  __device__ __forceinline__ void write_dslope() const {
    float* of_warps = reinterpret_cast<float*>(smem_);  // once all tiles have been read
    const float total = device::warp_sum(dslope_);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    float sum = 0.0f;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += of_warps[warp];
    p_.dslopes.to<float>(at_.b, at_.h)[low_ / OWN * p_.dslopes.row] = sum;
  }

  const BackwardParams& p_;
  const Sequence& at_;
  unsigned char* smem_;
  const int low_, column_;
  int first_tile_, tiles_, units_;
  float2 statistics_[2] = {{INFINITY, 0.0f}, {INFINITY, 0.0f}};
  float dslope_ = 0.0f;
  float dx_[kOutTiles][4] = {}, dy_[KEYS ? kOutTiles : 1][4] = {};
};

template <typename T, int D, int OUT, int OWN, int LOOP, int STAGES, bool KEYS, bool RICH>
__global__ void __launch_bounds__(OWN * 2, 1) attention_backward_kernel(const BackwardParams p) {
  const int64_t block = blockIdx.x / p.parts;
  const int tile = static_cast<int>(block % p.tiles), heads = KEYS ? p.heads / p.group : p.heads;
  const int h = static_cast<int>(block / p.tiles % heads);
  // What most others see, or sees most of them, under causal attention starts first: the first keys, the last queries.
  const int low = (KEYS ? tile : p.tiles - 1 - tile) * OWN;
  const Sequence at(p, static_cast<int>(block / p.tiles / heads), KEYS ? h * p.group : h);
  if (low >= (!KEYS ? at.q_rows : p.k_starts ? at.k_rows : p.k_len)) return;  // of a short sequence
  Backward<T, D, OUT, OWN, LOOP, STAGES, KEYS, RICH>(p, at, low, static_cast<int>(blockIdx.x % p.parts)).run();
}

}  // namespace transfuse::attention
