// The product's kernels for bfloat16.
#include "ffn/product_tiles.cuh"

namespace transfuse::ffn {

template <>
void launch_product<__nv_bfloat16>(const ProductCall& c) {
  launch_layouts<__nv_bfloat16>(c);
}

}  // namespace transfuse::ffn
