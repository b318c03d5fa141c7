// What the engine's files share: the block that is running, its fibers, memory, the module's symbols, and errors.
#pragma once

#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "engine.h"

namespace cuda_on_cpu {

// --- fiber.cpp: switching stacks, which a thread of a kernel needs to wait in the middle of its function

constexpr size_t kStackBytes = 64 * 1024, kMaxThreads = 1024;

// Saves where this stack stands in *from, and goes on where `to` was saved.
void switch_stack(void** from, void* to);
// What to switch to for start() to run on this stack; it must never return.
void* prepare_stack(unsigned char* stack, size_t bytes, void (*start)());
// How the next launches switch: by this processor's own instructions, or by ucontext, which every processor has.
void choose_switch();

// --- block.cpp: the threads of a block, and where they wait

enum class State { Ready, AtBarrier, AtMeeting, Exited };

struct Copy {  // one cp.async on its way
  unsigned char* to;
  const unsigned char* from;
  int bytes, read_bytes;  // what lies beyond read_bytes becomes 0
  int group;
};

struct Thread {
  void* saved;  // by switch_stack
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
  uint32_t clock = 0;         // moved on by every barrier
  uint32_t began = 0;         // the clock when this block began
  uint32_t last_barrier = 0;  // ... when __syncthreads last let the block go
  std::vector<uint32_t> last_warp_barrier;
  int number(const Thread& thread) const { return static_cast<int>(&thread - threads.data()); }
};

extern Block block;
extern bool watching;                // true while a kernel's own code runs, whose loads and stores call into memory.cpp
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

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string name_of(const Thread& thread);  // "thread (3, 0, 0)"
[[noreturn]] void fail_at(const void* instruction, const std::string& message);

// --- memory.cpp: every access to shared memory

enum class Access { Read, Write, Atomic, CopyBegins, CopyEnds };
void access(const void* address, size_t bytes, Access kind, bool aligned, const void* instruction);
bool is_shared(const void* address);
void prepare_memory(const void* kernel, size_t dynamic_shared_bytes, const void* parameters, size_t parameter_bytes);
void forget_shared_memory();  // after a kernel that failed, perhaps with copies in flight

// --- tensors.cpp: global memory, which is the tensors of the launcher's call

// Checks and records an access; empty if all is well, else what is wrong.
std::string global_access(const unsigned char* at, size_t bytes, Access kind);
std::string place(const unsigned char* at, size_t bytes);  // "12 bytes past the end of x float32 (8, 96)"

// --- symbols.cpp: what the module's own symbol table tells

struct Symbol {  // a __shared__ variable
  uintptr_t begin, end;
  std::string name, mangled;
  bool visible;  // of the kernel that is running
};

const std::vector<Symbol>& shared_symbols();       // by address
const Symbol* shared_symbol(const void* address);  // the variable that this address is in, or nullptr
void show_shared_symbols_of(const void* kernel);
bool in_this_module(const void* address);  // code and data of this shared object
std::string function_name(const void* function);
std::string base_name(const std::string& path);
// Where in the source an instruction stands, innermost first; empty if no tool here can tell.
std::string source_of(const void* instruction);

// --- runtime_api.cpp

int shared_limit(const void* kernel);  // bytes of dynamic shared memory that a launch may ask for

}  // namespace cuda_on_cpu
