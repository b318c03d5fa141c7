// Checks and launch of the sum over parts; the kernel is in combine.cuh.
#include "ffn/combine.cuh"

#include "ffn/end_tensors.h"
#include "launch.h"

namespace transfuse {
namespace {

using namespace ffn;

template <typename T>
void launch_combine(const CombineParams& p, DType parts, const Call& call, const LaunchTarget& target) {
  constexpr int64_t kColumns = 32 * 16 / sizeof(T);
  const int64_t tiles_m = (p.end.M + int64_t{p.rows_a_block} - 1) / p.rows_a_block;
  const int64_t blocks = tiles_m * ((p.end.N + kColumns - 1) / kColumns);
  require(blocks < int64_t{1} << 31, call, "there are too many rows for one launch (split them)");
  const dim3 grid(static_cast<unsigned>(blocks)), block(kCombineWarps * 32);
  if (parts == DType::Float32) {
    launch(call, target, grid, block, 0, ffn_combine_kernel<T, float>, p);
  } else {
    launch(call, target, grid, block, 0, ffn_combine_kernel<T, T>, p);
  }
}

}  // namespace

void ffn_combine(const TensorView& c, const OptionalTensor& g, int rows_a_block,
                 const OptionalTensor& out, const OptionalTensor& bias, const OptionalTensor& up,
                 const OptionalTensor& gate, const OptionalTensor& dgate, const OptionalTensor& hidden,
                 const OptionalTensor& sums, const OptionalTensor& seed, int activation, bool backward,
                 double dropout_p, const LaunchTarget& target) {
  const EndTensors ends{present(out),    present(bias), present(up),   present(gate), present(dgate),
                        present(hidden), present(sums), present(seed), activation,    backward,
                        dropout_p};
  const Call call("ffn_combine",
                  {{"c", &c}, {"g", present(g)}, {"out", ends.out, Role::Output}, {"bias", ends.bias},
                   {"up", ends.up, ends.saved()}, {"gate", ends.gate, ends.saved()},
                   {"dgate", ends.dgate, Role::Output}, {"hidden", ends.hidden, Role::Output},
                   {"sums", ends.sums, Role::Output}, {"seed", ends.seed}});
  require(ends.out || ends.up, call, "there is nothing to write");
  const DType dtype = ends.out ? ends.out->dtype : ends.up->dtype;
  require(is_floating(dtype), call,
          "out must be float32, float16 or bfloat16");
  require(c.ndim == 3 && (c.dtype == DType::Float32 || c.dtype == dtype), call,
          "c must be (parts, rows, columns) in float32 or out's dtype");
  const int64_t parts = c.sizes[0], M = c.sizes[1], N = c.sizes[2];
  for (const TensorView* t : {&c, present(g)}) {
    if (!t || M == 0 || N == 0) continue;
    bool like_c = t->ndim == 3 && t->dtype == c.dtype;
    for (int d = 0; like_c && d < 3; ++d) like_c = t->sizes[d] == c.sizes[d] && t->strides[d] == c.strides[d];
    require(like_c && (c.strides[2] == 1 || N <= 1), call, "c and g must be alike, with contiguous columns");
    const int64_t chunk = 16 / (c.dtype == DType::Float32 ? 4 : 2);
    require(reinterpret_cast<uintptr_t>(t->data) % 16 == 0 && (parts <= 1 || c.strides[0] % chunk == 0) &&
                (M <= 1 || c.strides[1] % chunk == 0),
            call, "c's and g's rows must be aligned to 16 bytes");
  }
  require(parts <= INT_MAX && rows_a_block >= 1, call, "parts and rows a block must be positive numbers");
  CombineParams p{};
  p.c = c.data, p.g = g ? g->data : nullptr;
  p.part = parts > 1 ? c.strides[0] : 0, p.row = M > 1 ? c.strides[1] : 0;
  p.parts = static_cast<int>(parts), p.rows_a_block = rows_a_block;
  p.end = end_params(ends, M, N, dtype, backward ? gate.has_value() : g.has_value(),
                     (M + rows_a_block - 1) / rows_a_block, call);
  if (M == 0 || N == 0) return;
  with_dtype(dtype, [&](auto element) { launch_combine<decltype(element)>(p, c.dtype, call, target); });
}

}  // namespace transfuse
