// Checks, kernel choice and launch of layer norm forward; the kernels are in layer_norm.cuh.
#include "norm/layer_norm.cuh"

#include <algorithm>
#include <climits>

#include "launchers.h"

namespace transfuse {
namespace {

using norm::LayerNormParams;

void check_rows(const TensorView& t, const TensorView& x, const Call& call) {
  require(t.dtype == x.dtype && t.ndim == 2 && t.sizes[0] == x.sizes[0] && t.sizes[1] == x.sizes[1], call,
          "residual, y and summed must have x's dtype and shape");
  require(t.strides[1] == 1 || t.sizes[1] <= 1, call, "x, residual, y and summed must have contiguous columns");
}

void check_vector(const TensorView& t, int64_t length, DType first, DType second, const Call& call) {
  require((t.dtype == first || t.dtype == second) && t.ndim == 1 && t.sizes[0] == length, call,
          "weight and bias must be (columns) in x's dtype or float32, mean and rstd (rows) in float32");
  require(t.strides[0] == 1 || length <= 1, call, "weight, bias, mean and rstd must be contiguous");
}

void check(const TensorView& x, const TensorView* residual, const TensorView* weight, const TensorView* bias,
           const TensorView& y, const TensorView* summed, const TensorView& mean, const TensorView& rstd,
           const Call& call) {
  require(x.dtype == DType::Float32 || x.dtype == DType::Float16 || x.dtype == DType::BFloat16, call,
          "x must be float32, float16 or bfloat16");
  require(x.ndim == 2, call, "x must be (rows, columns)");
  require(!residual == !summed, call, "residual and summed come together");
  for (const TensorView* rows : {&x, &y, residual, summed}) {
    if (rows) check_rows(*rows, x, call);
  }
  for (const TensorView* parameter : {weight, bias}) {
    if (parameter) check_vector(*parameter, x.sizes[1], x.dtype, DType::Float32, call);
  }
  require(!weight || !bias || weight->dtype == bias->dtype, call, "weight and bias must share a dtype");
  check_vector(mean, x.sizes[0], DType::Float32, DType::Float32, call);
  check_vector(rstd, x.sizes[0], DType::Float32, DType::Float32, call);
}

// 16-byte accesses at every (row, multiple of `vec`) of a (M, N) tensor; an absent tensor is no obstacle.
bool rows_align(const TensorView* t, int vec) {
  if (!t) return true;
  const bool stride_fits = t->sizes[0] <= 1 || t->strides[0] % vec == 0;
  return reinterpret_cast<uintptr_t>(t->data) % 16 == 0 && stride_fits && t->sizes[1] % vec == 0;
}

bool starts_align(const TensorView* t) { return !t || reinterpret_cast<uintptr_t>(t->data) % 16 == 0; }

template <typename T, typename W, int VEC>
void launch_kernel(const LayerNormParams& p, const Call& call, const LaunchTarget& target) {
  // More rows than blocks is no error: the kernels stride over them.
  const auto blocks = [&](int64_t rows) { return dim3(static_cast<unsigned>(std::min<int64_t>(rows, INT_MAX))); };
  if (p.N > norm::kMaxRowColumns) {
    launch(call, target, blocks(p.M), dim3(norm::kLoopThreads), 0, norm::layer_norm_loop<T, W, VEC>, p);
    return;
  }
  constexpr int64_t kColumnsPerWarp = norm::kRowElements<VEC> * 32;
  const int warps = static_cast<int>(std::max<int64_t>(1, (p.N + kColumnsPerWarp - 1) / kColumnsPerWarp));
  const int rows_a_block = warps == 1 ? 4 : 1;  // 128 threads: enough to fill an SM, few enough to balance the tail
  launch(call, target, blocks((p.M + rows_a_block - 1) / rows_a_block), dim3(warps * 32, rows_a_block), 0,
         norm::layer_norm_row<T, W, VEC>, p);
}

template <typename T, typename W>
void choose_access(const LayerNormParams& p, bool aligned, const Call& call, const LaunchTarget& target) {
  if (aligned) {
    launch_kernel<T, W, 16 / sizeof(T)>(p, call, target);
  } else {
    launch_kernel<T, W, 1>(p, call, target);
  }
}

}  // namespace

void layer_norm_forward(const TensorView& x, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const TensorView& y, const OptionalTensor& summed,
                        const TensorView& mean, const TensorView& rstd, float eps, const LaunchTarget& target) {
  const TensorView* r = residual ? &*residual : nullptr;
  const TensorView* w = weight ? &*weight : nullptr;
  const TensorView* b = bias ? &*bias : nullptr;
  const TensorView* s = summed ? &*summed : nullptr;
  const Call call("layer_norm_forward", {{"x", &x}, {"residual", r}, {"weight", w}, {"bias", b},
                                         {"y", &y, Role::Output}, {"summed", s, Role::Output},
                                         {"mean", &mean, Role::Output}, {"rstd", &rstd, Role::Output}});
  check(x, r, w, b, y, s, mean, rstd, call);
  if (x.sizes[0] == 0) return;

  LayerNormParams p{};
  p.x = x.data;
  p.residual = r ? r->data : nullptr;
  p.weight = w ? w->data : nullptr;
  p.bias = b ? b->data : nullptr;
  p.y = y.data;
  p.summed = s ? s->data : nullptr;
  p.mean = mean.as<float>();
  p.rstd = rstd.as<float>();
  p.M = x.sizes[0];
  p.N = x.sizes[1];
  p.x_stride = x.strides[0];
  p.residual_stride = r ? r->strides[0] : 0;
  p.y_stride = y.strides[0];
  p.summed_stride = s ? s->strides[0] : 0;
  p.eps = eps;

  const int vec = x.dtype == DType::Float32 ? 4 : 8;
  const bool aligned = rows_align(&x, vec) && rows_align(r, vec) && rows_align(&y, vec) && rows_align(s, vec) &&
                       starts_align(w) && starts_align(b);
  const TensorView* parameter = w ? w : b;
  const bool wide_parameters = parameter && parameter->dtype == DType::Float32;
  switch (x.dtype) {
    case DType::Float32:
      return choose_access<float, float>(p, aligned, call, target);
    case DType::Float16:
      return wide_parameters ? choose_access<__half, float>(p, aligned, call, target)
                             : choose_access<__half, __half>(p, aligned, call, target);
    default:
      return wide_parameters ? choose_access<__nv_bfloat16, float>(p, aligned, call, target)
                             : choose_access<__nv_bfloat16, __nv_bfloat16>(p, aligned, call, target);
  }
}

}  // namespace transfuse
