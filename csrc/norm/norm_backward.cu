// Checks, kernel choice and launch of the norms' backward; the kernels are in norm_backward.cuh.
#include "norm/norm_backward.cuh"

#include "launchers.h"
#include "norm/checks.h"

namespace transfuse {
namespace {

using norm::NormBackwardParams;

struct Tensors {
  const TensorView &dout, *dsummed, &summed, *weight, *mean, &rstd, &dx, *dweight, *dbias;
};

// (G, N) of fp32; gives G.
int64_t check_partials(const TensorView& t, int64_t columns, const Call& call) {
  require(t.dtype == DType::Float32 && t.ndim == 2 && t.sizes[0] >= 1 && t.sizes[1] == columns, call,
          "partial sums must be (groups, columns) in float32, of one group or more");
  require((t.strides[1] == 1 || columns <= 1) && (t.strides[0] == columns || t.sizes[0] <= 1), call,
          "partial sums must be contiguous");
  return t.sizes[0];
}

void check(const Tensors& t, const Call& call) {
  norm::check_first(t.summed, call);
  for (const TensorView* rows : {&t.dout, t.dsummed, &t.summed, &t.dx}) {
    if (rows) norm::check_rows(*rows, t.summed, call);
  }
  if (t.weight) norm::check_vector(*t.weight, t.summed.sizes[1], t.summed.dtype, DType::Float32, call);
  for (const TensorView* statistic : {t.mean, &t.rstd}) {
    if (statistic) norm::check_vector(*statistic, t.summed.sizes[0], DType::Float32, DType::Float32, call);
  }
}

template <typename T, typename W, int VEC>
void launch_kernels(NormBackwardParams p, const Call& call, const LaunchTarget& target) {
  const bool partials = p.dweight || p.dbias;
  if (p.N > norm::kMaxGradientColumns<VEC>) {
    launch(call, target, norm::blocks(p.M), dim3(norm::kGradientLoopThreads), 0, norm::norm_backward_loop<T, W, VEC>,
           p);
    if (!partials) return;
    constexpr int64_t kColumns = norm::kPartialThreads * norm::kGradientElements;
    const int64_t count = p.G * ((p.N + kColumns - 1) / kColumns);
    require(count <= INT_MAX, call, "rows this wide need fewer groups of partial sums");
    launch(call, target, norm::blocks(count), dim3(norm::kPartialThreads), 0, norm::norm_weight_partials<T, W, VEC>,
           p);
    return;
  }
  const int warps = static_cast<int>(std::max<int64_t>(1, (p.N + norm::kWarpColumns - 1) / norm::kWarpColumns));
  const int rows_a_block = warps == 1 ? 4 : 1;
  if (!partials) p.G = std::min<int64_t>((p.M + rows_a_block - 1) / rows_a_block, INT_MAX);
  launch(call, target, norm::blocks(p.G), dim3(warps * 32, rows_a_block), 0, norm::norm_backward_row<T, W, VEC>, p);
}

template <typename T, typename W>
void choose_access(const NormBackwardParams& p, bool aligned, const Call& call, const LaunchTarget& target) {
  if (aligned) {
    launch_kernels<T, W, 16 / sizeof(T)>(p, call, target);
  } else {
    launch_kernels<T, W, 1>(p, call, target);
  }
}

void backward(const Tensors& t, const Call& call, const LaunchTarget& target) {
  check(t, call);
  NormBackwardParams p{};
  p.M = t.summed.sizes[0];
  p.N = t.summed.sizes[1];
  if (t.dweight) p.G = check_partials(*t.dweight, p.N, call);
  if (t.dbias) p.G = check_partials(*t.dbias, p.N, call);
  require(!t.dweight || !t.dbias || t.dweight->sizes[0] == t.dbias->sizes[0], call,
          "partial sums must have as many groups each");
  require(p.G <= INT_MAX, call, "there are too many groups of partial sums");
  require(p.M >= 1, call, "without rows there is nothing to do: dweight and dbias are 0");

  p.dout = t.dout.data;
  p.dsummed = t.dsummed ? t.dsummed->data : nullptr;
  p.summed = t.summed.data;
  p.weight = t.weight ? t.weight->data : nullptr;
  p.mean = t.mean ? t.mean->as<float>() : nullptr;
  p.rstd = t.rstd.as<float>();
  p.dx = t.dx.data;
  p.dweight = t.dweight ? t.dweight->as<float>() : nullptr;
  p.dbias = t.dbias ? t.dbias->as<float>() : nullptr;
  p.dout_stride = t.dout.strides[0];
  p.dsummed_stride = t.dsummed ? t.dsummed->strides[0] : 0;
  p.summed_stride = t.summed.strides[0];
  p.dx_stride = t.dx.strides[0];

  const int vec = t.summed.dtype == DType::Float32 ? 4 : 8;
  const bool aligned = norm::rows_align(&t.dout, vec) && norm::rows_align(t.dsummed, vec) &&
                       norm::rows_align(&t.summed, vec) && norm::rows_align(&t.dx, vec) &&
                       norm::starts_align(t.weight) && norm::starts_align(t.dweight) && norm::starts_align(t.dbias);
  const bool wide_weight = t.weight && t.weight->dtype == DType::Float32;
  with_dtypes(t.summed.dtype, wide_weight, [&](auto element, auto weight) {
    choose_access<decltype(element), decltype(weight)>(p, aligned, call, target);
  });
}

}  // namespace

void layer_norm_backward(const TensorView& dout, const OptionalTensor& dsummed, const TensorView& summed,
                         const OptionalTensor& weight, const TensorView& mean, const TensorView& rstd,
                         const TensorView& dx, const OptionalTensor& dweight, const OptionalTensor& dbias,
                         const LaunchTarget& target) {
  const Tensors t{dout,  present(dsummed), summed, present(weight),
                  &mean, rstd,                   dx,     present(dweight),
                  present(dbias)};
  const Call call("layer_norm_backward",
                  {{"dout", &dout}, {"dsummed", t.dsummed}, {"summed", &summed}, {"weight", t.weight}, {"mean", &mean},
                   {"rstd", &rstd}, {"dx", &dx, Role::Output}, {"dweight", t.dweight, Role::Output}, {"dbias", t.dbias, Role::Output}});
  backward(t, call, target);
}

void rms_norm_backward(const TensorView& dout, const OptionalTensor& dsummed, const TensorView& summed,
                       const OptionalTensor& weight, const TensorView& rstd, const TensorView& dx,
                       const OptionalTensor& dweight, const LaunchTarget& target) {
  const Tensors t{dout, present(dsummed), summed, present(weight), nullptr, rstd, dx,
                  present(dweight), nullptr};
  const Call call("rms_norm_backward",
                  {{"dout", &dout}, {"dsummed", t.dsummed}, {"summed", &summed}, {"weight", t.weight}, {"rstd", &rstd},
                   {"dx", &dx, Role::Output}, {"dweight", t.dweight, Role::Output}});
  backward(t, call, target);
}

void norm_weight_sums(const OptionalTensor& dweight_partial, const OptionalTensor& dbias_partial,
                      const OptionalTensor& dweight, const OptionalTensor& dbias, const LaunchTarget& target) {
  const TensorView* partials[2] = {present(dweight_partial), present(dbias_partial)};
  const TensorView* outs[2] = {present(dweight), present(dbias)};
  const Call call("norm_weight_sums", {{"dweight_partial", partials[0]}, {"dbias_partial", partials[1]},
                                       {"dweight", outs[0], Role::Output}, {"dbias", outs[1], Role::Output}});
  norm::WeightSumsParams p{};
  DType dtype = DType::Float32;
  for (int i = 0; i < 2; ++i) {
    require(!partials[i] == !outs[i], call, "partial sums and sums come together");
    if (!outs[i]) continue;
    const TensorView& out = *outs[i];
    require(is_floating(out.dtype), call,
            "dweight and dbias must be float32, float16 or bfloat16");
    norm::check_vector(out, out.sizes[0], out.dtype, out.dtype, call);
    const int64_t groups = check_partials(*partials[i], out.sizes[0], call);
    require(p.G == 0 || (p.G == groups && p.N == out.sizes[0] && dtype == out.dtype), call,
            "dweight and dbias must share shape, groups and dtype");
    p.G = groups;
    p.N = out.sizes[0];
    dtype = out.dtype;
  }
  p.dweight_partial = partials[0] ? partials[0]->as<float>() : nullptr;
  p.dbias_partial = partials[1] ? partials[1]->as<float>() : nullptr;
  p.dweight = outs[0] ? outs[0]->data : nullptr;
  p.dbias = outs[1] ? outs[1]->data : nullptr;
  if (p.N == 0) return;
  const dim3 grid(static_cast<unsigned>((p.N + device::kWarp - 1) / device::kWarp), 2);
  const dim3 block(device::kWarp, device::kWarp);
  with_dtype(dtype, [&](auto element) {
    launch(call, target, grid, block, 0, norm::norm_weight_sums<decltype(element)>, p);
  });
}

}  // namespace transfuse
