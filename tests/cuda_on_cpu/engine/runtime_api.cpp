// The runtime API of a device that is not there: small, so that tests meet several blocks a multiprocessor and loops
// over a grid; with the shared memory of sm_80.
#include <cstring>
#include <map>
#include <mutex>

#include "cuda_runtime_api.h"

namespace {
constexpr int kSharedOptIn = 163 * 1024, kSharedDefault = 48 * 1024;
std::map<const void*, int> shared_limits;
std::mutex limits_lock;
}  // namespace

namespace cuda_on_cpu {
int shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_lock);
  const auto found = shared_limits.find(kernel);
  return found == shared_limits.end() ? kSharedDefault : found->second;
}
}  // namespace cuda_on_cpu

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "an error";
}
const char* cudaGetErrorString(cudaError_t) { return "from cuda_on_cpu's stand-in for the runtime"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedDefault;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedOptIn;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kSharedOptIn + 1024;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > kSharedOptIn) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(limits_lock);
  shared_limits[function] = value;
  return cudaSuccess;
}
