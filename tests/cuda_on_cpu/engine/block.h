// The block that is running: its threads, and where they wait.
#pragma once

#include <cstdarg>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "engine.h"
#include "fiber.h"

namespace cuda_on_cpu {

enum class State { Ready, AtBarrier, AtMeeting, Exited };

struct Copy {  // one cp.async on its way
  unsigned char* to;
  const unsigned char* from;
  int bytes, read_bytes;  // what lies beyond read_bytes becomes 0
  int group;
};

struct Thread {
  void* stack_pointer;
  unsigned char* stack;
  State state;
  uint3 index;
  const char* waits_for;  // one literal a function, compared by address
  Site site;
  unsigned mask;
  void* operand;
  int open_group;            // number of the cp.async group that the next commit closes
  std::vector<Copy> copies;  // oldest first
};

struct Block {
  std::vector<Thread> threads;
  Thread* current = nullptr;
  uint32_t clock = 0;         // counts accesses' turns; moved on by every barrier
  uint32_t began = 0;         // the clock when this block began
  uint32_t last_barrier = 0;  // ... when __syncthreads last let the block go
  std::vector<uint32_t> last_warp_barrier;
  int number(const Thread& thread) const { return static_cast<int>(&thread - threads.data()); }
};

extern Block block;
// True while a kernel's own code runs, whose every load and store calls into memory.cpp.
extern bool watching;

constexpr size_t kMaxThreads = 1024;
extern unsigned char* stack_memory;  // of all threads of a block, one after another

// Whether this stack frame is of a kernel's thread, not of host code that another Python thread runs meanwhile.
inline bool on_fiber(const void* frame) {
  const auto at = static_cast<const unsigned char*>(frame);
  return at >= stack_memory && at < stack_memory + kMaxThreads * kStackBytes;
}

class Unwatched {  // a scope of the engine inside a kernel
 public:
  Unwatched() : before_(watching) { watching = false; }
  ~Unwatched() { watching = before_; }

 private:
  const bool before_;
};

// A file to which launches are noted instead of being run; nullptr: run them.
const char* only_noting();

std::string name_of(const Thread& thread);  // "thread (3, 0, 0)"
std::string base_name(const char* path);    // without the folders
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Where in the source an instruction of the kernels stands, innermost first; empty if no tool here can tell.
std::string source_of(const void* instruction);
std::string function_name(const void* function);  // of a kernel
int shared_limit(const void* kernel);             // bytes of dynamic shared memory that a launch may ask for
[[noreturn]] void fail_at(const void* instruction, const std::string& message);

}  // namespace cuda_on_cpu
