// The test module's launchers.
#pragma once

#include <string>

#include "launch.h"
#include "tensor.h"

namespace planted {

using transfuse::LaunchTarget;
using transfuse::TensorView;

// The kernel of this name in planted.cu, with or without its bug.
void run(const std::string& name, bool bug, const TensorView& in, const TensorView& out, int threads, int shared_bytes,
         const LaunchTarget& target);
void run_rows(bool bug, const TensorView& in, const TensorView& out, const LaunchTarget& target);
void run_workspace(bool bug, const TensorView& in, const TensorView& work, const TensorView& out,
                   const LaunchTarget& target);
void run_unlisted(bool bug, const TensorView& in, const TensorView& out, const LaunchTarget& target);

// units.cu
void convert(const TensorView& from, const TensorView& to, const LaunchTarget& target);
void shuffles(const TensorView& in, const TensorView& out, int kind, int lane, int width, const LaunchTarget& target);
void votes(const TensorView& in, const TensorView& out, const LaunchTarget& target);
void run_mma(const std::string& kind, const TensorView& a, const TensorView& b, const TensorView& d,
             const LaunchTarget& target);
void run_ldmatrix(const TensorView& in, const TensorView& rows, const TensorView& out, bool transposed,
                  const LaunchTarget& target);

void barriers(const TensorView& out, int rounds, const LaunchTarget& target);
void copies(const TensorView& in, const TensorView& out, const LaunchTarget& target);

}  // namespace planted
