// From a tensor's dtype to the element types that kernels are compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "error.h"

namespace transfuse {

inline bool is_floating(DType dtype) {
  return dtype == DType::Float32 || dtype == DType::Float16 || dtype == DType::BFloat16;
}

// run(T{}) with the element type of a floating dtype.
template <typename Run>
void with_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::Float32:
      return run(float{});
    case DType::Float16:
      return run(__half{});
    default:
      return run(__nv_bfloat16{});
  }
}

// run(T{}, W{}): W is float where `wide`, else T.
template <typename Run>
void with_dtypes(DType dtype, bool wide, Run run) {
  with_dtype(dtype, [&](auto element) {
    if (wide) {
      run(element, float{});
    } else {
      run(element, element);
    }
  });
}

}  // namespace transfuse
