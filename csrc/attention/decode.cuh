// attention of few queries over many keys: split over keys, then combined in a fixed order. Scores as in forward.cuh.
//
//   m_s = max_j s_ij    l_s = sum_j 2^(s_ij - m_s)    o_s = sum_j D_ij 2^(s_ij - m_s) v_j    over the keys j of split s
//   m = max_s m_s, and the sink    L = sum_s l_s 2^(m_s - m) + 2^(sink - m)
//   out_i = sum_s o_s 2^(m_s - m) / L    lse_i = (m + log2 L) ln 2
//
// Rows of a tile are the queries of all heads that share one key head, r = g * q_len + i, so that a key is read once for
// its group. attention_decode_kernel: a block owns 16 rows, DV columns of the output, and one split: an equal run of the
// tiles of keys that its batch row's queries can see, by the length read here. Each of its warps goes through 16 keys of
// a tile by itself, with its own copies under way (cp.async) and its own softmax; they meet once, at the end. What bounds
// it are the bytes of the keys: 16 rows cost the tensor cores less than that, however few are used.
// attention_combine_kernel: a block owns one query row, each of its warps every fourth split.
//
// Shared memory, dynamic: q [16][D], then a warp's STAGES of k [16][D] and v [16][DV], swizzled (fragments.cuh); in the
// end the warps' o_s [16][DV + 8] fp32 in their place. 72 KB at most: three blocks share a multiprocessor of an H100.
// Saved for backward: out, lse. The launcher guarantees what forward.cuh's does; splits <= kMostSplits.
#pragma once

#include <cstdint>

#include "attention/online_softmax.cuh"
#include "attention/scores.cuh"
#include "device/reduce.h"
#include "device/shared_memory.h"

namespace transfuse::attention {

constexpr int kRows = 16, kKeys = 16;  // of a block, and of a warp's tile
constexpr int kMostSplits = 128;

struct DecodeParams : Problem {
  Strided out;    // (batch, heads, q_len, v_dim) T, columns contiguous
  Strided lse;    // (batch, heads, q_len, 1) float
  Strided sinks;  // (1, heads, 1, 1) float
  float* partial_out;                       // (splits, rows, v_dim), rows = (batch, heads, q_len); null: one split
  float *partial_highest, *partial_totals;  // (splits, rows): m_s and l_s
  int64_t rows;
  int splits, row_tiles, parts;
  bool rich;
};

// The sum over keys with its sink, from the sum relative to m: out's factor; writes lse.
__device__ __forceinline__ float finish(const DecodeParams& p, int b, int h, int i, float m, float total, bool writes) {
  float shrink = 1.0f;
  if (p.sinks.data) {  // one more key, with no value
    const float sink = *p.sinks.at<float>(0, h) * kLog2e, higher = fmaxf(m, sink);
    const float finite = higher == -INFINITY ? 0.0f : higher;
    shrink = exp2f(m - finite);
    total = total * shrink + exp2f(sink - finite);
    m = higher;
  }
  const bool nothing = total == 0.0f;
  if (writes) p.lse.to<float>(b, h)[i * p.lse.row] = nothing ? -INFINITY : (m + log2f(total)) * kLn2;
  return nothing ? 0.0f : shrink * p.grow / total;
}

// load_tile by one warp: down the rows by one pointer, where pointers known in advance would take registers each.
template <typename T, int D, int ROWS>
__device__ __forceinline__ void load_rows(T* tile, const T* rows, int64_t row_stride, int first, int end, int width,
                                          int lane) {
  constexpr int kChunks = D / kChunk<T>, kAcross = kChunks < 32 ? kChunks : 32, kDown = 32 / kAcross;
#pragma unroll
  for (int part = 0; part < kChunks / kAcross; ++part) {
    const int chunk = part * kAcross + lane % kAcross;
    const int end_of_lane = chunk * kChunk<T> < width ? end - first - lane / kAcross : 0;
    const T* from = rows + (first + lane / kAcross) * row_stride + chunk * kChunk<T>;
#pragma unroll 4
    for (int row = 0; row < ROWS; row += kDown, from += kDown * row_stride) {
      const bool inside = row < end_of_lane;
      device::cp_async<16>(chunk_at<T, D>(tile, row + lane / kAcross, chunk / 2, chunk % 2), inside ? from : rows,
                           inside ? 16 : 0);
    }
  }
}

template <typename T, int D, int DV, int WARPS, int STAGES>
class Decode {
 public:
  static constexpr int kThreads = WARPS * 32, kTile = WARPS * kKeys;
  static constexpr int kStageElements = kKeys * (D + DV);
  static constexpr int kSharedBytes = (kRows * D + WARPS * STAGES * kStageElements) * static_cast<int>(sizeof(T));

  __device__ __forceinline__ explicit Decode(const DecodeParams& p) : p_(p) {
    int64_t block = blockIdx.x;
    const auto next = [&](int count) {
      const int index = static_cast<int>(block % count);
      block /= count;
      return index;
    };
    part_ = next(p.parts);
    first_row_ = next(p.row_tiles) * kRows;
    split_ = next(p.splits);
    kv_head_ = next(p.heads / p.group);
    b_ = static_cast<int>(block);
    warp_ = static_cast<int>(threadIdx.x) / 32, lane_ = static_cast<int>(threadIdx.x) % 32;
    smem_ = reinterpret_cast<T*>(device::dynamic_shared_memory());
  }

  __device__ __forceinline__ void run() {
    const Sequence whole(p_, b_, kv_head_ * p_.group);
    const KeyRange keys(p_, whole, 0, p_.q_len);
    const int low = keys.low / kTile * kTile;
    const int run = ((keys.high - low + kTile - 1) / kTile + p_.splits - 1) / p_.splits * kTile;
    const int start = low + split_ * run;
    stop_ = min(start + run, keys.high);
    k_ = whole.keys<T>(p_.k, p_.group), v_ = whole.keys<T>(p_.v, p_.group) + part_ * DV;
    int j_low = start + warp_ * kKeys;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) load_keys(stage, j_low + stage * kTile);
    load_queries();
    __syncthreads();  // and q is there
    set_rows(whole);
    for (int stage = 0; j_low < stop_; j_low += kTile, stage = stage + 1 == STAGES ? 0 : stage + 1) {
      load_keys(stage == 0 ? STAGES - 1 : stage - 1, j_low + (STAGES - 1) * kTile);
      device::cp_async_wait<STAGES - 1>();
      __syncwarp();
      step(stage, j_low, j_low < keys.inner_low || j_low + kKeys > min(keys.inner_high, stop_));
      __syncwarp();  // the next round overwrites this stage
    }
    device::cp_async_wait<0>();
    __syncthreads();  // shared memory is free
    write();
  }

 private:
  static constexpr int kOutTiles = DV / 8, kPadded = DV + 8;  // 8 rows of accumulators fall into different banks

  __device__ __forceinline__ T* k_smem(int stage) const {
    return smem_ + kRows * D + (warp_ * STAGES + stage) * kStageElements;
  }
  __device__ __forceinline__ T* v_smem(int stage) const { return k_smem(stage) + kKeys * D; }
  __device__ __forceinline__ int rows_left() const { return p_.group * p_.q_len - first_row_; }

  // One group of copies, empty beyond the split's last key; what stands there may be NaN.
  __device__ __forceinline__ void load_keys(int stage, int j_low) const {
    if (j_low < stop_) {
      load_rows<T, D, kKeys>(k_smem(stage), k_, p_.k.row, j_low, stop_, p_.head_dim, lane_);
      load_rows<T, DV, kKeys>(v_smem(stage), v_, p_.v.row, j_low, stop_, p_.v_dim - part_ * DV, lane_);
    }
    device::cp_async_commit();
  }

  __device__ __forceinline__ void load_queries() const {
    constexpr int kChunks = D / kChunk<T>;
    for (int index = threadIdx.x; index < kRows * kChunks; index += kThreads) {
      const int row = index / kChunks, chunk = index % kChunks, r = first_row_ + row;
      uint4 bits = {0, 0, 0, 0};
      if (row < rows_left() && chunk * kChunk<T> < p_.head_dim) {
        const T* q = p_.q.at<T>(b_, kv_head_ * p_.group + r / p_.q_len) + r % p_.q_len * p_.q.row;
        bits = *reinterpret_cast<const uint4*>(q + chunk * kChunk<T>);
      }
      *reinterpret_cast<uint4*>(chunk_at<T, D>(smem_, row, chunk / 2, chunk % 2)) = bits;
    }
  }

  // What the lane's two rows are; those beyond the last repeat it and are not stored.
  __device__ __forceinline__ void set_rows(const Sequence& whole) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row_ + min(lane_ / 4 + 8 * r, rows_left() - 1);
      h_[r] = kv_head_ * p_.group + row / p_.q_len;
      i_[r] = row % p_.q_len;
      slope_[r] = p_.slopes.data ? *p_.slopes.at<float>(b_, h_[r]) : 0.0f;
    }
    first_ = whole.first;
  }

  __device__ __forceinline__ void step(int stage, int j_low, bool edge) {
    float s[kKeys / 8][4] = {};
    // S = Q K^T [16, 16]
    multiply_rows<T, D>(s, smem_, k_smem(stage), 0);
    shape(s, j_low, edge);
    float shrink[2];
    softmax_.update(s, shrink);
    if (p_.seed) drop(s, j_low);
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o_[n][e] *= shrink[e / 2];
    }
    // O += P V [16, DV]
    multiply_columns<T, DV>(o_, s, v_smem(stage));
  }

  // Dot products become scores in base 2.
  __device__ __forceinline__ void shape(float (&s)[kKeys / 8][4], int j_low, bool edge) const {
    Sequence at(p_, b_, h_[0]);
    at.k_rows = stop_, at.first = first_;
    const auto each = [&](auto change) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) change(s[n][e], e / 2, j_low + n * 8 + lane_ % 4 * 2 + e % 2);
      }
    };
    if (p_.rich) {
      each([&](float& x, int r, int j) {
        at.h = h_[r];
        x = rich_score<T>(p_, at, x, i_[r], j, slope_[r]).s;
      });
    } else {
      each([&](float& x, int, int) { x *= p_.scale * kLog2e; });
    }
    if (!edge) return;
    each([&](float& x, int r, int j) { x = in_window(p_, at, i_[r], j) ? x : -INFINITY; });
  }

  // Dropped probabilities become 0, after the total. The heads of a group draw from neighbouring rows.
  __device__ __forceinline__ void drop(float (&s)[kKeys / 8][4], int j_low) const {
    Sequence at(p_, b_, kv_head_ * p_.group);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      each_dropped(p_, at, first_row_ + lane_ / 4, j_low + n * 8 + lane_ % 4 * 2, [&](int e) { s[n][e] = 0.0f; });
    }
  }

  // The warps' shares meet in shared memory: m and l [WARPS][16] each, then o [WARPS][16][DV + 8].
  __device__ __forceinline__ void write() {
    float* const highest = reinterpret_cast<float*>(smem_);
    float* const totals = highest + WARPS * kRows;
    float* const o = totals + WARPS * kRows;
    static_assert((2 + kPadded) * WARPS * kRows * 4 <= kSharedBytes);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(softmax_.total[r]);
      const int place = warp_ * kRows + lane_ / 4 + 8 * r;
      if (lane_ % 4 == 0) highest[place] = softmax_.m[r], totals[place] = total;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        store_two(o + place * kPadded + n * 8 + lane_ % 4 * 2, o_[n][2 * r], o_[n][2 * r + 1]);
      }
    }
    __syncthreads();
    constexpr int kPacks = DV / 4;
    const int rows = min(kRows, rows_left()), columns = p_.v_dim - part_ * DV;
    for (int index = threadIdx.x; index < rows * kPacks; index += kThreads) {
      const int row = index / kPacks, column = index % kPacks * 4;
      float m = -INFINITY, total = 0.0f, sum[4] = {};
#pragma unroll
      for (int w = 0; w < WARPS; ++w) m = fmaxf(m, highest[w * kRows + row]);
      const float finite = m == -INFINITY ? 0.0f : m;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float weight = exp2f(highest[w * kRows + row] - finite);
        total += totals[w * kRows + row] * weight;
        const auto of_warp = device::load<4>(o + (w * kRows + row) * kPadded + column);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += of_warp.at[e] * weight;
      }
      write_row(first_row_ + row, column, columns, m, total, sum);
    }
  }

  __device__ __forceinline__ void write_row(int row, int column, int columns, float m, float total,
                                            const float (&sum)[4]) const {
    const int h = kv_head_ * p_.group + row / p_.q_len, i = row % p_.q_len;
    const bool states = column == 0 && part_ == 0;
    if (p_.partial_out) {
      const int64_t place = split_ * p_.rows + (int64_t(b_) * p_.heads + h) * p_.q_len + i;
      if (states) p_.partial_highest[place] = m, p_.partial_totals[place] = total;
      if (column >= columns) return;
      device::store<4>(p_.partial_out + place * p_.v_dim + part_ * DV + column,
                       device::Pack<float, 4>{{sum[0], sum[1], sum[2], sum[3]}});
      return;
    }
    const float factor = finish(p_, b_, h, i, m, total, states);
    if (column >= columns) return;
    T* out = p_.out.to<T>(b_, h) + i * p_.out.row + part_ * DV + column;
    store_two(out, sum[0] * factor, sum[1] * factor);
    store_two(out + 2, sum[2] * factor, sum[3] * factor);
  }

  const DecodeParams& p_;
  int part_, first_row_, split_, kv_head_, b_, warp_, lane_, stop_, first_;
  int h_[2], i_[2];
  float slope_[2];
  const T *k_, *v_;
  T* smem_;
  OnlineSoftmax softmax_;
  float o_[kOutTiles][4] = {};
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kBlocks = 3;  // of a multiprocessor: what its shared memory holds
#else
constexpr int kBlocks = 2;
#endif

template <typename T, int D, int DV, int WARPS, int STAGES>
__global__ void __launch_bounds__(WARPS * 32, kBlocks) attention_decode_kernel(const DecodeParams p) {
  Decode<T, D, DV, WARPS, STAGES>(p).run();
}

constexpr int kCombineWarps = 4;

template <typename T>
__global__ void __launch_bounds__(kCombineWarps * 32) attention_combine_kernel(const DecodeParams p) {
  __shared__ float weights[kMostSplits];
  __shared__ float sums[kCombineWarps][256];
  const int64_t row = blockIdx.x;
  const int i = static_cast<int>(row % p.q_len), h = static_cast<int>(row / p.q_len % p.heads);
  const int b = static_cast<int>(row / p.q_len / p.heads);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;

  // m and the sum: every warp by itself, the same.
  float m = -INFINITY, total = 0.0f;
  for (int s = lane; s < p.splits; s += 32) m = fmaxf(m, p.partial_highest[s * p.rows + row]);
  m = device::warp_max(m);
  const float finite = m == -INFINITY ? 0.0f : m;
  for (int s = lane; s < p.splits; s += 32) {
    const float weight = exp2f(p.partial_highest[s * p.rows + row] - finite);
    total += p.partial_totals[s * p.rows + row] * weight;
    if (warp == 0) weights[s] = weight;
  }
  total = device::warp_sum(total);
  __syncthreads();

  for (int column = lane * 4; column < p.v_dim; column += 128) {
    float sum[4] = {};
#pragma unroll 4
    for (int s = warp; s < p.splits; s += kCombineWarps) {
      const auto of_split = device::load<4>(p.partial_out + (s * p.rows + row) * p.v_dim + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += of_split.at[e] * weights[s];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[warp][column + e] = sum[e];
  }
  __syncthreads();
  const float factor = finish(p, b, h, i, m, total, thread == 0);
  for (int column = thread; column < p.v_dim; column += kCombineWarps * 32) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w) sum += sums[w][column];
    p.out.to<T>(b, h)[i * p.out.row + column] = device::from_float<T>(sum * factor);
  }
}

}  // namespace transfuse::attention
