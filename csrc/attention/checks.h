// What every launcher of attention checks, and how it reads its common arguments into a Problem.
#pragma once

#include <climits>
#include <cmath>

#include "attention/scores.cuh"
#include "dtypes.h"
#include "launchers.h"

namespace transfuse::attention {

inline Strided strided(const TensorView* t) {
  if (!t) return {};
  const auto stride = [&](int d) { return t->sizes[d] == 1 ? 0 : t->strides[d]; };
  return {t->data, stride(0), stride(1), stride(2), stride(3)};
}

// 16-byte accesses at every multiple of 16 bytes of every row.
inline bool rows_align(const TensorView& t) {
  const int64_t chunk = t.dtype == DType::Float32 ? 4 : 8;
  bool ok = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.sizes[3] % chunk == 0;
  for (int d = 0; d < 3; ++d) ok = ok && (t.sizes[d] <= 1 || t.strides[d] % chunk == 0);
  return ok && (t.strides[3] == 1 || t.sizes[3] <= 1);
}

inline bool broadcasts(const TensorView* t, int64_t batch, int64_t heads, int64_t q_len, int64_t k_len) {
  if (!t) return true;
  const int64_t target[4] = {batch, heads, q_len, k_len};
  bool ok = t->ndim == 4;
  for (int d = 0; ok && d < 4; ++d) ok = t->sizes[d] == 1 || t->sizes[d] == target[d];
  return ok;
}

inline bool vector_of(const TensorView* t, int64_t length, DType dtype) {
  return !t || (t->ndim == 1 && t->sizes[0] == length && t->dtype == dtype && (t->strides[0] == 1 || length <= 1));
}

// `t` is like q or k, `width` wide, with aligned rows.
inline bool like(const TensorView& t, const TensorView& rows, int64_t width) {
  bool ok = t.ndim == 4 && t.dtype == rows.dtype && t.sizes[3] == width && rows_align(t);
  for (int d = 0; ok && d < 3; ++d) ok = t.sizes[d] == rows.sizes[d];
  return ok;
}

// Of each query a number in fp32: (batch, heads, q_len, 1).
inline bool statistics_of(const TensorView& t, const TensorView& q) {
  bool ok = t.ndim == 4 && t.dtype == DType::Float32;
  for (int d = 0; ok && d < 3; ++d) ok = t.sizes[d] == q.sizes[d];
  return ok;
}

// Checks the inputs that all launchers share and gives them to the kernels.
inline Problem problem(const Call& call, const TensorView& q, const TensorView& k, const TensorView& v,
                       const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& slopes,
                       const OptionalTensor& q_starts, const OptionalTensor& k_starts, const OptionalTensor& k_lengths,
                       const OptionalTensor& seed, int64_t max_q, int64_t max_k, float scale, int left, int right,
                       std::optional<int> first, float softcap, double dropout_p) {
  for (const TensorView* t : {&q, &k, &v}) {
    require(t->ndim == 4 && t->dtype == q.dtype && rows_align(*t), call,
            "q, k and v must be (batch, heads, rows, columns) of one dtype, with rows aligned to 16 bytes");
  }
  require(is_floating(q.dtype), call,
          "q must be float32, float16 or bfloat16");
  require(q.sizes[3] == k.sizes[3] && q.sizes[3] <= 256 && v.sizes[3] <= 256, call,
          "q and k must be equally wide, they and v up to 256");
  require(k.sizes[1] > 0 && q.sizes[1] % k.sizes[1] == 0 && like(k, v, k.sizes[3]), call,
          "q's heads must be a multiple of k's, k and v agree in batch, heads and rows");
  const bool packed = q_starts.has_value();
  const int64_t batch = packed ? q_starts->sizes[0] - 1 : q.sizes[0];
  require(packed == k_starts.has_value() && batch >= 0 && vector_of(present(q_starts), batch + 1, DType::Int32) &&
              vector_of(present(k_starts), batch + 1, DType::Int32) &&
              vector_of(present(k_lengths), batch, DType::Int32) && vector_of(present(seed), 2, DType::Int64),
          call, "starts and lengths must be contiguous int32, seed int64 (2)");
  require(packed ? q.sizes[0] == 1 && k.sizes[0] == 1
                 : max_q == q.sizes[2] && max_k == k.sizes[2] && k.sizes[0] == batch,
          call, "batch and lengths must agree");
  require(max_q <= INT_MAX / 2 && max_k <= INT_MAX / 2 && q.sizes[2] <= INT_MAX && k.sizes[2] <= INT_MAX, call,
          "lengths must fit 32 bits");
  for (const TensorView* t : {present(mask), present(bias)}) {
    require(broadcasts(t, batch, q.sizes[1], max_q, max_k), call, "mask and bias must broadcast to the scores");
  }
  require((!mask || mask->dtype == DType::Bool) && (!bias || bias->dtype == q.dtype || bias->dtype == DType::Float32),
          call, "mask must be bool, bias q's dtype or float32");
  require(broadcasts(present(slopes), batch, q.sizes[1], 1, 1) && (!slopes || slopes->dtype == DType::Float32), call,
          "slopes must be (batch or 1, heads, 1, 1) in float32");

  Problem p{};
  p.q = strided(&q), p.k = strided(&k), p.v = strided(&v);
  p.mask = strided(present(mask)), p.bias = strided(present(bias)), p.slopes = strided(present(slopes));
  p.q_starts = packed ? q_starts->as<int32_t>() : nullptr;
  p.k_starts = packed ? k_starts->as<int32_t>() : nullptr;
  p.k_lengths = k_lengths ? k_lengths->as<int32_t>() : nullptr;
  p.seed = seed ? seed->as<int64_t>() : nullptr;
  p.batch = static_cast<int>(batch);
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
  return p;
}

// Whether single scores are read or changed.
inline bool rich(const Problem& p) {
  return p.mask.data || p.bias.data || p.slopes.data || p.seed || p.softcap > 0.0f;
}

}  // namespace transfuse::attention
