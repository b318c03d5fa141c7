#include "launch.h"

#include <cuda.h>  // types only: libcuda is reached through the runtime, never linked, so that import needs no driver

namespace transfuse {
namespace {

struct Driver {
  CUresult (*get_current)(CUcontext*) = nullptr;
  CUresult (*set_current)(CUcontext) = nullptr;
  CUresult (*current_device)(CUdevice*) = nullptr;
  CUresult (*retain_primary)(CUcontext*, CUdevice) = nullptr;
  CUresult (*release_primary)(CUdevice) = nullptr;
  cudaError_t error = cudaErrorInitializationError;
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

// Looked up at a thread's first launch. A failure is looked up again at the next: the driver may be there by then.
const Driver& driver() {
  static thread_local Driver calls;
  if (calls.error != cudaSuccess) {
    calls.error = find("cuCtxGetCurrent", calls.get_current);
    if (calls.error == cudaSuccess) calls.error = find("cuCtxSetCurrent", calls.set_current);
    if (calls.error == cudaSuccess) calls.error = find("cuCtxGetDevice", calls.current_device);
    if (calls.error == cudaSuccess) calls.error = find("cuDevicePrimaryCtxRetain", calls.retain_primary);
    if (calls.error == cudaSuccess) calls.error = find("cuDevicePrimaryCtxRelease", calls.release_primary);
  }
  return calls;
}

}  // namespace

DeviceGuard::DeviceGuard(int device, const Call& call) : device_(device) {
  constexpr const char* kDoing = "choosing the device";  // CUresult and cudaError_t share their numbers
  const Driver& calls = driver();
  check_cuda(calls.error, call, "loading the driver");
  CUcontext current = nullptr, primary = nullptr;
  CUdevice current_device = -1;
  check_cuda(calls.get_current(&current), call, kDoing);
  if (current && calls.current_device(&current_device) == CUDA_SUCCESS && current_device == device) {
    return;  // the usual case, two calls of some 20 ns
  }
  check_cuda(calls.retain_primary(&primary, device), call, kDoing);
  if (const CUresult result = calls.set_current(primary)) {
    calls.release_primary(device);
    check_cuda(result, call, kDoing);
  }
  previous_ = current;
  restore_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (!restore_) return;
  driver().set_current(static_cast<CUcontext>(previous_));
  driver().release_primary(device_);
}

}  // namespace transfuse
