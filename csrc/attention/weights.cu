// Checks, tile choice and launch of attention weights; the kernel is in weights.cuh.
#include "attention/weights.cuh"

#include <climits>

#include "attention/checks.h"
#include "launchers.h"

namespace transfuse {
namespace {

using attention::strided;
using attention::WeightsParams;

template <typename T, int D, int BLOCK_M, int BLOCK_N>
void launch_kernel(WeightsParams& p, const Call& call, const LaunchTarget& target) {
  p.q_tiles = (p.q_len + BLOCK_M - 1) / BLOCK_M, p.k_tiles = (p.k_len + BLOCK_N - 1) / BLOCK_N;
  const int64_t rows = int64_t(p.batch) * p.heads * p.q_tiles;
  require(rows <= INT_MAX / p.k_tiles, call, "tiles of weights must fit one launch (split the batch)");
  launch(call, target, dim3(static_cast<unsigned>(rows * p.k_tiles)), dim3(BLOCK_M * 2),
         attention::kWeightsShared<T, D, BLOCK_M, BLOCK_N>, attention::attention_weights_kernel<T, D, BLOCK_M, BLOCK_N>,
         p);
}

// Tiles within 64 KB, so that another block loads while one computes.
template <typename T>
void choose_tiles(WeightsParams& p, const Call& call, const LaunchTarget& target) {
  if (p.head_dim <= 64) {
    launch_kernel<T, 64, 64, 64>(p, call, target);
  } else if (p.head_dim <= 128) {
    launch_kernel<T, 128, 64, 64>(p, call, target);
  } else {
    constexpr int kBlock = sizeof(T) == 4 ? 32 : 64;
    launch_kernel<T, 256, kBlock, kBlock>(p, call, target);
  }
}

}  // namespace

void attention_weights(const TensorView& q, const TensorView& k, const TensorView& lse, const TensorView& weights,
                       const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& slopes,
                       const OptionalTensor& sinks, const OptionalTensor& q_starts, const OptionalTensor& k_starts,
                       const OptionalTensor& k_lengths, const OptionalTensor& seed, int64_t max_q, int64_t max_k,
                       float scale, int left, int right, std::optional<int> first, float softcap, double dropout_p,
                       const LaunchTarget& target) {
  const Call call("attention_weights", {{"q", &q}, {"k", &k}, {"lse", &lse}, {"weights", &weights, Role::Output},
                                        {"mask", present(mask)}, {"bias", present(bias)}, {"slopes", present(slopes)}});
  require(!sinks && !q_starts && !k_starts && !k_lengths && !seed, call, "sinks are in lse; rows are dense, none drops");
  WeightsParams p{attention::problem(call, q, k, k, mask, bias, slopes, q_starts, k_starts, k_lengths, seed, max_q,
                                     max_k, scale, left, right, first, softcap, dropout_p)};
  require(attention::statistics_of(lse, q), call, "lse must be (batch, heads, rows, 1) in float32");
  bool fits = weights.ndim == 4 && weights.dtype == q.dtype && weights.sizes[3] == k.sizes[2];
  for (int d = 0; fits && d < 3; ++d) fits = weights.sizes[d] == q.sizes[d];
  require(fits && (weights.strides[3] == 1 || weights.sizes[3] <= 1), call,
          "weights must be (batch, heads, queries, keys) of q's dtype, keys contiguous");
  if (q.sizes[0] * q.sizes[1] * q.sizes[2] * k.sizes[2] == 0) return;
  p.lse = strided(&lse), p.weights = strided(&weights);
  p.rich = attention::rich(p);
  const int64_t both = q.dtype == DType::Float32 ? 8 : 4;
  p.pairs = reinterpret_cast<uintptr_t>(weights.data) % both == 0;
  for (int d = 0; d < 3; ++d) p.pairs = p.pairs && (weights.sizes[d] == 1 || weights.strides[d] % 2 == 0);
  with_dtype(q.dtype, [&](auto element) { choose_tiles<decltype(element)>(p, call, target); });
}

}  // namespace transfuse
