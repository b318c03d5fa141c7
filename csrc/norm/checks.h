// What the launchers of all norm kernels check, and whether accesses may be 16 bytes wide.
#pragma once

#include <algorithm>
#include <climits>

#include "dtypes.h"
#include "launch.h"
#include "tensor.h"

namespace transfuse::norm {

// (M, N), columns contiguous, as every other tensor of rows of the call.
inline void check_rows(const TensorView& t, const TensorView& x, const Call& call) {
  require(t.dtype == x.dtype && t.ndim == 2 && t.sizes[0] == x.sizes[0] && t.sizes[1] == x.sizes[1], call,
          "all tensors of rows must have x's dtype and shape");
  require(t.strides[1] == 1 || t.sizes[1] <= 1, call, "all tensors of rows must have contiguous columns");
}

inline void check_vector(const TensorView& t, int64_t length, DType first, DType second, const Call& call) {
  require((t.dtype == first || t.dtype == second) && t.ndim == 1 && t.sizes[0] == length, call,
          "weight and bias must be (columns) in x's dtype or float32, mean and rstd (rows) in float32");
  require(t.strides[0] == 1 || length <= 1, call, "weight, bias, mean and rstd must be contiguous");
}

// `x` is what the others are like: x itself in forward, summed in backward.
inline void check_first(const TensorView& x, const Call& call) {
  require(is_floating(x.dtype), call,
          "x must be float32, float16 or bfloat16");
  require(x.ndim == 2, call, "x must be (rows, columns)");
}

// 16-byte accesses at every (row, multiple of `vec`) of a (M, N) tensor; an absent tensor is no obstacle.
inline bool rows_align(const TensorView* t, int vec) {
  if (!t) return true;
  const bool stride_fits = t->sizes[0] <= 1 || t->strides[0] % vec == 0;
  return reinterpret_cast<uintptr_t>(t->data) % 16 == 0 && stride_fits && t->sizes[1] % vec == 0;
}

inline bool starts_align(const TensorView* t) { return !t || reinterpret_cast<uintptr_t>(t->data) % 16 == 0; }

// More rows than blocks is no error: the kernels stride over them.
inline dim3 blocks(int64_t rows) { return dim3(static_cast<unsigned>(std::min<int64_t>(rows, INT_MAX))); }

}  // namespace transfuse::norm
