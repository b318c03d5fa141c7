// Every launcher of the extension, with the shape of every tensor. bindings.cpp exposes each under the same name.
//
// A launcher checks what its kernel relies on, chooses tile and grid, and enqueues; it neither allocates nor waits.
// Outputs are allocated by Python and hold no meaning before the launch. An absent tensor is nullopt.
#pragma once

#include <optional>

#include "launch.h"
#include "tensor.h"

namespace transfuse {

using OptionalTensor = std::optional<TensorView>;

// y = (s - mean(s)) * rstd * weight + bias over each row, s = x + residual rounded to x's dtype (x itself without one).
void layer_norm_forward(const TensorView& x,              // (M, N), columns contiguous: float32, float16 or bfloat16
                        const OptionalTensor& residual,  // (M, N), columns contiguous, x's dtype
                        const OptionalTensor& weight,    // (N), contiguous, x's dtype or float32
                        const OptionalTensor& bias,      // (N), contiguous, weight's dtype
                        const TensorView& y,              // (M, N), columns contiguous, x's dtype
                        const OptionalTensor& summed,    // (M, N), columns contiguous, x's dtype; with a residual alone
                        const TensorView& mean,           // (M), contiguous, float32
                        const TensorView& rstd,           // (M), contiguous, float32
                        float eps, const LaunchTarget& target);

}  // namespace transfuse
