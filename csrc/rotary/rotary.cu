// Checks, division of the work and launch of rotary; the kernel is in rotary.cuh.
#include "rotary/rotary.cuh"

#include <algorithm>
#include <climits>

#include "dtypes.h"
#include "launchers.h"

namespace transfuse {
namespace {

using rotary::kThreads;
using rotary::Params;
using rotary::Rows;

// From so many tokens on they fill a GPU with blocks that go through all heads of a token.
constexpr int64_t kManyTokens = 2048;

Rows rows(const TensorView* t) {
  if (!t) return {};
  const auto stride = [&](int d) { return t->sizes[d] == 1 ? 0 : t->strides[d]; };
  return {t->data, stride(0), stride(1), stride(2), stride(3), t->dtype};
}

// 16-byte accesses to packs of `n` elements, at every multiple of n of every row.
bool packs_align(const TensorView* t, int64_t n) {
  if (!t) return true;
  bool ok = reinterpret_cast<uintptr_t>(t->data) % 16 == 0 && t->sizes[3] % n == 0;
  for (int d = 0; d < 3; ++d) ok = ok && (t->sizes[d] <= 1 || t->strides[d] % n == 0);
  return ok && (t->sizes[3] <= 1 || t->strides[3] == 1);
}

template <typename T, int N>
void launch_kernel(Params& p, const Call& call, const LaunchTarget& target) {
  const int widest = std::max({p.half, (p.head_dim - 2 * p.half + 1) / 2, p.v_heads ? (p.v_dim + 1) / 2 : 1, 1});
  const int heads = p.q_heads + p.kv_heads + p.v_heads;
  p.columns = std::min((widest + N - 1) / N, kThreads);
  p.lanes = std::min(kThreads / p.columns, heads);
  p.tokens = static_cast<int>(std::min<int64_t>(kThreads / (p.columns * p.lanes), p.all_tokens));
  p.tiles = p.all_tokens < kManyTokens ? (heads + p.lanes - 1) / p.lanes : 1;
  const int64_t blocks = (p.all_tokens + p.tokens - 1) / p.tokens * p.tiles;
  require(blocks <= INT_MAX, call, "batch * length must fit one launch (split the batch)");
  launch(call, target, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, rotary::rotary_kernel<T, N>, p);
}

template <typename T>
void choose_pack(Params& p, bool aligned, const Call& call, const LaunchTarget& target) {
  if (aligned) {
    launch_kernel<T, 16 / sizeof(T)>(p, call, target);
  } else {
    launch_kernel<T, 1>(p, call, target);
  }
}

}  // namespace

void rotary_append(const OptionalTensor& q, const TensorView& k, const OptionalTensor& v, const OptionalTensor& cos,
                   const OptionalTensor& sin, const OptionalTensor& q_out, const TensorView& k_out,
                   const OptionalTensor& v_out, const OptionalTensor& starts, int64_t start, bool inverse,
                   const LaunchTarget& target) {
  // A whole tensor rather than places in a cache: all of it is written.
  const bool whole = !starts && start == 0 && k_out.ndim == 4 && k.ndim == 4 && k_out.sizes[1] == k.sizes[1];
  const Role written = whole ? Role::Output : Role::Updated;
  const Call call("rotary_append", {{"q", present(q)}, {"k", &k}, {"v", present(v)}, {"cos", present(cos)},
                                    {"sin", present(sin)}, {"q_out", present(q_out), Role::Output},
                                    {"k_out", &k_out, written}, {"v_out", present(v_out), written},
                                    {"starts", present(starts)}});
  require(q.has_value() == q_out.has_value() && v.has_value() == v_out.has_value() &&
              cos.has_value() == sin.has_value(),
          call, "q and q_out, v and v_out, cos and sin must come together");
  for (const TensorView* t : {present(q), &k, present(v), present(q_out), &k_out, present(v_out), present(cos),
                              present(sin)}) {
    require(!t || (t->ndim == 4 && is_floating(t->dtype)), call,
            "tensors must be (batch, tokens, heads, columns) of float32, float16 or bfloat16");
  }
  const auto same = [](const TensorView& a, const TensorView& b, int d) { return a.sizes[d] == b.sizes[d]; };
  require(same(k, k_out, 0) && same(k, k_out, 2) && same(k, k_out, 3), call, "k and k_out must agree but in tokens");
  require(!v || (v->dtype == k.dtype && same(*v, k, 0) && same(*v, k, 1) && same(*v, k, 2) && same(*v_out, k_out, 0) &&
                 same(*v_out, k_out, 1) && same(*v_out, k_out, 2) && same(*v, *v_out, 3)),
          call, "v must be like k, v_out like k_out, but in columns");
  require(!q || (q->dtype == k.dtype && q_out->dtype == k.dtype && same(*q, k, 0) && same(*q, k, 1) &&
                 same(*q, k, 3) && std::equal(q->sizes, q->sizes + 4, q_out->sizes)),
          call, "q must be like k but in heads, q_out like q");
  require(!cos || (cos->dtype == sin->dtype && (cos->dtype == k.dtype || cos->dtype == DType::Float32) &&
                   std::equal(cos->sizes, cos->sizes + 4, sin->sizes) && same(*cos, k, 1) && cos->sizes[2] == 1 &&
                   (cos->sizes[0] == 1 || same(*cos, k, 0)) && cos->sizes[3] % 2 == 0 && cos->sizes[3] <= k.sizes[3]),
          call, "cos and sin must be (batch or 1, tokens, 1, even and at most head_dim) in k's dtype or float32");
  require(!starts || (starts->ndim == 1 && same(*starts, k, 0) &&
                      (starts->dtype == DType::Int32 || starts->dtype == DType::Int64)),
          call, "starts must be (batch) in int32 or int64");
  require(k.sizes[3] <= INT_MAX / 4 && (!v || v->sizes[3] <= INT_MAX / 4) && k.sizes[2] <= INT_MAX / 4 &&
              (!q || q->sizes[2] <= INT_MAX / 4),
          call, "heads and columns must fit 32 bits");

  Params p{};
  p.q = rows(present(q)), p.k = rows(&k), p.v = rows(present(v));
  p.q_out = rows(present(q_out)), p.k_out = rows(&k_out), p.v_out = rows(present(v_out));
  p.cos = rows(present(cos)), p.sin = rows(present(sin));
  if (starts) p.starts = {starts->data, starts->strides[0], 0, 0, 0, starts->dtype};
  p.start = start, p.all_tokens = k.sizes[0] * k.sizes[1], p.length = k.sizes[1], p.room = k_out.sizes[1];
  p.q_heads = q ? static_cast<int>(q->sizes[2]) : 0;
  p.kv_heads = static_cast<int>(k.sizes[2]);
  p.v_heads = v ? p.kv_heads : 0;
  p.half = cos ? static_cast<int>(cos->sizes[3] / 2) : 0;
  p.head_dim = static_cast<int>(k.sizes[3]);
  p.v_dim = v ? static_cast<int>(v->sizes[3]) : 0;
  p.inverse = inverse;
  if (p.all_tokens * (p.q_heads + p.kv_heads) * (p.head_dim + p.v_dim) == 0) return;

  const int64_t n = k.dtype == DType::Float32 ? 4 : 8;
  bool aligned = p.half % n == 0 && k_out.dtype == k.dtype && (!v || v_out->dtype == k.dtype);
  for (const TensorView* t : {present(q), &k, present(v), present(q_out), &k_out, present(v_out), present(cos),
                              present(sin)}) {
    aligned = aligned && packs_align(t, n);
  }
  with_dtype(k.dtype, [&](auto element) { choose_pack<decltype(element)>(p, aligned, call, target); });
}

}  // namespace transfuse
