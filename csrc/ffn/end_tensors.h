// The tensors of a product's end, as ffn_product and ffn_combine take them: their checks and their kernel parameters.
#pragma once

#include <climits>
#include <cmath>

#include "dtypes.h"
#include "error.h"
#include "ffn/ends.cuh"
#include "launchers.h"

namespace transfuse::ffn {

struct EndTensors {
  const TensorView *out, *bias, *up, *gate, *dgate, *hidden, *sums, *seed;
  int activation;
  bool backward;
  double dropout_p;

  Role saved() const { return backward ? Role::Input : Role::Output; }  // of up and gate
};

inline Rows rows(const TensorView* t) {
  return t ? Rows{t->data, t->sizes[0] > 1 ? t->strides[0] : 0} : Rows{nullptr, 0};
}

// (rows, columns) of this dtype, or absent.
inline void check_matrix(const TensorView* t, int64_t rows, int64_t columns, DType dtype, const Call& call) {
  require(!t || (t->ndim == 2 && t->sizes[0] == rows && t->sizes[1] == columns && t->dtype == dtype &&
                 (t->strides[1] == 1 || columns <= 1 || rows == 0)),
          call, "every matrix must have the product's shape and dtype, and contiguous columns");
}

// 16-byte accesses at multiples of 16 bytes in every row.
inline bool rows_align(const TensorView* t, int64_t chunk) {
  if (!t || t->sizes[0] == 0 || t->sizes[1] == 0) return true;
  return reinterpret_cast<uintptr_t>(t->data) % 16 == 0 && (t->sizes[0] == 1 || t->strides[0] % chunk == 0);
}

// `groups` is how many groups of rows each give a row of sums.
inline EndParams end_params(const EndTensors& t, int64_t M, int64_t N, DType dtype, bool gated, int64_t groups,
                            const Call& call) {
  require(M <= INT_MAX / 2 && N <= INT_MAX / 2, call, "rows and columns must fit 30 bits (split the rows)");
  require(t.activation >= 0 && t.activation <= static_cast<int>(Activation::Silu), call, "there is no such activation");
  EndParams p{};
  p.backward = t.backward;
  p.gated = gated;
  p.activation = static_cast<Activation>(t.activation);
  p.M = static_cast<int>(M), p.N = static_cast<int>(N);
  const int64_t chunk = dtype == DType::Float32 ? 4 : 8;
  p.aligned = !t.bias || reinterpret_cast<uintptr_t>(t.bias->data) % 16 == 0;
  for (const TensorView* matrix : {t.out, t.up, t.gate, t.dgate, t.hidden}) {
    check_matrix(matrix, M, N, dtype, call);
    p.aligned = p.aligned && rows_align(matrix, chunk);
  }
  require(!t.backward || (t.up && (!gated || t.gate)), call, "backward reads up, and gate where gated");
  require(!t.bias || (t.bias->ndim == 1 && t.bias->sizes[0] == N && t.bias->dtype == dtype &&
                      (t.bias->strides[0] == 1 || N <= 1)),
          call, "bias must be (columns), contiguous, in the product's dtype");
  require(!t.sums || (t.backward && t.sums->ndim == 2 && t.sums->dtype == DType::Float32 &&
                      t.sums->sizes[0] == groups && t.sums->sizes[1] == N && (t.sums->strides[1] == 1 || N <= 1) &&
                      (t.sums->strides[0] == N || groups <= 1)),
          call, "sums must be (groups of rows, columns) in float32, contiguous, and belong to the backward");
  require(!t.seed || (t.seed->ndim == 1 && t.seed->sizes[0] == 2 && t.seed->dtype == DType::Int64 &&
                      t.seed->strides[0] == 1),
          call, "seed must be int64 (2)");
  p.out = rows(t.out), p.up = rows(t.up), p.gate = rows(t.gate), p.dgate = rows(t.dgate), p.hidden = rows(t.hidden);
  p.bias = t.bias ? t.bias->data : nullptr;
  p.sums = t.sums ? t.sums->as<float>() : nullptr;
  p.seed = t.seed ? t.seed->as<int64_t>() : nullptr;
  p.threshold = static_cast<uint64_t>(std::nearbyint(t.dropout_p * 4294967296.0));
  p.grow = static_cast<float>(1.0 / (1.0 - t.dropout_p));
  return p;
}

}  // namespace transfuse::ffn
