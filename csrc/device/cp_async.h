// Copies from global to shared memory that go on while the thread works (cp.async), in groups that it waits for.
//
// A thread sees its own copies after cp_async_wait, other threads see them after a barrier that follows it:
//   cp_async<16>(to, from); cp_async_commit(); ... cp_async_wait<0>(); __syncthreads();
#pragma once

#include <cstdint>

#ifdef TRANSFUSE_CUDA_ON_CPU
#include "on_cpu/cp_async.h"  // the same functions, in tests/cuda_on_cpu
#else

namespace transfuse::device {

// BYTES = 4, 8 or 16, at a multiple of BYTES on both sides. Only `read_bytes` are read; the rest of the shared bytes
// become 0, so that 0 fills a row outside a tensor without touching `global`. 16 bytes go past the L1 cache.
template <int BYTES>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int read_bytes = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(read_bytes)
                 : "memory");
  }
}

// Closes the group of all copies since the last commit; it may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most GROUPS of this thread's latest groups are still on their way.
template <int GROUPS>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

}  // namespace transfuse::device
#endif
