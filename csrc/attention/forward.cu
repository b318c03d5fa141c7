// Checks, kernel choice and launch of attention forward; the kernel is in forward.cuh.
#include "attention/forward.cuh"

#include <algorithm>
#include <climits>

#include "attention/checks.h"
#include "launchers.h"

namespace transfuse {
namespace {

using attention::ForwardParams;
using attention::strided;

template <typename T, int D, int DV, int BLOCK_M, int BLOCK_N, bool RICH>
void launch_kernel(ForwardParams& p, int64_t rows, const Call& call, const LaunchTarget& target) {
  using Kernel = attention::Forward<T, D, DV, BLOCK_M, BLOCK_N, RICH>;
  p.tiles = (p.q_len + BLOCK_M - 1) / BLOCK_M;
  p.parts = std::max(1, (p.v_dim + DV - 1) / DV);  // one even without columns: lse
  const int64_t blocks = rows * p.tiles * p.parts;
  require(blocks <= INT_MAX, call, "batch * heads * tiles of queries must fit one launch (split the batch)");
  launch(call, target, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads), Kernel::kSharedBytes,
         attention::attention_forward_kernel<T, D, DV, BLOCK_M, BLOCK_N, RICH>, p);
}

template <typename T, int D, int DV, int BLOCK_M, int BLOCK_N>
void choose_features(ForwardParams& p, int64_t rows, const Call& call, const LaunchTarget& target) {
  if (attention::rich(p) || p.sinks.data) {
    launch_kernel<T, D, DV, BLOCK_M, BLOCK_N, true>(p, rows, call, target);
  } else {
    launch_kernel<T, D, DV, BLOCK_M, BLOCK_N, false>(p, rows, call, target);
  }
}

// Tiles: O takes DV / 2 registers a thread, S BLOCK_N / 2, so that BLOCK_N shrinks where DV is 256; shared memory stays
// within the 99 KB that a block may have on every GPU from compute capability 8.0 on. fp32 takes twice the bytes, and
// registers for the parts of its products: DV = 128 is what fits.
template <typename T>
void choose_tiles(ForwardParams& p, int64_t rows, const Call& call, const LaunchTarget& target) {
  const int widest = p.head_dim > p.v_dim ? p.head_dim : p.v_dim;
  constexpr bool kWide = sizeof(T) == 4;
  if (widest <= 64) {
    choose_features<T, 64, 64, 64, kWide ? 32 : 64>(p, rows, call, target);
  } else if (widest <= 128) {
    choose_features<T, 128, 128, 64, kWide ? 16 : 64>(p, rows, call, target);
  } else {
    choose_features<T, 256, kWide ? 128 : 256, kWide ? 32 : 64, kWide ? 16 : 32>(p, rows, call, target);
  }
}

}  // namespace

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                       const TensorView& lse, const OptionalTensor& mask, const OptionalTensor& bias,
                       const OptionalTensor& slopes, const OptionalTensor& sinks, const OptionalTensor& q_starts,
                       const OptionalTensor& k_starts, const OptionalTensor& k_lengths, const OptionalTensor& seed,
                       int64_t max_q, int64_t max_k, float scale, int left, int right, std::optional<int> first,
                       float softcap, double dropout_p, const LaunchTarget& target) {
  const bool packed = q_starts.has_value();
  const Role written = packed ? Role::Updated : Role::Output;  // packed: rows of no sequence keep what they hold
  const Call call("attention_forward",
                  {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out, written}, {"lse", &lse, written},
                   {"mask", present(mask)}, {"bias", present(bias)}, {"slopes", present(slopes)},
                   {"sinks", present(sinks)}, {"q_starts", present(q_starts)}, {"k_starts", present(k_starts)},
                   {"k_lengths", present(k_lengths)}, {"seed", present(seed)}});
  ForwardParams p{};
  static_cast<attention::Problem&>(p) =
      attention::problem(call, q, k, v, mask, bias, slopes, q_starts, k_starts, k_lengths, seed, max_q, max_k, scale,
                         left, right, first, softcap, dropout_p);
  require(attention::like(out, q, v.sizes[3]), call, "out must be like q, as wide as v, with rows aligned to 16 bytes");
  require(attention::statistics_of(lse, q), call, "lse must be (batch, heads, rows, 1) in float32");
  require(attention::broadcasts(present(sinks), 1, q.sizes[1], 1, 1) && (!sinks || sinks->dtype == DType::Float32),
          call, "sinks must be (1, heads, 1, 1) in float32");
  if (p.batch * q.sizes[1] * max_q == 0) return;
  p.out = strided(&out), p.lse = strided(&lse), p.sinks = strided(present(sinks));
  const int64_t rows = p.batch * q.sizes[1];
  with_dtype(q.dtype, [&](auto element) { choose_tiles<decltype(element)>(p, rows, call, target); });
}

}  // namespace transfuse
