// Checks, kernel choice and launch of causal_softmax; the kernels are in causal_softmax.cuh.
#include "causal_softmax/causal_softmax.cuh"

#include <algorithm>
#include <climits>

#include "dtypes.h"
#include "launchers.h"

namespace transfuse {
namespace {

using namespace causal_softmax;

void check_like(const TensorView& t, const TensorView& first, DType dtype, DType other, const Call& call) {
  require(t.dtype == dtype || t.dtype == other, call,
          "tensors must share a dtype of float32, float16 or bfloat16, but for a float32 bias and a bool mask");
  bool same = t.ndim == first.ndim;
  for (int d = 0; d < t.ndim && same; ++d) same = t.sizes[d] == first.sizes[d];
  require(same, call, "tensors must have the same sizes, with stride 0 where one is broadcast");
}

void check_output(const TensorView& t, const TensorView& first, const Call& call) {
  check_like(t, first, first.dtype, first.dtype, call);
  require(t.strides[t.ndim - 1] == 1 || t.sizes[t.ndim - 1] <= 1, call, "outputs must have contiguous keys");
}

void check_first(const TensorView& t, int query, const Call& call) {
  require(is_floating(t.dtype), call,
          "the first tensor must be float32, float16 or bfloat16");
  require(t.ndim >= 2, call, "tensors must be (rows..., keys)");
  require(query >= -1 && query < t.ndim - 1, call, "the dimension of queries must be a row dimension or -1");
}

int size_of(DType dtype) {
  return dtype == DType::Bool ? 1 : dtype == DType::Float32 ? 4 : 2;
}

// One aligned access at every (row, multiple of `vec`).
bool packs(const TensorView& t, int vec) {
  const int keys = t.ndim - 1;
  bool fits = t.strides[keys] == 1 && t.sizes[keys] % vec == 0 &&
              reinterpret_cast<uintptr_t>(t.data) % std::min(16, vec * size_of(t.dtype)) == 0;
  for (int d = 0; d < keys; ++d) fits = fits && (t.sizes[d] <= 1 || t.strides[d] % vec == 0);
  return fits;
}

Rows rows(const TensorView* t, int vec) {
  Rows r{};
  if (!t) return r;
  r.data = t->data;
  for (int d = 0; d < t->ndim - 1; ++d) r.row[d] = t->strides[d];
  r.column = t->strides[t->ndim - 1];
  r.packed = vec > 1 && packs(*t, vec);
  return r;
}

Grid grid(const TensorView& t, int query, int64_t diagonal) {
  Grid g{};
  g.dims = t.ndim - 1;
  for (int d = 0; d < g.dims; ++d) g.sizes[d] = t.sizes[d];
  g.query = query;
  g.N = t.sizes[g.dims];
  // So that i + diagonal + 1 cannot overflow; what lies beyond N or before the first key makes no difference.
  g.diagonal = std::max<int64_t>(std::min<int64_t>(diagonal, g.N), -(int64_t(1) << 62));
  return g;
}

int64_t count(const TensorView& t, int first, int last) {
  int64_t n = 1;
  for (int d = first; d < last; ++d) n *= t.sizes[d];
  return n;
}

// Rows (of threads) for `all` rows of N keys, ELEMENTS a thread; beyond kMaxColumns the loop kernel.
template <int ELEMENTS, typename Params>
void launch_rows(int64_t all, int64_t N, void (*row_kernel)(Params), void (*loop_kernel)(Params), const Params& p,
                 const Call& call, const LaunchTarget& target) {
  // More rows than blocks is no error: the kernels stride over them.
  const auto blocks = [](int64_t rows) { return dim3(static_cast<unsigned>(std::min<int64_t>(rows, INT_MAX))); };
  if (N > kMaxColumns<ELEMENTS>) {
    launch(call, target, blocks(all), dim3(kLoopThreads), 0, loop_kernel, p);
    return;
  }
  const int warps = static_cast<int>((N + ELEMENTS * 32 - 1) / (ELEMENTS * 32));
  const int rows_a_block = warps == 1 ? 4 : 1;  // 128 threads: enough to fill an SM, few enough to balance the tail
  launch(call, target, blocks((all + rows_a_block - 1) / rows_a_block), dim3(warps * 32, rows_a_block), 0, row_kernel,
         p);
}

template <typename T, typename B>
void launch_forward(const ForwardParams& p, int vec, const Call& call, const LaunchTarget& target) {
  constexpr int kVec = 16 / sizeof(T);
  if (vec == kVec) {
    launch_rows<kForwardElements<kVec>>(p.M, p.grid.N, causal_softmax_forward_row<T, B, kVec>,
                                        causal_softmax_forward_loop<T, B, kVec>, p, call, target);
  } else {
    launch_rows<kForwardElements<1>>(p.M, p.grid.N, causal_softmax_forward_row<T, B, 1>,
                                     causal_softmax_forward_loop<T, B, 1>, p, call, target);
  }
}

template <typename T, typename D>
void launch_backward(const BackwardParams& p, int vec, const Call& call, const LaunchTarget& target) {
  constexpr int kVec = 16 / sizeof(T);
  const int64_t all = p.chunks * p.groups;
  if (vec == kVec) {
    launch_rows<kBackwardElements<kVec>>(all, p.grid.N, causal_softmax_backward_row<T, D, kVec>,
                                         causal_softmax_backward_loop<T, D, kVec>, p, call, target);
  } else {
    launch_rows<kBackwardElements<1>>(all, p.grid.N, causal_softmax_backward_row<T, D, 1>,
                                      causal_softmax_backward_loop<T, D, 1>, p, call, target);
  }
}

// (chunks, groups, N) or, where bias is broadcast over the keys, (chunks, groups, 1).
void check_sums(const TensorView& sums, const BackwardParams& p, DType dtype, const Call& call) {
  require(sums.dtype == DType::Float32 || sums.dtype == dtype, call, "sums must be float32 or dout's dtype");
  require(sums.ndim == 3 && sums.sizes[0] == p.chunks && sums.sizes[1] == p.groups &&
              (sums.sizes[2] == p.grid.N || sums.sizes[2] == 1),
          call, "sums must be (chunks, groups, keys or 1)");
  const int64_t keys = sums.sizes[2];
  require((keys <= 1 || sums.strides[2] == 1) && (p.groups <= 1 || sums.strides[1] == keys) &&
              (p.chunks <= 1 || sums.strides[0] == keys * p.groups),
          call, "sums must be contiguous");
  const bool in_registers = p.grid.N <= kMaxColumns<kBackwardElements<1>> || keys < p.grid.N;
  require(p.members_a_chunk == 1 || in_registers || sums.dtype == DType::Float32, call,
          "sums over several rows of this many keys must be float32");
}

}  // namespace

void causal_softmax_forward(const TensorView& scores, const OptionalTensor& mask, const OptionalTensor& bias,
                            const TensorView& out, float scale, int query, int64_t diagonal,
                            const LaunchTarget& target) {
  const TensorView* m = present(mask);
  const TensorView* b = present(bias);
  const Call call("causal_softmax_forward",
                  {{"scores", &scores}, {"mask", m}, {"bias", b}, {"out", &out, Role::Output}});
  check_first(scores, query, call);
  check_output(out, scores, call);
  if (m) check_like(*m, scores, DType::Bool, DType::Bool, call);
  if (b) check_like(*b, scores, scores.dtype, DType::Float32, call);

  const int wide = 16 / size_of(scores.dtype);
  const int vec = packs(scores, wide) && packs(out, wide) ? wide : 1;
  ForwardParams p{};
  p.tensors[kScores] = rows(&scores, vec);
  p.tensors[kMask] = rows(m, vec);
  p.tensors[kBias] = rows(b, vec);
  p.tensors[kOut] = rows(&out, vec);
  p.grid = grid(scores, query, diagonal);
  p.M = count(scores, 0, scores.ndim - 1);
  p.scale = scale;
  if (p.M == 0 || p.grid.N == 0) return;

  const bool wide_bias = b && b->dtype == DType::Float32;
  with_dtypes(scores.dtype, wide_bias, [&](auto element, auto bias) {
    launch_forward<decltype(element), decltype(bias)>(p, vec, call, target);
  });
}

void causal_softmax_backward(const TensorView& dout, const TensorView& out, const TensorView& dscores,
                             const OptionalTensor& sums, int group_dims, int64_t members_a_chunk, float scale,
                             int query, int64_t diagonal, const LaunchTarget& target) {
  const TensorView* s = present(sums);
  // The loop kernel adds member after member in `sums` itself.
  const bool added_up = members_a_chunk > 1 && dout.sizes[dout.ndim - 1] > kMaxColumns<kBackwardElements<1>>;
  const Call call("causal_softmax_backward", {{"dout", &dout},
                                              {"out", &out},
                                              {"dscores", &dscores, Role::Output},
                                              {"sums", s, added_up ? Role::Workspace : Role::Output}});
  check_first(dout, query, call);
  check_like(out, dout, dout.dtype, dout.dtype, call);
  check_output(dscores, dout, call);
  require(group_dims >= 0 && group_dims <= dout.ndim - 1 && members_a_chunk > 0, call,
          "the first row dimensions are those of groups, and a chunk has at least one member");

  const int wide = 16 / size_of(dout.dtype);
  const bool sums_pack = !s || s->sizes[s->ndim - 1] == 1 || reinterpret_cast<uintptr_t>(s->data) % 16 == 0;
  const int vec = packs(dout, wide) && packs(out, wide) && packs(dscores, wide) && sums_pack ? wide : 1;
  BackwardParams p{};
  p.tensors[kDout] = rows(&dout, vec);
  p.tensors[kProbabilities] = rows(&out, vec);
  p.tensors[kDscores] = rows(&dscores, vec);
  p.grid = grid(dout, query, diagonal);
  p.group_dims = group_dims;
  p.groups = count(dout, 0, group_dims);
  p.members = count(dout, group_dims, dout.ndim - 1);
  p.members_a_chunk = members_a_chunk;
  p.chunks = (p.members + members_a_chunk - 1) / members_a_chunk;
  p.scale = scale;
  if (p.groups == 0 || p.members == 0 || p.grid.N == 0) return;
  if (s) {
    check_sums(*s, p, dout.dtype, call);
    p.sums = s->data;
    p.sum_keys = s->sizes[2] < p.grid.N;
  }

  const bool wide_sums = s && s->dtype == DType::Float32;
  with_dtypes(dout.dtype, wide_sums, [&](auto element, auto sum) {
    launch_backward<decltype(element), decltype(sum)>(p, vec, call, target);
  });
}

}  // namespace transfuse
