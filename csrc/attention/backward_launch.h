// How the launcher of attention's backward reaches its kernels, which three sources compile.
#pragma once

#include <algorithm>
#include <climits>

#include "attention/backward.cuh"
#include "attention/checks.h"
#include "launch.h"

namespace transfuse::attention {

// dK and dV; backward_keys.cu.
void launch_keys(BackwardParams p, DType dtype, const Call& call, const LaunchTarget& target);

// The partials of a bias gradient; bias_grad.cu.
void launch_bias_gradient(const BackwardParams& p, const TensorView& partial, DType dtype, const Call& call,
                          const LaunchTarget& target);

inline unsigned grid_of(int64_t blocks, const Call& call) {
  require(blocks <= INT_MAX, call, "batch * heads * tiles must fit one launch (split the batch)");
  return static_cast<unsigned>(blocks);
}

template <typename T, int D, int OUT, int OWN, int LOOP, int STAGES, bool KEYS, bool RICH>
void launch_backward(BackwardParams& p, const Call& call, const LaunchTarget& target) {
  using Kernel = Backward<T, D, OUT, OWN, LOOP, STAGES, KEYS, RICH>;
  const int heads = KEYS ? p.heads / p.group : p.heads, widest = KEYS ? std::max(p.head_dim, p.v_dim) : p.head_dim;
  p.tiles = ((KEYS ? p.k_len : p.q_len) + OWN - 1) / OWN;
  p.parts = std::max(1, (widest + OUT - 1) / OUT);
  const unsigned grid = grid_of(int64_t(p.batch) * heads * p.tiles * p.parts, call);
  if (grid == 0) return;
  launch(call, target, dim3(grid), dim3(Kernel::kThreads), Kernel::kSharedBytes,
         attention_backward_kernel<T, D, OUT, OWN, LOOP, STAGES, KEYS, RICH>, p);
}

template <typename T, int D, int OUT, int OWN, int LOOP, int STAGES, bool KEYS>
void choose_features(BackwardParams& p, const Call& call, const LaunchTarget& target) {
  if constexpr (sizeof(T) == 4) {  // three products for one leave little to be won, and compiling takes long
    launch_backward<T, D, OUT, OWN, LOOP, STAGES, KEYS, true>(p, call, target);
  } else if (rich(p)) {
    launch_backward<T, D, OUT, OWN, LOOP, STAGES, KEYS, true>(p, call, target);
  } else {
    launch_backward<T, D, OUT, OWN, LOOP, STAGES, KEYS, false>(p, call, target);
  }
}

}  // namespace transfuse::attention
