// The tensors of the launcher's call that is running: all the global memory that its kernels may touch.
#pragma once

#include <string>

#include "memory.h"

namespace cuda_on_cpu {

// Checks and records an access to global memory; empty if all is well, else what is wrong.
std::string global_access(const unsigned char* at, size_t bytes, Access kind);

// "12 bytes past the end of x float32 (8, 96)"
std::string place(const unsigned char* at, size_t bytes);

}  // namespace cuda_on_cpu
