// layer_norm and rms_norm backward:  n = (s - mean) * rstd,  g = dout * weight
//     dx = rstd * (g - mean(g) - n * mean(g * n)) + dsummed      (rms_norm, whose `mean` is null: without mean(g))
//     dweight = sum over rows of dout * n,   dbias = sum over rows of dout
//
//   norm_backward_row     rows of up to kMaxGradientColumns, read once. Block k of G owns rows k, k + G, ... and loads
//                         the next one before it works on the one in registers. blockDim = (32 * warps a row, rows a
//                         block): one warp a row and 4 rows a block up to 512 columns, one row a block beyond. Each
//                         thread sums its columns of dout * n and dout over its rows; the block writes them to row k
//                         of `dweight` and `dbias`, (G, N), its rows added in their order
//   norm_backward_loop    any N. One block of 256 threads a row, which it reads twice: the two means, then dx
//   norm_weight_partials  beside norm_backward_loop: block (k, b) of G x B holds 2048 columns and sums
//                         rows k, k + G, ... of them
//   norm_weight_sums      (G, N) to (N): 32 columns a block, whose 32 warps take every 32nd row and are added in order
//
// Shared memory: 256 bytes for reductions, 2 KB where a block has 4 rows, 4 KB in norm_weight_sums; static.
// Saved by forward: s, mean, rstd. No atomics: the same input and G give the same bits.
// The launchers guarantee what layer_norm.cuh's does; M >= 1, G >= 1.
#pragma once

#include "norm/row_columns.cuh"

namespace transfuse::norm {

constexpr int kGradientElements = 16;  // of a row in a thread: s and dout of two rows and two sums
constexpr int kGradientLoopThreads = 256;
constexpr int kPartialThreads = 128;
constexpr int kWarpColumns = kGradientElements * device::kWarp;

// 512 threads have 128 registers each; fp32 (VEC = 4) and single elements need more, and so half as many threads.
template <int VEC>
constexpr int kMaxGradientColumns = VEC == 8 ? 8192 : 4096;

struct NormBackwardParams {
  const void* dout;     // (M, N) T
  const void* dsummed;  // (M, N) T or null
  const void* summed;   // (M, N) T
  const void* weight;   // (N) W or null
  const float* mean;    // (M), null for rms_norm
  const float* rstd;    // (M)
  void* dx;             // (M, N) T
  float* dweight;       // (G, N) or null
  float* dbias;         // (G, N) or null
  int64_t M, N, G;
  int64_t dout_stride, dsummed_stride, summed_stride, dx_stride;  // between rows, in elements
};

template <typename T, typename W, int VEC>
class GradientTile : private RowColumns<VEC, kGradientElements> {
 public:
  __device__ __forceinline__ GradientTile(const NormBackwardParams& p, int64_t begin)
      : RowColumns<VEC, kGradientElements>(p.N, begin), p_(p) {}

  // Row m as it is stored: nothing waits for these loads before normalise(). Past the end it is the last row once
  // more, which nobody uses: a branch around the loads would cost registers.
  __device__ __forceinline__ void load(int64_t m) {
    m = min(m, p_.M - 1);
    load_all(s_packs_, this->template row<const T>(p_.summed, m, p_.summed_stride));
    load_all(dout_packs_, this->template row<const T>(p_.dout, m, p_.dout_stride));
    next_mean_ = p_.mean ? p_.mean[m] : 0.0f;
    next_rstd_ = p_.rstd[m];
  }

  // The loaded row as n and dout in fp32; its registers are free for the next.
  __device__ __forceinline__ void normalise() {
    rstd_ = next_rstd_;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        n_reg_[i][j] = (device::to_float(s_packs_[i].at[j]) - next_mean_) * rstd_;
        g_reg_[i][j] = device::to_float(dout_packs_[i].at[j]);  // 0 outside the row, and so are all products with it
      }
    }
  }

  __device__ __forceinline__ void accumulate() {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        dweight_reg_[i][j] += g_reg_[i][j] * n_reg_[i][j];
        dbias_reg_[i][j] += g_reg_[i][j];
      }
    }
  }

  // g = dout * weight
  __device__ __forceinline__ void weigh() {
    if (!p_.weight) return;
    const W* weight = static_cast<const W*>(p_.weight) + begin_;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!inside(i)) continue;
      const device::Pack<W, VEC> w = device::load<VEC>(weight + column(i));
#pragma unroll
      for (int j = 0; j < VEC; ++j) g_reg_[i][j] *= device::to_float(w.at[j]);
    }
  }

  __device__ __forceinline__ float sum_g() const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) total += g_reg_[i][j];
    }
    return total;
  }

  __device__ __forceinline__ float sum_gn() const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) total += g_reg_[i][j] * n_reg_[i][j];
    }
    return total;
  }

  __device__ __forceinline__ void write_dx(int64_t m, float mean_g, float mean_gn) const {
    const T* dsummed = this->template row<const T>(p_.dsummed, m, p_.dsummed_stride);
    T* dx = this->template row<T>(p_.dx, m, p_.dx_stride);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!inside(i)) continue;
      device::Pack<T, VEC> pack = p_.dsummed ? device::load<VEC>(dsummed + column(i)) : device::Pack<T, VEC>{};
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const float ds = rstd_ * (g_reg_[i][j] - mean_g - n_reg_[i][j] * mean_gn);
        pack.at[j] = device::from_float<T>(ds + device::to_float(pack.at[j]));
      }
      device::store<VEC>(dx + column(i), pack);
    }
  }

  // Row `group` of the partial sums. All threads of the block call; `smem` is used where the block has several rows.
  __device__ __forceinline__ void write_partials(int64_t group, float* smem) const {
    if (p_.dweight) write_partial(this->template row<float>(p_.dweight, group, p_.N), dweight_reg_, smem);
    if (p_.dbias) write_partial(this->template row<float>(p_.dbias, group, p_.N), dbias_reg_, smem);
  }

 private:
  using Columns = RowColumns<VEC, kGradientElements>;
  using Columns::begin_;
  using Columns::column;
  using Columns::inside;
  using Columns::kPacks;
  using Columns::load_all;
  using Sums = device::Pack<float, VEC>;

  __device__ __forceinline__ void write_partial(float* out, const float (&sums)[kPacks][VEC], float* smem) const {
    for (unsigned y = 0; y < blockDim.y; ++y) {
      if (threadIdx.y == y) {
        const bool last = y + 1 == blockDim.y;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          if (!inside(i)) continue;
          Sums total = y ? device::load<VEC>(smem + column(i)) : Sums{};
#pragma unroll
          for (int j = 0; j < VEC; ++j) total.at[j] += sums[i][j];
          device::store<VEC>((last ? out : smem) + column(i), total);
        }
      }
      if (blockDim.y > 1) __syncthreads();
    }
  }

  const NormBackwardParams& p_;
  device::Pack<T, VEC> s_packs_[kPacks], dout_packs_[kPacks];
  float next_mean_ = 0.0f, next_rstd_ = 0.0f, rstd_ = 0.0f;
  float n_reg_[kPacks][VEC], g_reg_[kPacks][VEC];
  float dweight_reg_[kPacks][VEC] = {}, dbias_reg_[kPacks][VEC] = {};
};

template <typename T, typename W, int VEC>
__global__ void __launch_bounds__(kMaxGradientColumns<VEC> / kGradientElements)
    norm_backward_row(const NormBackwardParams p) {
  __shared__ float smem[2][device::kWarp];
  alignas(16) __shared__ float columns_smem[kWarpColumns];
  RowSums row_sum(smem);
  const float N = static_cast<float>(p.N);
  const int64_t step = p.G * blockDim.y;
  int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;

  GradientTile<T, W, VEC> tile(p, 0);
  tile.load(m);
  for (; m < p.M; m += step) {
    tile.normalise();
    tile.accumulate();
    tile.weigh();
    const float sum_gn = tile.sum_gn(), sum_g = tile.sum_g();
    tile.load(m + step);
    const float mean_gn = row_sum(sum_gn) / N;
    const float mean_g = p.mean ? row_sum(sum_g) / N : 0.0f;
    tile.write_dx(m, mean_g, mean_gn);
  }
  tile.write_partials(blockIdx.x, columns_smem);
}

template <typename T, typename W, int VEC>
__global__ void __launch_bounds__(kGradientLoopThreads) norm_backward_loop(const NormBackwardParams p) {
  using Tile = GradientTile<T, W, VEC>;
  __shared__ float smem[2][device::kWarp];
  RowSums row_sum(smem);
  const float N = static_cast<float>(p.N);
  const int step = static_cast<int>(blockDim.x) * kGradientElements;  // columns of the row a round

  for (int64_t m = blockIdx.x; m < p.M; m += gridDim.x) {
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int64_t begin = 0; begin < p.N; begin += step) {
      Tile tile(p, begin);
      tile.load(m);
      tile.normalise();
      tile.weigh();
      sum_g += tile.sum_g();
      sum_gn += tile.sum_gn();
    }
    const float mean_gn = row_sum(sum_gn) / N;
    const float mean_g = p.mean ? row_sum(sum_g) / N : 0.0f;
    for (int64_t begin = 0; begin < p.N; begin += step) {
      Tile tile(p, begin);
      tile.load(m);
      tile.normalise();
      tile.weigh();
      tile.write_dx(m, mean_g, mean_gn);
    }
  }
}

template <typename T, typename W, int VEC>
__global__ void __launch_bounds__(kPartialThreads) norm_weight_partials(const NormBackwardParams p) {
  const unsigned groups = static_cast<unsigned>(p.G), group = blockIdx.x % groups, block = blockIdx.x / groups;
  GradientTile<T, W, VEC> tile(p, int64_t(block) * blockDim.x * kGradientElements);
  for (int64_t m = group; m < p.M; m += p.G) {
    tile.load(m);
    tile.normalise();
    tile.accumulate();
  }
  tile.write_partials(group, nullptr);
}

struct WeightSumsParams {
  const float *dweight_partial, *dbias_partial;  // (G, N), null where absent
  void *dweight, *dbias;                         // (N) W
  int64_t G, N;
};

template <typename W>
__global__ void __launch_bounds__(device::kWarp* device::kWarp) norm_weight_sums(const WeightSumsParams p) {
  __shared__ float smem[device::kWarp][device::kWarp];
  const bool first = blockIdx.y == 0;
  const float* partial = first ? p.dweight_partial : p.dbias_partial;
  W* out = static_cast<W*>(first ? p.dweight : p.dbias);
  if (!partial) return;
  const int64_t column = int64_t(blockIdx.x) * device::kWarp + threadIdx.x;

  float total = 0.0f;
  if (column < p.N) {
#pragma unroll 4
    for (int64_t group = threadIdx.y; group < p.G; group += device::kWarp) total += partial[group * p.N + column];
  }
  smem[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && column < p.N) {
#pragma unroll
    for (int y = 1; y < device::kWarp; ++y) total += smem[y][threadIdx.x];
    out[column] = device::from_float<W>(total);
  }
}

}  // namespace transfuse::norm
