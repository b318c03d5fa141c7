// The runtime API of a device that is not there: small, so that tests meet several blocks a multiprocessor and loops
// over a grid; with the shared memory of sm_80.
#include <map>
#include <mutex>

#include "internal.h"

namespace {
constexpr int kSharedOptIn = 163 * 1024, kSharedDefault = 48 * 1024;
std::map<const void*, int> shared_limits;
std::mutex limits_lock;
}  // namespace

int cuda_on_cpu::shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_lock);
  const auto found = shared_limits.find(kernel);
  return found == shared_limits.end() ? kSharedDefault : found->second;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }  // the only one that is given here
const char* cudaGetErrorString(cudaError_t) { return "from cuda_on_cpu's stand-in for the runtime"; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> attributes = {
      {cudaDevAttrMultiProcessorCount, 4},
      {cudaDevAttrComputeCapabilityMajor, 8},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxSharedMemoryPerBlock, kSharedDefault},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedOptIn},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedOptIn + 1024},
  };
  return *value = attributes.at(attribute), cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > kSharedOptIn) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(limits_lock);
  shared_limits[function] = value;
  return cudaSuccess;
}
