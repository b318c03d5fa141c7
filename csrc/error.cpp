#include "error.h"

#include <cuda_runtime_api.h>

namespace transfuse {

std::string describe(const TensorView& tensor) {
  std::string text = kDTypeNames[static_cast<int>(tensor.dtype)];
  text += " (";
  for (int d = 0; d < tensor.ndim; ++d) text += (d ? ", " : "") + std::to_string(tensor.sizes[d]);
  return text + ")";
}

std::string describe(std::initializer_list<std::pair<const char*, const TensorView*>> tensors) {
  std::string text;
  for (const auto& [name, tensor] : tensors) {
    if (tensor) text += (text.empty() ? "" : ", ") + std::string(name) + " " + describe(*tensor);
  }
  return text;
}

void check_cuda(int code, const char* op, const char* doing, const std::string& shapes) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here; the next launch must not find it again
  std::string text = std::string(op) + ": " + doing + " failed with " + cudaGetErrorName(error) + " (" +
                     cudaGetErrorString(error) + ") for " + shapes;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    text += "; this GPU or driver cannot run the kernels that were built (" TRANSFUSE_ARCH_LIST
            "): update the driver, or rebuild with CMAKE_ARGS=-DTRANSFUSE_CUDA_ARCHITECTURES=<its architecture>";
  } else if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    text += "; `transfuse doctor` tells what this machine has";
  }
  throw std::runtime_error(text);
}

}  // namespace transfuse
