// Kernel choice and launch of attention backward's dK and dV; the kernel is in backward.cuh, the checks in backward.cu.
#include "attention/backward_launch.h"

namespace transfuse::attention {
namespace {

// Tiles: dK and dV take OUT registers a thread, S and dP LOOP / 2 together; shared memory stays within 99 KB.
template <typename T>
void choose_tiles(BackwardParams& p, const Call& call, const LaunchTarget& target) {
  const int widest = std::max(p.head_dim, p.v_dim);
  constexpr bool kWide = sizeof(T) == 4;
  if (widest <= 64) {
    choose_features<T, 64, 64, 64, kWide ? 32 : 64, 2, true>(p, call, target);
  } else if (widest <= 128) {
    choose_features<T, 128, kWide ? 64 : 128, 64, kWide ? 16 : 32, 2, true>(p, call, target);
  } else {
    choose_features<T, 256, 128, kWide ? 32 : 64, 16, kWide ? 1 : 2, true>(p, call, target);
  }
}

}  // namespace

void launch_keys(BackwardParams p, DType dtype, const Call& call, const LaunchTarget& target) {
  with_dtype(dtype, [&](auto element) { choose_tiles<decltype(element)>(p, call, target); });
}

}  // namespace transfuse::attention
