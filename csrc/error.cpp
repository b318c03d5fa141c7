#include "error.h"

#include <cuda_runtime_api.h>

namespace transfuse {
namespace {

std::string remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "; this GPU or driver cannot run the kernels that were built (" TRANSFUSE_ARCH_LIST
             "): update the driver, or rebuild with CMAKE_ARGS=-DTRANSFUSE_CUDA_ARCHITECTURES=<its architecture>";
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
      return "; `transfuse doctor` tells what this machine has";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
      return "; an earlier kernel on this device failed: CUDA_LAUNCH_BLOCKING=1 shows which";
    default:
      return "";
  }
}

}  // namespace

std::string describe(const TensorView& tensor) {
  std::string text = kDTypeNames[static_cast<int>(tensor.dtype)];
  text += " (";
  for (int d = 0; d < tensor.ndim; ++d) text += (d ? ", " : "") + std::to_string(tensor.sizes[d]);
  return text + ")";
}

std::string Call::shapes() const {
  std::string text;
  for (int i = 0; i < count_; ++i) {
    const NamedTensor& t = tensors_[i];
    if (t.tensor) text += (text.empty() ? "" : ", ") + std::string(t.name) + " " + describe(*t.tensor);
  }
  return text;
}

void check_cuda(int code, const Call& call, const char* doing) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here; the next launch must not find it again
  throw std::runtime_error(std::string(call.op) + ": " + doing + " failed with " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ") for " + call.shapes() + remedy(error));
}

}  // namespace transfuse
