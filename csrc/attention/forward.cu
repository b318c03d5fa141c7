// Checks, kernel choice and launch of attention forward; the kernel is in forward.cuh.
#include "attention/forward.cuh"

#include <algorithm>
#include <climits>
#include <cmath>

#include "launchers.h"

namespace transfuse {
namespace {

using attention::ForwardParams;
using attention::Strided;

const TensorView* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }

Strided strided(const TensorView* t) {
  if (!t) return {};
  const auto stride = [&](int d) { return t->sizes[d] == 1 ? 0 : t->strides[d]; };
  return {t->data, stride(0), stride(1), stride(2), stride(3)};
}

// 16-byte accesses at every multiple of 16 bytes of every row.
bool rows_align(const TensorView& t) {
  const int64_t chunk = t.dtype == DType::Float32 ? 4 : 8;
  bool ok = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.sizes[3] % chunk == 0;
  for (int d = 0; d < 3; ++d) ok = ok && (t.sizes[d] <= 1 || t.strides[d] % chunk == 0);
  return ok && (t.strides[3] == 1 || t.sizes[3] <= 1);
}

bool broadcasts(const TensorView* t, int64_t batch, int64_t heads, int64_t q_len, int64_t k_len) {
  if (!t) return true;
  const int64_t target[4] = {batch, heads, q_len, k_len};
  bool ok = t->ndim == 4;
  for (int d = 0; ok && d < 4; ++d) ok = t->sizes[d] == 1 || t->sizes[d] == target[d];
  return ok;
}

bool vector_of(const TensorView* t, int64_t length, DType dtype) {
  return !t || (t->ndim == 1 && t->sizes[0] == length && t->dtype == dtype && (t->strides[0] == 1 || length <= 1));
}

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
  const bool rich = p.mask.data || p.bias.data || p.slopes.data || p.sinks.data || p.seed || p.softcap > 0.0f;
  if (rich) {
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
                   {"mask", pointer(mask)}, {"bias", pointer(bias)}, {"slopes", pointer(slopes)},
                   {"sinks", pointer(sinks)}, {"q_starts", pointer(q_starts)}, {"k_starts", pointer(k_starts)},
                   {"k_lengths", pointer(k_lengths)}, {"seed", pointer(seed)}});
  for (const TensorView* t : {&q, &k, &v, &out}) {
    require(t->ndim == 4 && t->dtype == q.dtype && rows_align(*t), call,
            "q, k, v and out must be (batch, heads, rows, columns) of one dtype, with rows aligned to 16 bytes");
  }
  require(q.dtype == DType::Float32 || q.dtype == DType::Float16 || q.dtype == DType::BFloat16, call,
          "q must be float32, float16 or bfloat16");
  require(q.sizes[3] == k.sizes[3] && v.sizes[3] == out.sizes[3] && q.sizes[3] <= 256 && v.sizes[3] <= 256, call,
          "q and k, v and out must be equally wide, up to 256");
  require(k.sizes[1] > 0 && q.sizes[1] % k.sizes[1] == 0 && v.sizes[1] == k.sizes[1] && v.sizes[2] == k.sizes[2] &&
              out.sizes[1] == q.sizes[1] && out.sizes[2] == q.sizes[2],
          call, "q's heads must be a multiple of k's and v's, rows equal in k and v, q and out");
  require(lse.ndim == 4 && lse.dtype == DType::Float32 && lse.sizes[2] == q.sizes[2] && lse.sizes[1] == q.sizes[1],
          call, "lse must be (batch, heads, rows, 1) in float32");
  const int64_t batch = packed ? q_starts->sizes[0] - 1 : q.sizes[0];
  require(packed == k_starts.has_value() && batch >= 0 && vector_of(pointer(q_starts), batch + 1, DType::Int32) &&
              vector_of(pointer(k_starts), batch + 1, DType::Int32) &&
              vector_of(pointer(k_lengths), batch, DType::Int32) && vector_of(pointer(seed), 2, DType::Int64),
          call, "starts and lengths must be contiguous int32, seed int64 (2)");
  require(packed || (max_q == q.sizes[2] && max_k == k.sizes[2] && k.sizes[0] == batch && v.sizes[0] == batch), call,
          "batch and lengths must agree");
  require(max_q <= INT_MAX / 2 && max_k <= INT_MAX / 2 && q.sizes[2] <= INT_MAX && k.sizes[2] <= INT_MAX, call,
          "lengths must fit 32 bits");
  for (const TensorView* t : {pointer(mask), pointer(bias)}) {
    require(broadcasts(t, batch, q.sizes[1], max_q, max_k), call, "mask and bias must broadcast to the scores");
  }
  require((!mask || mask->dtype == DType::Bool) && (!bias || bias->dtype == q.dtype || bias->dtype == DType::Float32),
          call, "mask must be bool, bias q's dtype or float32");
  for (const TensorView* t : {pointer(slopes), pointer(sinks)}) {
    require(broadcasts(t, batch, q.sizes[1], 1, 1) && (!t || t->dtype == DType::Float32), call,
            "slopes and sinks must be (batch or 1, heads, 1, 1) in float32");
  }
  if (batch * q.sizes[1] * max_q == 0) return;

  ForwardParams p{};
  p.q = strided(&q), p.k = strided(&k), p.v = strided(&v), p.out = strided(&out), p.lse = strided(&lse);
  p.mask = strided(pointer(mask)), p.bias = strided(pointer(bias));
  p.slopes = strided(pointer(slopes)), p.sinks = strided(pointer(sinks));
  p.q_starts = packed ? q_starts->as<int32_t>() : nullptr;
  p.k_starts = packed ? k_starts->as<int32_t>() : nullptr;
  p.k_lengths = k_lengths ? k_lengths->as<int32_t>() : nullptr;
  p.seed = seed ? seed->as<int64_t>() : nullptr;
  p.heads = static_cast<int>(q.sizes[1]);
  p.group = static_cast<int>(q.sizes[1] / k.sizes[1]);
  p.q_len = static_cast<int>(max_q);
  p.k_len = static_cast<int>(max_k);
  p.head_dim = static_cast<int>(q.sizes[3]);
  p.v_dim = static_cast<int>(v.sizes[3]);
  p.left = left, p.right = right, p.first = first.value_or(0), p.lower_right = !first;
  p.bias_is_float = bias && bias->dtype == DType::Float32;
  p.scale = scale, p.softcap = softcap;
  p.threshold = static_cast<uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
  p.grow = seed ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 1.0f;
  const int64_t rows = batch * q.sizes[1];
  switch (q.dtype) {
    case DType::Float32:
      return choose_tiles<float>(p, rows, call, target);
    case DType::Float16:
      return choose_tiles<__half>(p, rows, call, target);
    default:
      return choose_tiles<__nv_bfloat16>(p, rows, call, target);
  }
}

}  // namespace transfuse
