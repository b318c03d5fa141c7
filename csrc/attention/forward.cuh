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

#include "attention/fragments.cuh"
#include "device/philox.h"
#include "device/shared_memory.h"

namespace transfuse::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.4028234663852886e38f;

// A (batch, heads, rows, columns) tensor; strides in elements, 0 where it is broadcast. data is null where it is absent.
struct Strided {
  const void* data;
  int64_t batch, head, row, column;

  template <typename T>
  __device__ __forceinline__ const T* at(int b, int h) const {
    return static_cast<const T*>(data) + b * batch + h * head;
  }
};

struct ForwardParams {
  Strided q, k, v;  // (batch, heads | kv_heads, q_len | k_len, head_dim | v_dim) T, columns contiguous
  Strided out;      // (batch, heads, q_len, v_dim) T, columns contiguous
  Strided lse;      // (batch, heads, q_len, 1) float
  Strided mask;     // (batch|1, heads|1, q_len|1, k_len|1) bool
  Strided bias;     // the same, T or float
  Strided slopes;   // (batch|1, heads, 1, 1) float
  Strided sinks;    // (1, heads, 1, 1) float
  const int32_t *q_starts, *k_starts;  // (batch + 1) where rows are packed, else null
  const int32_t* k_lengths;            // (batch) where rows of a cache are filled unevenly, else null
  const int64_t* seed;                 // (2), null without dropout
  int heads, group, tiles, parts, q_len, k_len, head_dim, v_dim;
  int left, right, first;  // -1 where a window has no side
  bool lower_right, bias_is_float;
  float scale, softcap;  // 0: none
  uint64_t threshold;    // dropout_p * 2^32
  float grow;            // 1 / (1 - dropout_p)
};

// One block's queries among their sequence.
struct Place {
  int b, h, i_low, part;  // part: of the output's columns
  int q_begin, q_rows, k_begin, k_rows, first;

  __device__ __forceinline__ Place(const ForwardParams& p, int block_m) {
    const int64_t block = blockIdx.x / p.parts;
    part = static_cast<int>(blockIdx.x % p.parts);
    i_low = (p.tiles - 1 - static_cast<int>(block % p.tiles)) * block_m;  // the last queries see most: they start first
    h = static_cast<int>(block / p.tiles % p.heads);
    b = static_cast<int>(block / p.tiles / p.heads);
    q_begin = p.q_starts ? p.q_starts[b] : 0;
    q_rows = p.q_starts ? p.q_starts[b + 1] - q_begin : p.q_len;
    k_begin = p.k_starts ? p.k_starts[b] : 0;
    k_rows = p.k_starts ? p.k_starts[b + 1] - k_begin : p.k_lengths ? p.k_lengths[b] : p.k_len;
    first = p.lower_right ? k_rows - q_rows : p.first;
  }
};

// Which keys queries [i_low, i_high) see: none outside [low, high), all inside [inner_low, inner_high).
struct KeyRange {
  int low, high, inner_low, inner_high;

  __device__ __forceinline__ KeyRange(const ForwardParams& p, const Place& at, int i_high) {
    const auto clamped = [&](int j) { return min(max(j, 0), at.k_rows); };
    low = p.left < 0 ? 0 : clamped(at.first + at.i_low - p.left);
    high = p.right < 0 ? at.k_rows : clamped(at.first + i_high + p.right);
    inner_low = p.left < 0 ? 0 : clamped(at.first + i_high - 1 - p.left);
    inner_high = p.right < 0 ? at.k_rows : clamped(at.first + at.i_low + p.right + 1);
  }
};

// A score in base 2, with all that may be added to it; i and j count in the sequence.
template <typename T>
__device__ __forceinline__ float rich_score(const ForwardParams& p, const Place& at, float dot, int i, int j,
                                            float slope) {
  if (j >= at.k_rows) return -INFINITY;
  i = min(i, at.q_rows - 1);  // a row beyond the last is never stored
  if (p.mask.data && !p.mask.at<bool>(at.b, at.h)[i * p.mask.row + j * p.mask.column]) return -INFINITY;
  float x = dot * p.scale;
  if (p.softcap > 0.0f) x = p.softcap * tanhf(x / p.softcap);
  if (p.bias.data) {
    const int64_t offset = i * p.bias.row + j * p.bias.column;
    x += p.bias_is_float ? p.bias.at<float>(at.b, at.h)[offset] : device::to_float(p.bias.at<T>(at.b, at.h)[offset]);
  }
  x -= slope * fabsf(static_cast<float>(at.first + i - j));
  const float s = x * kLog2e;
  return s < kLowest && x >= kLowest ? kLowest : s;  // finfo.min is a number and not -inf
}

__device__ __forceinline__ bool in_window(const ForwardParams& p, const Place& at, int i, int j) {
  return j < at.k_rows && (p.left < 0 || j >= at.first + i - p.left) && (p.right < 0 || j <= at.first + i + p.right);
}

// Over the four lanes that share a row of accumulators.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The running softmax of a lane's two rows (g and g + 8 of its warp's 16) over the keys so far. `total` is this lane's
// share until `finish`.
struct OnlineSoftmax {
  float m[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  // Raises m to cover `next`; gives what everything summed so far shrinks by, and the finite stand-in for m: a row that
  // has seen nothing has m = -inf, and -inf - -inf would be NaN.
  __device__ __forceinline__ void raise(int r, float next, float& shrink, float& finite) {
    next = fmaxf(m[r], next);
    finite = next == -INFINITY ? 0.0f : next;
    shrink = exp2f(m[r] - finite);
    m[r] = next;
    total[r] *= shrink;
  }

  // s becomes p = 2^(s - m).
  template <int TILES>
  __device__ __forceinline__ void update(float (&s)[TILES][4], float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = -INFINITY, finite;
#pragma unroll
      for (int n = 0; n < TILES; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      raise(r, quad_max(highest), shrink[r], finite);
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[n][e] = exp2f(s[n][e] - finite);
          total[r] += s[n][e];
        }
      }
    }
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
    const KeyRange keys(p_, at_, min(at_.i_low + BLOCK_M, at_.q_rows));
    const T* q = p_.q.at<T>(at_.b, at_.h) + at_.q_begin * p_.q.row;
    load_tile<T, D, BLOCK_M, kThreads>(q_smem_, q, p_.q.row, at_.i_low, at_.q_rows, p_.head_dim);
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
  static constexpr int kDotSteps = D / kStep<T>, kKeySteps = BLOCK_N / kStep<T>;

  __device__ __forceinline__ T* k_smem(int stage) const { return q_smem_ + BLOCK_M * D + stage * BLOCK_N * (D + DV); }
  __device__ __forceinline__ T* v_smem(int stage) const { return k_smem(stage) + BLOCK_N * D; }
  __device__ __forceinline__ static int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }
  // Row and column in the tile of element e of accumulator n.
  __device__ __forceinline__ static int row_of(int e) {
    return warp_row() + static_cast<int>(threadIdx.x) % 32 / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ static int column_of(int n, int e) {
    return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2;
  }

  // One group of copies, empty beyond the last key that is seen.
  __device__ __forceinline__ void load_keys(int stage, int j_low, int high) const {
    if (j_low < high) {
      const int h = at_.h / p_.group;
      const T* k = p_.k.at<T>(at_.b, h) + at_.k_begin * p_.k.row;
      const T* v = p_.v.at<T>(at_.b, h) + at_.k_begin * p_.v.row + at_.part * DV;
      load_tile<T, D, BLOCK_N, kThreads>(k_smem(stage), k, p_.k.row, j_low, at_.k_rows, p_.head_dim);
      load_tile<T, DV, BLOCK_N, kThreads>(v_smem(stage), v, p_.v.row, j_low, at_.k_rows, p_.v_dim - at_.part * DV);
    }
    device::cp_async_commit();
  }

  __device__ __forceinline__ void step(int stage, int j_low, bool edge) {
    float s[kKeyTiles][4] = {};
    // S = Q K^T [16, BLOCK_N]
#pragma unroll kDotSteps <= 16 ? kDotSteps : 8
    for (int d = 0; d < kDotSteps; ++d) {
      uint32_t a[4];
      load_a<T, D>(a, q_smem_, warp_row(), d);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[2][2];
        load_b_transposed<T, D>(b, k_smem(stage), n * 8, d);
        multiply<T>(s[n], a, b[0]);
        multiply<T>(s[n + 1], a, b[1]);
      }
    }
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
#pragma unroll
    for (int j = 0; j < kKeySteps; ++j) {
      uint32_t a[4];
      to_a<T>(a, s, j);
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        uint32_t b[2][2];
        load_b<T, DV>(b, v_smem(stage), j, n * 8);
        multiply<T>(o_[n], a, b[0]);
        multiply<T>(o_[n + 1], a, b[1]);
      }
    }
  }

  // Dot products become scores in base 2.
  __device__ __forceinline__ void shape(float (&s)[kKeyTiles][4], int j_low, bool edge) const {
    const float to_base2 = p_.scale * kLog2e;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = at_.i_low + row_of(e), j = j_low + column_of(n, e);
        s[n][e] = RICH ? rich_score<T>(p_, at_, s[n][e], i, j, slope_) : s[n][e] * to_base2;
        if (edge && !in_window(p_, at_, i, j)) s[n][e] = -INFINITY;
      }
    }
  }

  // Dropped probabilities become 0, after the total. A lane has two of the four keys that one draw decides.
  __device__ __forceinline__ void drop(float (&p)[kKeyTiles][4], int j_low) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = (int64_t(at_.b) * p_.heads + at_.h) * p_.q_len + at_.i_low + row_of(2 * r);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const int j = j_low + column_of(n, 0);
        const device::Words words = device::dropout_words(p_.seed, row, j / 4);
        const bool upper = j % 4 == 2;
        if ((upper ? words.at[2] : words.at[0]) < p_.threshold) p[n][2 * r] = 0.0f;
        if ((upper ? words.at[3] : words.at[1]) < p_.threshold) p[n][2 * r + 1] = 0.0f;
      }
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
        float* lse = const_cast<float*>(p_.lse.at<float>(at_.b, at_.h));
        lse[(at_.q_begin + i) * p_.lse.row] = nothing ? -INFINITY : (m + log2f(total)) * kLn2;
      }
      T* out = const_cast<T*>(p_.out.at<T>(at_.b, at_.h)) + (at_.q_begin + i) * p_.out.row + at_.part * DV;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        if (at_.part * DV + column_of(n, 0) >= p_.v_dim) continue;
        struct alignas(2 * sizeof(T)) Both {
          device::Pack<T, 1> at[2];
        };
        const Both both{{{{device::from_float<T>(o_[n][2 * r] * factor)}},
                         {{device::from_float<T>(o_[n][2 * r + 1] * factor)}}}};
        *reinterpret_cast<Both*>(out + column_of(n, 0)) = both;
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
__global__ void __launch_bounds__(BLOCK_M * 2) attention_forward_kernel(const ForwardParams p) {
  const Place at(p, BLOCK_M);
  if (at.i_low >= at.q_rows) return;  // of a short sequence
  Forward<T, D, DV, BLOCK_M, BLOCK_N, RICH>(p, at).run();
}

}  // namespace transfuse::attention
