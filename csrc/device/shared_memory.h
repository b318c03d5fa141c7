// The dynamic shared memory of a launch: its fifth argument in csrc/launch.h, beyond 48 KB only after
// cudaFuncSetAttribute.
#pragma once

namespace transfuse::device {

// 128-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
#ifdef TRANSFUSE_CUDA_ON_CPU
  return cuda_on_cpu::dynamic_shared_memory();  // of tests/cuda_on_cpu
#else
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  return dynamic_smem;
#endif
}

}  // namespace transfuse::device
