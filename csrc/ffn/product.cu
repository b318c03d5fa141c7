// Checks and launch of the product; the kernel is in product.cuh, its tiles in product_tiles.cuh.
#include "ffn/end_tensors.h"
#include "ffn/product_tiles.cuh"

namespace transfuse {
namespace {

using namespace ffn;

// A stored operand: (rows, columns), columns contiguous, rows aligned to 16 bytes.
void check_operand(const TensorView* t, int64_t rows, int64_t columns, DType dtype, const Call& call) {
  check_matrix(t, rows, columns, dtype, call);
  require(rows_align(t, dtype == DType::Float32 ? 4 : 8), call, "the operands' rows must be aligned to 16 bytes");
}

// (products * splits, M, N) of float32, rows of any aligned length; gives that length.
int64_t check_partials(const TensorView& t, int64_t parts, const EndParams& end, const Call& call) {
  require(t.ndim == 3 && t.dtype == DType::Float32 && t.sizes[0] == parts && t.sizes[1] == end.M && t.sizes[2] == end.N,
          call, "partials must be (products * splits, rows, columns) in float32");
  const int64_t columns = t.sizes[1] > 1 ? t.strides[1] : t.strides[0];
  require(reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && columns % 4 == 0 && columns >= end.N &&
              (t.strides[2] == 1 || end.N <= 1) && t.strides[0] == end.M * columns,
          call, "partials must lie row after row, each aligned to 16 bytes");
  return columns;
}

}  // namespace

void ffn_product(int layout, int tile, int splits, const TensorView& a, const TensorView& b,
                 const OptionalTensor& b_gate, const OptionalTensor& a2, const OptionalTensor& b2,
                 const OptionalTensor& partials, const OptionalTensor& out, const OptionalTensor& bias,
                 const OptionalTensor& up, const OptionalTensor& gate, const OptionalTensor& dgate,
                 const OptionalTensor& hidden, const OptionalTensor& sums, const OptionalTensor& seed, int activation,
                 bool backward, double dropout_p, const LaunchTarget& target) {
  const EndTensors ends{present(out),    present(bias), present(up),   present(gate), present(dgate),
                        present(hidden), present(sums), present(seed), activation,    backward,
                        dropout_p};
  const Call call("ffn_product",
                  {{"a", &a}, {"b", &b}, {"b_gate", present(b_gate)}, {"a2", present(a2)}, {"b2", present(b2)},
                   {"partials", present(partials), Role::Output}, {"out", ends.out, Role::Output}, {"bias", ends.bias},
                   {"up", ends.up, ends.saved()}, {"gate", ends.gate, ends.saved()},
                   {"dgate", ends.dgate, Role::Output}, {"hidden", ends.hidden, Role::Output},
                   {"sums", ends.sums, Role::Output}, {"seed", ends.seed}});
  require(is_floating(a.dtype), call,
          "a must be float32, float16 or bfloat16");
  const int tiles = layout == kWeight ? 1 : kTiles;
  require(layout >= kForward && layout <= kWeight && tile >= 0 && tile < tiles && splits >= 1, call,
          "there is no such layout, tile or number of splits");
  require(a.ndim == 2 && b.ndim == 2, call, "a and b must be matrices");
  const int64_t M = a.sizes[layout == kWeight], K = a.sizes[layout != kWeight];
  const int64_t N = b.sizes[layout != kForward];
  for (const TensorView* t : {&a, present(a2)}) check_operand(t, a.sizes[0], a.sizes[1], a.dtype, call);
  for (const TensorView* t : {&b, present(b_gate), present(b2)}) {
    check_operand(t, layout == kForward ? N : K, layout == kForward ? K : N, a.dtype, call);
  }
  require(K <= INT_MAX / 4, call, "the inner dimension must fit 29 bits");
  require(!b_gate || (layout == kForward && !backward), call, "gated products are x w^T");
  require(!a2 == !b2 && !(a2 && b_gate), call, "a2 and b2 come together, and not with b_gate");
  require(!partials == (splits == 1), call, "partials are for products split over K");

  ProductParams p{};
  const int64_t block_m = tile == 0 ? 128 : tile == 1 ? 64 : 16, groups = (M + block_m - 1) / block_m;
  p.end = end_params(ends, M, N, a.dtype, backward ? gate.has_value() : b_gate.has_value(), groups, call);
  if (M == 0 || N == 0) return;
  p.a = rows(&a), p.b = rows(&b), p.b_gate = rows(present(b_gate)), p.a2 = rows(present(a2)), p.b2 = rows(present(b2));
  p.K = static_cast<int>(K);
  p.splits = splits;
  if (partials) {
    p.partials = partials->as<float>();
    p.columns = check_partials(*partials, (b_gate ? 2 : 1) * int64_t{splits}, p.end, call);
  }
  const ProductCall how{p, call, target, layout, tile};
  with_dtype(a.dtype, [&](auto element) { launch_product<decltype(element)>(how); });
}

}  // namespace transfuse
