// How every launcher reaches the GPU: the device of its tensors made current, the launch checked, the device restored.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "error.h"

namespace transfuse {

// Where a launch goes. `stream` is torch's: both CUDA runtimes, torch's and the static one in here, work on the
// device's primary context, so a stream handle of the one is valid in the other.
struct LaunchTarget {
  int device;
  cudaStream_t stream;
};

// Makes `device` current for one scope, by the driver's contexts rather than the runtime's device number: restoring by
// number would create a context (some 500 MB) on a device that nobody had used yet, and torch's runtime and this one
// each keep a number of their own, while the thread's current context is one for both.
class DeviceGuard {
 public:
  DeviceGuard(int device, const Call& call);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const int device_;
  void* previous_ = nullptr;  // CUcontext
  bool restore_ = false;
};

constexpr size_t kSharedBytesByDefault = 48 << 10;

// Launches `kernel` on `target` and throws if the launch is refused. Errors inside a running kernel surface, as
// always in CUDA, at the next synchronisation.
template <typename... Params, typename... Args>
void launch(const Call& call, const LaunchTarget& target, dim3 grid, dim3 block, size_t shared_bytes,
            void (*kernel)(Params...), Args&&... args) {
  DeviceGuard guard(target.device, call);
  if (shared_bytes > kSharedBytesByDefault) {
    // Of this kernel on this device; a kernel always asks for the same, so no other thread lowers it.
    const int bytes = static_cast<int>(shared_bytes);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), call,
               "raising the limit of shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = target.stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), call, "the launch");
}

}  // namespace transfuse
