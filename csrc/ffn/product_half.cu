// The product's kernels for float16.
#include "ffn/product_tiles.cuh"

namespace transfuse::ffn {

template <>
void launch_product<__half>(const ProductCall& c) {
  launch_layouts<__half>(c);
}

}  // namespace transfuse::ffn
