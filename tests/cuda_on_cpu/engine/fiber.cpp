#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "internal.h"

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and takes them from the new one: a tenth of what ucontext costs,
// which asks the kernel for the signal mask.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

namespace cuda_on_cpu {
namespace {
bool native;
}

void choose_switch() {
#if defined(__x86_64__)
  native = getenv("TRANSFUSE_CUDA_ON_CPU_UCONTEXT") == nullptr;
#endif
}

void switch_stack(void** from, void* to) {
#if defined(__x86_64__)
  if (native) return cuda_on_cpu_switch(from, to);
#endif
  ucontext_t here;  // on the stack that is left, until it is gone on with
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* prepare_stack(unsigned char* stack, size_t bytes, void (*start)()) {
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(63);
  if (native) {  // six registers, the address to return to, and 8 bytes so that start() is entered as after a call
    uintptr_t* frame = reinterpret_cast<uintptr_t*>(top) - 8;
    for (int i = 0; i < 8; ++i) frame[i] = 0;
    frame[6] = reinterpret_cast<uintptr_t>(start);
    return frame;
  }
  auto* context = new (reinterpret_cast<void*>(top - ((sizeof(ucontext_t) + 63) & ~size_t(63)))) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = reinterpret_cast<unsigned char*>(context) - stack;
  context->uc_link = nullptr;
  makecontext(context, start, 0);
  return context;
}

}  // namespace cuda_on_cpu
