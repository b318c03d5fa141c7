// causal_softmax forward:   s = scale * scores + bias  where key j <= i + diagonal and mask, else -inf
//                           out = exp(s - max s) / sum exp(s - max s), and 0 in a row that sees nothing
// causal_softmax backward:  r = sum_j out dout,  dlogits = out (dout - r),  dscores = scale * dlogits,
//                           dbias = the sum of dlogits over the rows that share a row of bias
//
// One read of every input, one write of every output, 16 bytes at a time. Keys past the diagonal are neither read (but
// for the rest of a pack) nor computed; 0 is written there. A thread holds E elements of a row in packs of VEC
// neighbours, the i-th at (i * blockDim.x + threadIdx.x) * VEC; E = 32 forward, 16 backward (half where VEC = 1).
//   *_row    N <= min(8192, 512 E). blockDim = (32 * warps a row, rows a block): N <= 32 E one warp a row, 4 rows a
//            block, no barrier; beyond, one block a row, ceil(N / 32 E) warps.
//   *_loop   any N. One block of 512 threads a row: a running maximum and sum (or r) without a barrier, then the row a
//            second time, from the L2 cache.
// Backward numbers rows as (group, member): a group is a row of bias, its members the rows that share it. A row of
// threads takes a group and a chunk of its members, in order, and sums dlogits in fp32 (the loop kernel in `sums`
// itself, each thread its own columns): no atomics, the same bits every time. Without a bias a group has one member.
//
// The exponential is 2^((s - max) log2 e): s log2 e would turn a bias of finfo.min into -inf. A NaN that is seen makes
// the sum NaN; fmaxf loses it. Shared memory: 384 bytes at most, static. Saved for backward: out.
// The launcher guarantees: VEC = 16 bytes of T only if the rows of scores (dout, out) and of every output are packed
// and VEC divides N, 1 otherwise; outputs have contiguous keys and overlap nothing. Any strides of inputs, any N.
#pragma once

#include "causal_softmax/rows.cuh"
#include "device/reduce.h"

namespace transfuse::causal_softmax {

constexpr int kLoopThreads = 512;
constexpr float kLog2E = 1.4426950408889634f;

// Elements of a thread, by what its registers hold without spilling: 255 in a block of 256 threads, 128 in one of 512.
// Backward holds two tensors and the sum over members; single elements cost an address each.
template <int VEC>
constexpr int kForwardElements = VEC == 1 ? 16 : 32;
template <int VEC>
constexpr int kBackwardElements = VEC == 1 ? 8 : 16;
constexpr int kForwardLoopElements = 16;
constexpr int kBackwardLoopElements = 8;

// Longest row of the row kernels.
template <int ELEMENTS>
constexpr int kMaxColumns = ELEMENTS * 512 < 8192 ? ELEMENTS * 512 : 8192;
template <int ELEMENTS>
constexpr int kRowThreads = kMaxColumns<ELEMENTS> / ELEMENTS;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// e^(s - most), and 0 for s = -inf whatever the maximum: -inf - -inf would be NaN.
__device__ __forceinline__ float exp_below(float s, float most) {
  return exp2f((s - (most == negative_infinity() ? 0.0f : most)) * kLog2E);
}

// 1 / total, and 0 for a row that sees nothing.
__device__ __forceinline__ float inverse(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// --- forward ---------------------------------------------------------------------------------------------------------

enum ForwardTensor { kScores, kMask, kBias, kOut, kForwardTensors };

struct ForwardParams {
  Rows tensors[kForwardTensors];  // (rows..., N): T, uint8, B, T; mask and bias may be absent
  Grid grid;
  int64_t M;  // rows
  float scale;
};

using ForwardStarts = Starts<kForwardTensors>;

// ELEMENTS of one row in one thread's registers, from column `begin` of the row on.
template <typename T, typename B, int VEC, int ELEMENTS>
class LogitTile {
 public:
  __device__ __forceinline__ LogitTile(const ForwardParams& p, const ForwardStarts& starts, int64_t begin)
      : p_(p),
        starts_(starts),
        begin_(begin),
        columns_(static_cast<int>(min(p.grid.N - begin, int64_t(ELEMENTS) * blockDim.x))),
        seen_(static_cast<int>(max(min(visible_keys(p.grid, starts.query) - begin, int64_t(columns_)), int64_t(0)))) {}

  // The logits, -inf where hidden. The loads of scores all precede their first use, to be in flight together.
  __device__ __forceinline__ void read() {
    device::Pack<T, VEC> x_reg[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (column(i) < seen_) {
        x_reg[i] = read_keys<T, VEC>(p_.tensors[kScores], starts_.at[kScores], begin_ + column(i));
      }
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) reg_[i][j] = negative_infinity();
      if (column(i) < seen_) to_logits(i, x_reg[i]);
    }
  }

  __device__ __forceinline__ float most() const {
    float most = negative_infinity();
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) most = fmaxf(most, reg_[i][j]);
    }
    return most;
  }

  // Logits become e^(s - most); gives this thread's part of their sum.
  __device__ __forceinline__ float exponentials(float most) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        reg_[i][j] = exp_below(reg_[i][j], most);
        total += reg_[i][j];
      }
    }
    return total;
  }

  // out = exponential * factor; 0 where hidden by the diagonal, in a row that a NaN spoils too.
  __device__ __forceinline__ void write(float factor) const {
    T* out = static_cast<T*>(p_.tensors[kOut].data) + starts_.at[kOut] + begin_;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      device::Pack<T, VEC> pack;
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        pack.at[j] = device::from_float<T>(column(i) + j < seen_ ? reg_[i][j] * factor : 0.0f);
      }
      if (column(i) < columns_) device::store<VEC>(out + column(i), pack);
    }
  }

 private:
  static constexpr int kPacks = ELEMENTS / VEC;

  // Counted from `begin`, in 32 bits: 64-bit columns would cost a register an address.
  __device__ __forceinline__ int column(int pack) const {
    return (pack * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * VEC;
  }

  __device__ __forceinline__ void to_logits(int i, const device::Pack<T, VEC>& x) {
    float s[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) s[j] = device::to_float(x.at[j]) * p_.scale;
    if (p_.tensors[kBias].data) {
      const auto bias = read_broadcast_keys<B, VEC>(p_.tensors[kBias], starts_.at[kBias], begin_ + column(i));
#pragma unroll
      for (int j = 0; j < VEC; ++j) s[j] += device::to_float(bias.at[j]);
    }
    unsigned seen = ~0u;  // a bit an element
    if (p_.tensors[kMask].data) {
      const auto mask = read_broadcast_keys<uint8_t, VEC>(p_.tensors[kMask], starts_.at[kMask], begin_ + column(i));
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        if (!mask.at[j]) seen &= ~(1u << j);
      }
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      if (column(i) + j < seen_ && (seen >> j & 1u)) reg_[i][j] = s[j];
    }
  }

  const ForwardParams& p_;
  const ForwardStarts& starts_;
  const int64_t begin_;
  const int columns_, seen_;  // of this tile: those in the row, and those before the diagonal
  float reg_[kPacks][VEC];
};

template <typename T, typename B, int VEC>
__global__ void __launch_bounds__(kRowThreads<kForwardElements<VEC>>)
    causal_softmax_forward_row(const ForwardParams p) {
  __shared__ float most_smem[device::kWarp], total_smem[device::kWarp];

  for (int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; m < p.M; m += int64_t(gridDim.x) * blockDim.y) {
    const ForwardStarts starts(p.grid, p.tensors, m, 0, p.grid.dims);
    LogitTile<T, B, VEC, kForwardElements<VEC>> tile(p, starts, 0);
    tile.read();
    const float most = device::row_max(tile.most(), most_smem);
    const float total = device::row_sum(tile.exponentials(most), total_smem);
    tile.write(inverse(total));
  }
}

template <typename T, typename B, int VEC>
__global__ void __launch_bounds__(kLoopThreads, 1) causal_softmax_forward_loop(const ForwardParams p) {
  using Tile = LogitTile<T, B, VEC, kForwardLoopElements>;
  constexpr int64_t kStep = int64_t(kLoopThreads) * kForwardLoopElements;
  __shared__ float most_smem[device::kWarp], total_smem[device::kWarp];

  for (int64_t m = blockIdx.x; m < p.M; m += gridDim.x) {
    const ForwardStarts starts(p.grid, p.tensors, m, 0, p.grid.dims);
    const int64_t seen = visible_keys(p.grid, starts.query);
    float thread_most = negative_infinity(), thread_total = 0.0f;
    for (int64_t begin = 0; begin < seen; begin += kStep) {
      Tile tile(p, starts, begin);
      tile.read();
      const float higher = fmaxf(thread_most, tile.most());
      thread_total = thread_total * exp_below(thread_most, higher) + tile.exponentials(higher);
      thread_most = higher;
    }
    const float most = device::row_max(thread_most, most_smem);
    const float factor = inverse(device::row_sum(thread_total * exp_below(thread_most, most), total_smem));

    for (int64_t begin = 0; begin < p.grid.N; begin += kStep) {
      Tile tile(p, starts, begin);
      tile.read();
      tile.exponentials(most);
      tile.write(factor);
    }
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

enum BackwardTensor { kDout, kProbabilities, kDscores, kBackwardTensors };

struct BackwardParams {
  Rows tensors[kBackwardTensors];  // (groups..., members..., N) T
  void* sums;                      // (chunks, groups, N) D, or (chunks, groups) with sum_keys; null without a bias
  bool sum_keys;                   // bias is broadcast over the keys
  Grid grid;       // dimensions of groups, then of members
  int group_dims;
  int64_t groups, members, members_a_chunk, chunks;
  float scale;
};

using BackwardStarts = Starts<kBackwardTensors>;

// ELEMENTS of one row in one thread's registers, from column `begin` of the row on.
template <typename T, int VEC, int ELEMENTS>
class GradientTile {
 public:
  static constexpr int kPacks = ELEMENTS / VEC;

  __device__ __forceinline__ GradientTile(const BackwardParams& p, const BackwardStarts& starts, int64_t begin)
      : p_(p),
        starts_(starts),
        begin_(begin),
        columns_(static_cast<int>(min(p.grid.N - begin, int64_t(ELEMENTS) * blockDim.x))),
        seen_(static_cast<int>(max(min(visible_keys(p.grid, starts.query) - begin, int64_t(columns_)), int64_t(0)))) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (column(i) < seen_) {
        p_reg_[i] = read_keys<T, VEC>(p.tensors[kProbabilities], starts.at[kProbabilities], begin + column(i));
        g_reg_[i] = read_keys<T, VEC>(p.tensors[kDout], starts.at[kDout], begin + column(i));
      }
    }
  }

  // This thread's part of r.
  __device__ __forceinline__ float along() const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        if (column(i) + j < seen_) total += device::to_float(p_reg_[i].at[j]) * device::to_float(g_reg_[i].at[j]);
      }
    }
    return total;
  }

  __device__ __forceinline__ float dlogit(int i, int j, float r) const {
    if (column(i) + j >= seen_) return 0.0f;
    return device::to_float(p_reg_[i].at[j]) * (device::to_float(g_reg_[i].at[j]) - r);
  }

  // This thread's part of the sum of dlogits over the keys.
  __device__ __forceinline__ float sum(float r) const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) total += dlogit(i, j, r);
    }
    return total;
  }

  __device__ __forceinline__ void write(float r) const {
    T* dscores = static_cast<T*>(p_.tensors[kDscores].data) + starts_.at[kDscores] + begin_;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      device::Pack<T, VEC> pack;
#pragma unroll
      for (int j = 0; j < VEC; ++j) pack.at[j] = device::from_float<T>(p_.scale * dlogit(i, j, r));
      if (column(i) < columns_) device::store<VEC>(dscores + column(i), pack);
    }
  }

  __device__ __forceinline__ int column(int pack) const {
    return (pack * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * VEC;
  }

  __device__ __forceinline__ bool inside(int pack) const { return column(pack) < columns_; }

 private:
  const BackwardParams& p_;
  const BackwardStarts& starts_;
  const int64_t begin_;
  const int columns_, seen_;
  device::Pack<T, VEC> p_reg_[kPacks], g_reg_[kPacks];  // out and dout
};

// Row w of `sums` from a thread's columns of it.
template <typename D, int VEC, int PACKS>
__device__ __forceinline__ void write_sums(const BackwardParams& p, int64_t w, const float (&sums_reg)[PACKS][VEC],
                                           float* smem) {
  D* sums = static_cast<D*>(p.sums);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < PACKS; ++i) {
    const int column = (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * VEC;
    device::Pack<D, VEC> pack;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      total += sums_reg[i][j];  // 0 outside the row
      pack.at[j] = device::from_float<D>(sums_reg[i][j]);
    }
    if (!p.sum_keys && column < p.grid.N) device::store<VEC>(sums + w * p.grid.N + column, pack);
  }
  if (p.sum_keys) {
    total = device::row_sum(total, smem);
    if (threadIdx.x == 0) sums[w] = device::from_float<D>(total);
  }
}

template <typename T, typename D, int VEC>
__global__ void __launch_bounds__(kRowThreads<kBackwardElements<VEC>>)
    causal_softmax_backward_row(const BackwardParams p) {
  using Tile = GradientTile<T, VEC, kBackwardElements<VEC>>;
  __shared__ float along_smem[2][device::kWarp], keys_smem[device::kWarp];
  int turn = 0;  // of the two buffers: the barrier of one reduction protects the other's

  const int64_t rows = p.chunks * p.groups;  // of sums
  for (int64_t w = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; w < rows; w += int64_t(gridDim.x) * blockDim.y) {
    int64_t chunk = w;
    const int64_t group = take_last(chunk, p.groups);
    const BackwardStarts group_starts(p.grid, p.tensors, group, 0, p.group_dims);
    float sums_reg[Tile::kPacks][VEC] = {};
    const int64_t first = chunk * p.members_a_chunk, last = min(first + p.members_a_chunk, p.members);
    for (int64_t member = first; member < last; ++member) {
      BackwardStarts starts(p.grid, p.tensors, member, p.group_dims, p.grid.dims);
      starts += group_starts;
      const Tile tile(p, starts, 0);
      const float r = device::row_sum(tile.along(), along_smem[turn ^= 1]);
      tile.write(r);
#pragma unroll
      for (int i = 0; i < Tile::kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sums_reg[i][j] += tile.dlogit(i, j, r);
      }
    }
    if (p.sums) write_sums<D, VEC>(p, w, sums_reg, keys_smem);
  }
}

// sums = dlogits of the first member in this chunk, sums + dlogits of the others. A thread meets its own columns alone.
template <typename D, int VEC, typename Tile>
__device__ __forceinline__ void add_to_sums(const Tile& tile, D* sums, float r, bool first) {
#pragma unroll
  for (int i = 0; i < Tile::kPacks; ++i) {
    if (!tile.inside(i)) continue;
    device::Pack<D, VEC> pack;
    if (!first) pack = device::load<VEC>(sums + tile.column(i));
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float before = first ? 0.0f : device::to_float(pack.at[j]);
      pack.at[j] = device::from_float<D>(before + tile.dlogit(i, j, r));
    }
    device::store<VEC>(sums + tile.column(i), pack);
  }
}

template <typename T, typename D, int VEC>
__global__ void __launch_bounds__(kLoopThreads, 1) causal_softmax_backward_loop(const BackwardParams p) {
  using Tile = GradientTile<T, VEC, kBackwardLoopElements>;
  constexpr int64_t kStep = int64_t(kLoopThreads) * kBackwardLoopElements;
  __shared__ float along_smem[2][device::kWarp], keys_smem[device::kWarp];
  int turn = 0;

  for (int64_t w = blockIdx.x; w < p.chunks * p.groups; w += gridDim.x) {
    int64_t chunk = w;
    const int64_t group = take_last(chunk, p.groups);
    const BackwardStarts group_starts(p.grid, p.tensors, group, 0, p.group_dims);
    float keys_total = 0.0f;
    const int64_t first = chunk * p.members_a_chunk, last = min(first + p.members_a_chunk, p.members);
    for (int64_t member = first; member < last; ++member) {
      BackwardStarts starts(p.grid, p.tensors, member, p.group_dims, p.grid.dims);
      starts += group_starts;
      const int64_t seen = visible_keys(p.grid, starts.query);
      float along = 0.0f;
      for (int64_t begin = 0; begin < seen; begin += kStep) along += Tile(p, starts, begin).along();
      const float r = device::row_sum(along, along_smem[turn ^= 1]);

      for (int64_t begin = 0; begin < p.grid.N; begin += kStep) {
        const Tile tile(p, starts, begin);
        tile.write(r);
        if (p.sums && p.sum_keys) keys_total += tile.sum(r);
        if (p.sums && !p.sum_keys) {
          add_to_sums<D, VEC>(tile, static_cast<D*>(p.sums) + w * p.grid.N + begin, r, member == first);
        }
      }
    }
    if (p.sums && p.sum_keys) {
      keys_total = device::row_sum(keys_total, keys_smem);
      if (threadIdx.x == 0) static_cast<D*>(p.sums)[w] = device::from_float<D>(keys_total);
    }
  }
}

}  // namespace transfuse::causal_softmax
