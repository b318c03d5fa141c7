// Checks, kernel choice and launch of layer norm and RMS norm forward; the kernels are in layer_norm.cuh.
#include "norm/layer_norm.cuh"

#include "launchers.h"
#include "norm/checks.h"

namespace transfuse {
namespace {

using norm::LayerNormParams;

struct Tensors {
  const TensorView &x, *residual, *weight, *bias, &y, *summed, *mean, &rstd;
};

void check(const Tensors& t, const Call& call) {
  norm::check_first(t.x, call);
  require(!t.residual == !t.summed, call, "residual and summed come together");
  for (const TensorView* rows : {&t.x, &t.y, t.residual, t.summed}) {
    if (rows) norm::check_rows(*rows, t.x, call);
  }
  for (const TensorView* parameter : {t.weight, t.bias}) {
    if (parameter) norm::check_vector(*parameter, t.x.sizes[1], t.x.dtype, DType::Float32, call);
  }
  require(!t.weight || !t.bias || t.weight->dtype == t.bias->dtype, call, "weight and bias must share a dtype");
  for (const TensorView* statistic : {t.mean, &t.rstd}) {
    if (statistic) norm::check_vector(*statistic, t.x.sizes[0], DType::Float32, DType::Float32, call);
  }
}

template <typename T, typename W, int VEC>
void launch_kernel(const LayerNormParams& p, const Call& call, const LaunchTarget& target) {
  if (p.N > norm::kMaxRowColumns) {
    launch(call, target, norm::blocks(p.M), dim3(norm::kLoopThreads), 0, norm::layer_norm_loop<T, W, VEC>, p);
    return;
  }
  constexpr int64_t kColumnsPerWarp = norm::kRowElements<VEC> * 32;
  const int warps = static_cast<int>(std::max<int64_t>(1, (p.N + kColumnsPerWarp - 1) / kColumnsPerWarp));
  const int rows_a_block = warps == 1 ? 4 : 1;  // 128 threads: enough to fill an SM, few enough to balance the tail
  launch(call, target, norm::blocks((p.M + rows_a_block - 1) / rows_a_block), dim3(warps * 32, rows_a_block), 0,
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

void forward(const Tensors& t, float eps, const Call& call, const LaunchTarget& target) {
  check(t, call);
  if (t.x.sizes[0] == 0) return;

  LayerNormParams p{};
  p.x = t.x.data;
  p.residual = t.residual ? t.residual->data : nullptr;
  p.weight = t.weight ? t.weight->data : nullptr;
  p.bias = t.bias ? t.bias->data : nullptr;
  p.y = t.y.data;
  p.summed = t.summed ? t.summed->data : nullptr;
  p.mean = t.mean ? t.mean->as<float>() : nullptr;
  p.rstd = t.rstd.as<float>();
  p.M = t.x.sizes[0];
  p.N = t.x.sizes[1];
  p.x_stride = t.x.strides[0];
  p.residual_stride = t.residual ? t.residual->strides[0] : 0;
  p.y_stride = t.y.strides[0];
  p.summed_stride = t.summed ? t.summed->strides[0] : 0;
  p.eps = eps;

  const int vec = t.x.dtype == DType::Float32 ? 4 : 8;
  const bool aligned = norm::rows_align(&t.x, vec) && norm::rows_align(t.residual, vec) &&
                       norm::rows_align(&t.y, vec) && norm::rows_align(t.summed, vec) &&
                       norm::starts_align(t.weight) && norm::starts_align(t.bias);
  const TensorView* parameter = t.weight ? t.weight : t.bias;
  const bool wide_parameters = parameter && parameter->dtype == DType::Float32;
  with_dtypes(t.x.dtype, wide_parameters, [&](auto element, auto parameter) {
    choose_access<decltype(element), decltype(parameter)>(p, aligned, call, target);
  });
}

}  // namespace

void layer_norm_forward(const TensorView& x, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const TensorView& y, const OptionalTensor& summed,
                        const TensorView& mean, const TensorView& rstd, float eps, const LaunchTarget& target) {
  const Tensors t{x, present(residual), present(weight), present(bias),
                  y, present(summed),   &mean,                 rstd};
  const Call call("layer_norm_forward", {{"x", &x},
                                         {"residual", t.residual},
                                         {"weight", t.weight},
                                         {"bias", t.bias},
                                         {"y", &y, Role::Output},
                                         {"summed", t.summed, Role::Output},
                                         {"mean", &mean, Role::Output},
                                         {"rstd", &rstd, Role::Output}});
  forward(t, eps, call, target);
}

void rms_norm_forward(const TensorView& x, const OptionalTensor& residual, const OptionalTensor& weight,
                      const TensorView& y, const OptionalTensor& summed, const TensorView& rstd, float eps,
                      const LaunchTarget& target) {
  const Tensors t{x, present(residual), present(weight), nullptr, y, present(summed), nullptr, rstd};
  const Call call("rms_norm_forward", {{"x", &x},
                                       {"residual", t.residual},
                                       {"weight", t.weight},
                                       {"y", &y, Role::Output},
                                       {"summed", t.summed, Role::Output},
                                       {"rstd", &rstd, Role::Output}});
  forward(t, eps, call, target);
}

}  // namespace transfuse
