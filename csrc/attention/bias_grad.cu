// Kernel choice and launch of the gradient of a bias that was broadcast; the kernel is in bias_grad.cuh.
#include "attention/bias_grad.cuh"

#include "attention/backward_launch.h"

namespace transfuse::attention {
namespace {

template <typename T, int D, int BLOCK_M, int BLOCK_N, int STAGES>
void launch_kernel(BiasGradientParams& p, const Call& call, const LaunchTarget& target) {
  using Kernel = BiasGradient<T, D, BLOCK_M, BLOCK_N, STAGES>;
  p.q_tiles = (p.q_len + BLOCK_M - 1) / BLOCK_M;
  p.k_tiles = (p.k_len + BLOCK_N - 1) / BLOCK_N;
  const int64_t owners = int64_t(p.batch / p.batches_each) * p.bias_heads * p.splits;
  const int64_t blocks = owners * (p.rows ? p.q_tiles : 1) * (p.columns ? p.k_tiles : 1);
  const unsigned grid = grid_of(blocks, call);
  launch(call, target, dim3(grid), dim3(Kernel::kThreads), Kernel::kSharedBytes,
         attention_bias_gradient_kernel<T, D, BLOCK_M, BLOCK_N, STAGES>, p);
}

// Tiles as large as two stages, or one of wide rows, leave room for in 99 KB.
template <typename T>
void choose_tiles(BiasGradientParams& p, const Call& call, const LaunchTarget& target) {
  const int widest = std::max(p.head_dim, p.v_dim);
  constexpr bool kWide = sizeof(T) == 4;
  if (widest <= 64) {
    launch_kernel<T, 64, 64, 32, 2>(p, call, target);
  } else if (widest <= 128) {
    launch_kernel<T, 128, 64, 32, kWide ? 1 : 2>(p, call, target);
  } else {
    launch_kernel<T, 256, kWide ? 32 : 64, kWide ? 16 : 32, 1>(p, call, target);
  }
}

}  // namespace

void launch_bias_gradient(const BackwardParams& p, const TensorView& partial, DType dtype, const Call& call,
                          const LaunchTarget& target) {
  const int64_t* sizes = partial.sizes;  // (splits, batch|1, heads|1, q_len|1, k_len|1)
  BiasGradientParams all{};
  static_cast<BackwardParams&>(all) = p;
  all.partial = partial.data;
  all.partial_is_float = partial.dtype == DType::Float32;
  all.splits = static_cast<int>(sizes[0]);
  all.bias_heads = static_cast<int>(sizes[2]);
  all.batches_each = static_cast<int>(p.batch / sizes[1]);
  all.heads_each = static_cast<int>(p.heads / sizes[2]);
  all.rows = sizes[3] > 1, all.columns = sizes[4] > 1;
  with_dtype(dtype, [&](auto element) { choose_tiles<decltype(element)>(all, call, target); });
}

}  // namespace transfuse::attention
