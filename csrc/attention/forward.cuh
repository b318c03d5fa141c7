// attention forward:  s_ij = softcap(scale * q_i.k_j) + bias_ij - slope |p_i - j|,  -inf where hidden,  p_i = first + i
//                     out_i = sum_j D_ij exp(s_ij - lse_i) v_j,   lse_i = log(sum_j exp(s_ij) + exp(sink))
//
// One block owns BLOCK_M queries of one head, each of its warps 16 of them; it goes through their keys BLOCK_N at a time
// with the online softmax of FlashAttention-2 (Dao 2023), scores in base 2. Only tiles that the window, the diagonal or
// the last key cut compare indices. Tiles that no query of the block sees are not read.
//
//   S = Q K^T   [16 x BLOCK_N] a warp, in registers: BLOCK_N / 8 accumulators of 16 x 8
//   O += P V    [16 x DV]      a warp, in registers; P goes from S's accumulators straight into A fragments
//
// A block writes DV columns of its rows: all of them, but for wide fp32, whose O would spill; blocks then share the rows,
// each computing S again.
// Shared memory, dynamic: q [BLOCK_M][D], then two stages of k [BLOCK_N][D] and v [BLOCK_N][DV], swizzled
// (fragments.cuh); while one stage is multiplied, cp.async fills the other.
//
// RICH adds what reads or changes single scores: mask, bias, ALiBi, soft capping, sinks, dropout. As a run-time choice it
// would cost the plain kernel the registers of all of them.
// Saved for backward: out, lse (fp32).
// The launcher guarantees: q, k, v 16-byte aligned in every row, their widths multiples of 16 bytes, q's and k's at most D, out's
// rows aligned likewise; heads a multiple of the key heads; row numbers within 32 bits.
#pragma once

#include <cstdint>

#include "attention/online_softmax.cuh"
#include "attention/scores.cuh"
#include "device/shared_memory.h"

namespace transfuse::attention {

struct ForwardParams : Problem {
  Strided out;    // (batch, heads, q_len, v_dim) T, columns contiguous
  Strided lse;    // (batch, heads, q_len, 1) float
  Strided sinks;  // (1, heads, 1, 1) float
  int tiles, parts;
};

// One block's queries among their sequence.
struct Place : Sequence {
  int i_low, part;  // part: of the output's columns

  __device__ __forceinline__ Place(const ForwardParams& p, int64_t block, int block_m)
      : Sequence(p, static_cast<int>(block / p.tiles / p.heads), static_cast<int>(block / p.tiles % p.heads)) {
    i_low = (p.tiles - 1 - static_cast<int>(block % p.tiles)) * block_m;  // the last queries see most: they start first
    part = static_cast<int>(blockIdx.x % p.parts);
  }
};

template <typename T, int D, int DV, int BLOCK_M, int BLOCK_N, bool RICH>
class Forward {
 public:
  static constexpr int kThreads = BLOCK_M * 2;
  static constexpr int kSharedBytes = (BLOCK_M * D + 2 * BLOCK_N * (D + DV)) * static_cast<int>(sizeof(T));

  __device__ __forceinline__ Forward(const ForwardParams& p, const Place& at) : p_(p), at_(at) {
    q_smem_ = reinterpret_cast<T*>(device::dynamic_shared_memory());
    if (RICH && p.slopes.data) slope_ = *p.slopes.at<float>(at.b, at.h);
  }

  __device__ __forceinline__ void run() {
    const KeyRange keys(p_, at_, at_.i_low, min(at_.i_low + BLOCK_M, at_.q_rows));
    load_tile<T, D, BLOCK_M, kThreads>(q_smem_, at_.queries<T>(p_.q), p_.q.row, at_.i_low, at_.q_rows, p_.head_dim);
    int j_low = keys.low / BLOCK_N * BLOCK_N;
    load_keys(0, j_low, keys.high);
    for (int stage = 0; j_low < keys.high; j_low += BLOCK_N, stage ^= 1) {
      load_keys(stage ^ 1, j_low + BLOCK_N, keys.high);
      device::cp_async_wait<1>();  // all but the stage that was just started
      __syncthreads();
      const bool edge = j_low < keys.inner_low || j_low + BLOCK_N > keys.inner_high;
      step(stage, j_low, edge);
      __syncthreads();  // the next round overwrites this stage
    }
    device::cp_async_wait<0>();
    write();
  }

 private:
  static constexpr int kKeyTiles = BLOCK_N / 8, kOutTiles = DV / 8;

  __device__ __forceinline__ T* k_smem(int stage) const { return q_smem_ + BLOCK_M * D + stage * BLOCK_N * (D + DV); }
  __device__ __forceinline__ T* v_smem(int stage) const { return k_smem(stage) + BLOCK_N * D; }

  // One group of copies, empty beyond the last key that is seen.
  __device__ __forceinline__ void load_keys(int stage, int j_low, int high) const {
    if (j_low < high) {
      const T* k = at_.keys<T>(p_.k, p_.group);
      const T* v = at_.keys<T>(p_.v, p_.group) + at_.part * DV;
      load_tile<T, D, BLOCK_N, kThreads>(k_smem(stage), k, p_.k.row, j_low, at_.k_rows, p_.head_dim);
      load_tile<T, DV, BLOCK_N, kThreads>(v_smem(stage), v, p_.v.row, j_low, at_.k_rows, p_.v_dim - at_.part * DV);
    }
    device::cp_async_commit();
  }

  __device__ __forceinline__ void step(int stage, int j_low, bool edge) {
    float s[kKeyTiles][4] = {};
    // S = Q K^T [16, BLOCK_N]
    multiply_rows<T, D>(s, q_smem_, k_smem(stage));
    shape(s, j_low, edge);
    float shrink[2];
    softmax_.update(s, shrink);
    if (RICH && p_.seed) drop(s, j_low);
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o_[n][e] *= shrink[e / 2];
    }
    // O += P V [16, DV]
    multiply_columns<T, DV>(o_, s, v_smem(stage));
  }

  // Dot products become scores in base 2.
  __device__ __forceinline__ void shape(float (&s)[kKeyTiles][4], int j_low, bool edge) const {
    const float to_base2 = p_.scale * kLog2e;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = at_.i_low + row_of(e), j = j_low + column_of(n, e);
        s[n][e] = RICH ? rich_score<T>(p_, at_, s[n][e], i, j, slope_).s : s[n][e] * to_base2;
        if (edge && !in_window(p_, at_, i, j)) s[n][e] = -INFINITY;
      }
    }
  }

  // Dropped probabilities become 0, after the total.
  __device__ __forceinline__ void drop(float (&p)[kKeyTiles][4], int j_low) const {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      each_dropped(p_, at_, at_.i_low + row_of(0), j_low + column_of(n, 0), [&](int e) { p[n][e] = 0.0f; });
    }
  }

  __device__ __forceinline__ void write() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = quad_sum(softmax_.total[r]), m = softmax_.m[r], shrink = 1.0f;
      if (RICH && p_.sinks.data) {  // one more key, with no value
        const float sink = *p_.sinks.at<float>(at_.b, at_.h) * kLog2e;
        softmax_.total[r] = total;
        float finite;
        softmax_.raise(r, sink, shrink, finite);
        total = softmax_.total[r] + exp2f(sink - finite);
        m = softmax_.m[r];
      }
      const bool nothing = total == 0.0f;
      const float factor = nothing ? 0.0f : shrink * p_.grow / total;
      const int i = at_.i_low + row_of(2 * r);
      if (i >= at_.q_rows) continue;
      if (threadIdx.x % 4 == 0 && at_.part == 0) {
        p_.lse.to<float>(at_.b, at_.h)[(at_.q_begin + i) * p_.lse.row] = nothing ? -INFINITY : (m + log2f(total)) * kLn2;
      }
      T* out = p_.out.to<T>(at_.b, at_.h) + (at_.q_begin + i) * p_.out.row + at_.part * DV;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        if (at_.part * DV + column_of(n, 0) >= p_.v_dim) continue;
        store_two(out + column_of(n, 0), o_[n][2 * r] * factor, o_[n][2 * r + 1] * factor);
      }
    }
  }

  const ForwardParams& p_;
  const Place& at_;
  T* q_smem_;
  float slope_ = 0.0f;
  OnlineSoftmax softmax_;
  float o_[kOutTiles][4] = {};
};

template <typename T, int D, int DV, int BLOCK_M, int BLOCK_N, bool RICH>
__global__ void __launch_bounds__(BLOCK_M * 2, 1) attention_forward_kernel(const ForwardParams p) {
  const Place at(p, blockIdx.x / p.parts, BLOCK_M);
  if (at.i_low >= at.q_rows) return;  // of a short sequence
  Forward<T, D, DV, BLOCK_M, BLOCK_N, RICH>(p, at).run();
}

}  // namespace transfuse::attention
