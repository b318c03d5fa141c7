// What the engine knows of memory: the tensors of the call, shared memory, and the state of each of their bytes.
#pragma once

#include "block.h"

namespace cuda_on_cpu {

// The state of one byte of shared memory. Times are of Block::clock; a time before the block began is no time.
struct Cell {
  uint32_t written, read;
  uint16_t writer, reader;  // numbers of threads, or one of these:
  static constexpr uint16_t kSeveral = 0xffff, kAtomic = 0xfffe;
  static constexpr uint32_t kInFlight = 0xffffffff;  // as `written`: a cp.async that nobody has waited for
};

enum class Access { Read, Write, Atomic, CopyBegins, CopyEnds };
void access(const void* address, size_t bytes, Access kind, bool aligned, const void* instruction);

bool is_shared(const void* address);

void prepare_memory(const void* kernel, size_t dynamic_shared_bytes, const void* parameters, size_t parameter_bytes);
void forget_shared_memory();  // after a kernel that failed, perhaps with copies in flight

}  // namespace cuda_on_cpu
