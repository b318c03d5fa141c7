// What the stand-ins for CUDA's headers ask of the engine, which runs a block's threads as fibers on one host thread.
#pragma once

#include <cstddef>
#include <cstdint>

struct cudaLaunchConfig_t;

namespace cuda_on_cpu {

// Where a call stands in the kernel's source; taken by default arguments, so that every barrier has a name.
struct Site {
  const char* file;
  int line;
};
#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CUDA_ON_CPU_HERE \
  ::cuda_on_cpu::Site { file, line }

// Runs entry(frame) for every thread of the grid. `frame` holds the kernel's parameters, which threads may read.
// Throws std::runtime_error with everything it knows at the first thing a GPU would forgive or corrupt.
void run(const cudaLaunchConfig_t& config, const void* kernel, void (*entry)(void*), void* frame, size_t frame_bytes);

// __syncthreads: returns when every thread of the block has come to this very line.
void block_barrier(Site site);

// Every lane of `mask` meets here, each with its operand; the last one runs act(operands, mask, argument) for all.
// Lanes come from any line, but with the same name and mask, as the PTX ISA asks.
using Act = void (*)(void* const* operands, unsigned mask, void* argument);
void meet(const char* name, unsigned mask, void* operand, Act act, void* argument, Site site);

enum class Shuffle { Index, Up, Down, Xor };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int lane, int width, Site site);
enum class Vote { Ballot, All, Any };
unsigned vote(Vote kind, unsigned mask, bool predicate, Site site);
void warp_barrier(unsigned mask, Site site);
unsigned live_lanes();

// One read-modify-write of shared or global memory.
void atomic(void* address, size_t bytes, void (*update)(void* address, void* argument), void* argument);

unsigned char* dynamic_shared_memory();

// The instructions that csrc/device wraps.
enum class Matrix { F16, BF16, TF32 };
void mma(Matrix kind, int k, float* d, const uint32_t* a, const uint32_t* b, Site site);  // D (16 x 8) += A B
void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* row, Site site);
void cp_async(void* shared, const void* global, int bytes, int read_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);  // -1: all, also what was not committed

// Ends the kernel with this message; called by a thread of a kernel.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace cuda_on_cpu
