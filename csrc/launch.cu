#include "launch.h"

#include <cuda.h>  // types only: libcuda is reached through the runtime, never linked, so that import needs no driver

namespace transfuse {
namespace {

struct ContextCalls {
  CUresult (*get)(CUcontext*) = nullptr;
  CUresult (*set)(CUcontext) = nullptr;
  CUresult (*device)(CUdevice*) = nullptr;
  cudaError_t error = cudaSuccess;
};

template <typename F>
cudaError_t find(const char* name, F& function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorInsufficientDriver;
  function = reinterpret_cast<F>(address);
  return cudaSuccess;
}

// Looked up at the first launch. A failure is looked up again at the next one: the driver may be there by then.
const ContextCalls& context_calls() {
  static thread_local ContextCalls calls;
  if (calls.device == nullptr) {
    calls.error = find("cuCtxGetCurrent", calls.get);
    if (calls.error == cudaSuccess) calls.error = find("cuCtxSetCurrent", calls.set);
    if (calls.error == cudaSuccess) calls.error = find("cuCtxGetDevice", calls.device);
  }
  return calls;
}

}  // namespace

DeviceGuard::DeviceGuard(int device, const Call& call) {
  const ContextCalls& calls = context_calls();
  check_cuda(calls.error, call, "loading the driver");
  CUcontext current = nullptr;
  CUdevice current_device = -1;
  // A fresh process may not have initialised the driver yet; cudaSetDevice below then does.
  if (calls.get(&current) == CUDA_SUCCESS && current && calls.device(&current_device) == CUDA_SUCCESS &&
      current_device == device) {
    return;  // the usual case, two calls of some 20 ns
  }
  previous_ = current;
  check_cuda(cudaSetDevice(device), call, "choosing the device");
  restore_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (restore_) context_calls().set(static_cast<CUcontext>(previous_));
}

}  // namespace transfuse
