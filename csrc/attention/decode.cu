// Checks, tile choice and launches of attention decode; the kernels are in decode.cuh.
#include "attention/decode.cuh"

#include <algorithm>
#include <climits>

#include "attention/checks.h"
#include "launchers.h"

namespace transfuse {
namespace {

using attention::DecodeParams;
using attention::strided;

template <typename T, int D, int DV, int WARPS, int STAGES>
void launch_kernel(DecodeParams& p, const Call& call, const LaunchTarget& target) {
  using Kernel = attention::Decode<T, D, DV, WARPS, STAGES>;
  p.parts = std::max(1, (p.v_dim + DV - 1) / DV);  // one even without columns: lse
  p.row_tiles = (p.group * p.q_len + attention::kRows - 1) / attention::kRows;
  const int64_t blocks = int64_t(p.batch) * (p.heads / p.group) * p.splits * p.row_tiles * p.parts;
  require(blocks <= INT_MAX, call, "batch * key heads * splits * tiles of rows must fit one launch (split the batch)");
  launch(call, target, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads), Kernel::kSharedBytes,
         attention::attention_decode_kernel<T, D, DV, WARPS, STAGES>, p);
}

// 64 KB of keys and values under way in a block, a warp holding 16 keys a stage; wide fp32 divides the output's columns.
template <typename T>
void choose_tiles(DecodeParams& p, const Call& call, const LaunchTarget& target) {
  const int widest = std::max(p.head_dim, p.v_dim);
  constexpr bool kWide = sizeof(T) == 4;
  if (widest <= 64) {
    launch_kernel<T, 64, 64, 4, kWide ? 2 : 4>(p, call, target);
  } else if (widest <= 128) {
    launch_kernel<T, 128, 128, kWide ? 2 : 4, 2>(p, call, target);
  } else {
    launch_kernel<T, 256, kWide ? 128 : 256, kWide ? 1 : 2, 2>(p, call, target);
  }
  if (!p.partial_out) return;
  require(p.rows <= INT_MAX, call, "batch * heads * queries must fit one launch (split the batch)");
  launch(call, target, dim3(static_cast<unsigned>(p.rows)), dim3(attention::kCombineWarps * 32), 0,
         attention::attention_combine_kernel<T>, p);
}

}  // namespace

void attention_decode(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                      const TensorView& lse, const OptionalTensor& partial_out, const OptionalTensor& partial_highest,
                      const OptionalTensor& partial_totals, const OptionalTensor& mask, const OptionalTensor& bias,
                      const OptionalTensor& slopes, const OptionalTensor& sinks, const OptionalTensor& q_starts,
                      const OptionalTensor& k_starts, const OptionalTensor& k_lengths, const OptionalTensor& seed,
                      int64_t max_q, int64_t max_k, float scale, int left, int right, std::optional<int> first,
                      float softcap, double dropout_p, const LaunchTarget& target) {
  const Call call("attention_decode",
                  {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out, Role::Output}, {"lse", &lse, Role::Output},
                   {"partial_out", present(partial_out), Role::Workspace},
                   {"partial_highest", present(partial_highest), Role::Workspace},
                   {"partial_totals", present(partial_totals), Role::Workspace}, {"mask", present(mask)},
                   {"bias", present(bias)}, {"slopes", present(slopes)}, {"sinks", present(sinks)},
                   {"k_lengths", present(k_lengths)}, {"seed", present(seed)}});
  require(!q_starts && !k_starts, call, "rows are packed nowhere here");
  DecodeParams p{attention::problem(call, q, k, v, mask, bias, slopes, q_starts, k_starts, k_lengths, seed, max_q, max_k,
                                    scale, left, right, first, softcap, dropout_p)};
  require(attention::like(out, q, v.sizes[3]), call, "out must be like q, as wide as v, with rows aligned to 16 bytes");
  require(attention::statistics_of(lse, q), call, "lse must be (batch, heads, rows, 1) in float32");
  require(attention::broadcasts(present(sinks), 1, q.sizes[1], 1, 1) && (!sinks || sinks->dtype == DType::Float32), call,
          "sinks must be (1, heads, 1, 1) in float32");
  p.rows = p.batch * q.sizes[1] * max_q;
  p.splits = 1;
  require(partial_out.has_value() == partial_highest.has_value() &&
              partial_out.has_value() == partial_totals.has_value(),
          call, "partial results must come together");
  if (partial_out) {
    const int64_t splits = partial_out->sizes[0], sizes[] = {splits, p.rows, v.sizes[3]};
    const auto contiguous = [&](const TensorView& t, int ndim) {
      bool ok = t.ndim == ndim && t.dtype == DType::Float32 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
      int64_t stride = 1;
      for (int d = ndim - 1; ok && d >= 0; stride *= sizes[d--]) {
        ok = t.sizes[d] == sizes[d] && (sizes[d] <= 1 || t.strides[d] == stride);
      }
      return ok;
    };
    require(splits >= 1 && splits <= attention::kMostSplits && contiguous(*partial_out, 3) &&
                contiguous(*partial_highest, 2) && contiguous(*partial_totals, 2),
            call, "partial results must be (up to 128 splits, rows, columns) and (splits, rows) in contiguous float32");
    p.splits = static_cast<int>(splits);
    p.partial_out = partial_out->as<float>();
    p.partial_highest = partial_highest->as<float>(), p.partial_totals = partial_totals->as<float>();
  }
  if (p.rows == 0) return;
  p.out = strided(&out), p.lse = strided(&lse), p.sinks = strided(present(sinks));
  p.rich = attention::rich(p);
  with_dtype(q.dtype, [&](auto element) { choose_tiles<decltype(element)>(p, call, target); });
}

}  // namespace transfuse
