// The product's kernels for float32.
#include "ffn/product_tiles.cuh"

namespace transfuse::ffn {

template <>
void launch_product<float>(const ProductCall& c) {
  launch_layouts<float>(c);
}

}  // namespace transfuse::ffn
