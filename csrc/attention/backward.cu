// Checks, kernel choice and launch of attention backward; the kernels are in backward_statistics.cuh, backward.cuh and
// bias_grad.cuh.
#include <algorithm>

#include "attention/backward_launch.h"
#include "attention/backward_statistics.cuh"
#include "launchers.h"

namespace transfuse {
namespace {

using attention::strided;

// Tiles: dQ takes OUT / 2 registers a thread, S and dP LOOP / 2 together; shared memory stays within 99 KB.
template <typename T>
void choose_tiles(attention::BackwardParams& p, const Call& call, const LaunchTarget& target) {
  const int widest = std::max(p.head_dim, p.v_dim);
  constexpr bool kWide = sizeof(T) == 4;
  if (widest <= 64) {
    attention::choose_features<T, 64, 64, 64, kWide ? 32 : 64, 2, false>(p, call, target);
  } else if (widest <= 128) {
    attention::choose_features<T, 128, 128, 64, kWide ? 16 : 32, 2, false>(p, call, target);
  } else {
    attention::choose_features<T, 256, kWide ? 128 : 256, kWide ? 32 : 64, 16, kWide ? 1 : 2, false>(p, call, target);
  }
}

template <typename T>
void launch_statistics(attention::StatisticsParams p, const Call& call, const LaunchTarget& target) {
  p.tiles = (p.q_len + attention::kStatisticsRows - 1) / attention::kStatisticsRows;
  const unsigned grid = attention::grid_of(int64_t(p.batch) * p.heads * p.tiles, call);
  launch(call, target, dim3(grid), dim3(attention::kStatisticsThreads), 0, attention::attention_backward_statistics<T>,
         p);
}

// (batch, heads, tiles of the fewest queries, 1) or absent.
bool partial_sums(const TensorView* t, const attention::Problem& p) {
  return !t || (t->ndim == 4 && t->dtype == DType::Float32 && t->sizes[0] == p.batch && t->sizes[1] == p.heads &&
                t->sizes[2] >= (p.q_len + 31) / 32);
}

void check_bias(const TensorView* dbias, const TensorView* partial, const TensorView* bias, const attention::Problem& p,
                const Call& call) {
  const auto fits = [&](const TensorView& t, int first) {
    bool ok = bias && t.ndim == 4 + first && (t.dtype == DType::Float32 || t.dtype == bias->dtype);
    for (int d = 0; ok && d < 4; ++d) ok = t.sizes[first + d] == bias->sizes[d];
    return ok;
  };
  const int64_t scores[4] = {p.batch, p.heads, p.q_len, p.k_len};
  if (dbias) {
    require(fits(*dbias, 0) && std::equal(scores, scores + 4, dbias->sizes), call,
            "dbias must have bias's shape, (batch, heads, q_len, k_len), and its dtype or float32");
  }
  if (!partial) return;
  require(fits(*partial, 1), call, "dbias_partial must be (splits, ...) of bias's shape, in its dtype or float32");
  int64_t stride = 1;
  for (int d = 4; d >= 0; stride *= partial->sizes[d--]) {
    require(partial->sizes[d] == 1 || partial->strides[d] == stride, call, "dbias_partial must be contiguous");
  }
}

}  // namespace

void attention_backward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                        const TensorView& lse, const TensorView& dout, const OptionalTensor& dlse,
                        const TensorView& statistics, const TensorView& dq, const TensorView& dk, const TensorView& dv,
                        const OptionalTensor& dbias, const OptionalTensor& dbias_partial, const OptionalTensor& dslopes,
                        const OptionalTensor& dsinks, const OptionalTensor& mask, const OptionalTensor& bias,
                        const OptionalTensor& slopes, const OptionalTensor& sinks, const OptionalTensor& q_starts,
                        const OptionalTensor& k_starts, const OptionalTensor& k_lengths, const OptionalTensor& seed,
                        int64_t max_q, int64_t max_k, float scale, int left, int right, std::optional<int> first,
                        float softcap, double dropout_p, const LaunchTarget& target) {
  // Packed: rows of no sequence keep what they hold. Of partial sums and of dbias, what no tile covers keeps its zeros.
  const Role written = q_starts ? Role::Updated : Role::Output;
  const Call call("attention_backward",
                  {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}, {"lse", &lse}, {"dout", &dout},
                   {"dlse", present(dlse)}, {"statistics", &statistics, Role::Workspace}, {"dq", &dq, written},
                   {"dk", &dk, written}, {"dv", &dv, written}, {"dbias", present(dbias), Role::Updated},
                   {"dbias_partial", present(dbias_partial), Role::Output},
                   {"dslopes", present(dslopes), Role::Updated}, {"dsinks", present(dsinks), Role::Updated},
                   {"mask", present(mask)}, {"bias", present(bias)},
                   {"slopes", present(slopes)}, {"sinks", present(sinks)}, {"q_starts", present(q_starts)},
                   {"k_starts", present(k_starts)}, {"k_lengths", present(k_lengths)}, {"seed", present(seed)}});
  attention::StatisticsParams p{};
  static_cast<attention::Problem&>(p) =
      attention::problem(call, q, k, v, mask, bias, slopes, q_starts, k_starts, k_lengths, seed, max_q, max_k, scale,
                         left, right, first, softcap, dropout_p);
  require(attention::like(dq, q, q.sizes[3]) && attention::like(dk, k, k.sizes[3]) &&
              attention::like(dv, v, v.sizes[3]) && attention::like(out, q, v.sizes[3]) &&
              attention::like(dout, q, v.sizes[3]),
          call, "dq, dk, dv must be like q, k, v; out, dout like q, as wide as v; all with rows aligned to 16 bytes");
  require(attention::statistics_of(lse, q) && (!dlse || attention::statistics_of(*dlse, q)), call,
          "lse and dlse must be (batch, heads, rows, 1) in float32");
  require(attention::statistics_of(statistics, q) && statistics.sizes[3] == 2 && statistics.strides[3] == 1 &&
              statistics.strides[2] == 2,
          call, "statistics must be (batch, heads, rows, 2) in float32, rows contiguous");
  require(partial_sums(present(dslopes), p) && partial_sums(present(dsinks), p), call,
          "dslopes and dsinks must be (batch, heads, tiles of 32 queries, 1) in float32");
  require(attention::broadcasts(present(sinks), 1, q.sizes[1], 1, 1) && (!sinks || sinks->dtype == DType::Float32) &&
              (!dsinks || sinks) && (!dslopes || slopes),
          call, "sinks must be (1, heads, 1, 1) in float32, and be there where dsinks is");
  check_bias(present(dbias), present(dbias_partial), present(bias), p, call);
  if (int64_t(p.batch) * p.heads * max_q == 0) return;

  p.dout = strided(&dout), p.statistics = strided(&statistics);
  p.statistics.row = 2;  // of a single row too
  p.dq = strided(&dq), p.dk = strided(&dk), p.dv = strided(&dv);
  p.dbias = strided(present(dbias)), p.dslopes = strided(present(dslopes));
  p.dbias_is_float = dbias && dbias->dtype == DType::Float32;
  p.out = strided(&out), p.lse = strided(&lse), p.dlse = strided(present(dlse));
  p.sinks = strided(present(sinks)), p.dsinks = strided(present(dsinks));
  with_dtype(q.dtype, [&](auto element) {
    using T = decltype(element);
    launch_statistics<T>(p, call, target);
    choose_tiles<T>(p, call, target);
  });
  attention::launch_keys(p, q.dtype, call, target);
  if (dbias_partial) attention::launch_bias_gradient(p, *dbias_partial, q.dtype, call, target);
}

}  // namespace transfuse
