// The functions of csrc/device/cp_async.h, on the engine.
#pragma once

#include "cuda_runtime.h"

namespace transfuse::device {

template <int BYTES>
void cp_async(void* shared, const void* global, int read_bytes = BYTES) {
  cuda_on_cpu::cp_async(shared, global, BYTES, read_bytes);
}

inline void cp_async_commit() { cuda_on_cpu::cp_async_commit(); }

template <int GROUPS>
void cp_async_wait() {
  cuda_on_cpu::cp_async_wait(GROUPS);
}

}  // namespace transfuse::device
