// Switching stacks: what a thread of a kernel needs to wait at a barrier in the middle of its function.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 64 * 1024;

// Saves the callee-saved registers and the stack pointer in *from, and goes on where `to` was saved.
extern "C" void cuda_on_cpu_switch(void** from, void* to);

// A saved stack pointer from which the first switch calls start(), which must never return.
void* prepare_stack(unsigned char* stack, size_t bytes, void (*start)());

}  // namespace cuda_on_cpu
