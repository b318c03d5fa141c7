// Which tiles the product comes in; python/transfuse/ops/ffn/cuda_plans.py chooses among them by their number.
//
//   number  16 bits         fp32           for
//   0       128 x 128 x 32  128 x 64 x 16  products with tiles enough for every multiprocessor; 64 x 64 (64 x 32) of
//                                          it a warp, so that tensor cores and not shared memory are the limit
//   1       64 x 64 x 64    64 x 64 x 32   fewer rows, or fewer tiles
//   2       16 x 64 x 64    16 x 64 x 32   decoding: B streams past, many loads on their way
#pragma once

#include "ffn/product.cuh"
#include "launch.h"

namespace transfuse::ffn {

constexpr int kTiles = 3;

struct ProductCall {
  const ProductParams& params;
  const Call& call;
  const LaunchTarget& target;
  int layout, tile;
};

// One for each dtype, each in a file of its own that compiles beside the others.
template <typename T>
void launch_product(const ProductCall& c);

template <typename Kernel>
void launch_tiles(const ProductCall& c) {
  const EndParams& end = c.params.end;
  const auto over = [](int64_t size, int block) { return (size + block - 1) / block; };
  const int64_t columns = c.params.b_gate.data ? Kernel::BLOCK_N / 2 : Kernel::BLOCK_N;
  ProductParams p = c.params;
  const int64_t steps = over(p.K, Kernel::BLOCK_K) * (p.a2.data ? 2 : 1);
  p.span = static_cast<int>(over(steps, p.splits));
  const int64_t blocks = over(end.M, Kernel::BLOCK_M) * over(end.N, columns) * p.splits;
  require(blocks < int64_t{1} << 31, c.call, "there are too many tiles for one launch (split the rows)");
  launch(c.call, c.target, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads), Kernel::kSharedBytes,
         ffn_product_kernel<Kernel>, p);
}

template <typename T, int LAYOUT>
void launch_layout(const ProductCall& c) {
  constexpr int kK = 64 / sizeof(T);  // of K in 64 bytes
  if constexpr (LAYOUT != kWeight) {
    if (c.tile == 1) return launch_tiles<Product<T, 64, 64, 2 * kK, 2, 2, 3, LAYOUT>>(c);
    if (c.tile == 2) return launch_tiles<Product<T, 16, 64, 2 * kK, 1, 4, 4, LAYOUT>>(c);
  }
  launch_tiles<Product<T, 128, sizeof(T) == 2 ? 128 : 64, kK, 2, 2, 4, LAYOUT>>(c);
}

template <typename T>
void launch_layouts(const ProductCall& c) {
  switch (c.layout) {
    case kForward:
      return launch_layout<T, kForward>(c);
    case kInput:
      return launch_layout<T, kInput>(c);
    default:
      return launch_layout<T, kWeight>(c);
  }
}

}  // namespace transfuse::ffn
