// Runs a grid: blocks one after another, a block's threads as fibers that give way at barriers alone.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

#include "cuda_runtime.h"
#include "internal.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

Block block;
bool watching = false;
unsigned char* stack_memory = nullptr;

namespace {

void* scheduler;  // its saved stack
void (*thread_entry)(void*);
void* thread_frame;
std::string failure;  // empty while all is well
const void* failed_instruction;
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11;

void yield() { switch_stack(&block.current->saved, scheduler); }

void thread_main() {
  watching = true;
  thread_entry(thread_frame);
  watching = false;
  cp_async_wait(-1);  // the hardware finishes what nobody waits for
  block.current->state = State::Exited;
  yield();
  __builtin_unreachable();
}

void prepare_threads(unsigned count, dim3 shape) {
  if (!stack_memory) {  // of 1024 threads; only touched pages are backed by memory
    void* mapped = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("cuda_on_cpu: no memory for the stacks of a block's threads");
    stack_memory = static_cast<unsigned char*>(mapped);
  }
  block.threads.resize(count);
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = block.threads[t];
    thread.state = State::Ready;
    thread.index = {t % shape.x, t / shape.x % shape.y, t / (shape.x * shape.y)};
    thread.stack = stack_memory + t * kStackBytes;
    memcpy(thread.stack, &kCanary, sizeof(kCanary));
    // Staggered, or the tops of all stacks would fall into the same set of the cache.
    thread.saved = prepare_stack(thread.stack, kStackBytes - t % 32 * 128, thread_main);
    thread.copies.clear();
    thread.open_group = 0;
  }
  block.began = block.last_barrier = ++block.clock;
  block.last_warp_barrier.assign((count + 31) / 32, block.clock);
}

std::string doing(const Thread& thread) {
  if (thread.state == State::Exited) return name_of(thread) + " has exited";
  return text("%s waits at %s (%s:%d)", name_of(thread).c_str(), thread.waits_for, base_name(thread.site.file).c_str(),
              thread.site.line) +
         (thread.state == State::AtMeeting ? text(" with mask 0x%08x", thread.mask) : "");
}

bool differ(const Thread& a, const Thread& b) {
  if (a.state != b.state) return true;
  if (a.state == State::AtBarrier) return a.site.line != b.site.line || strcmp(a.site.file, b.site.file) != 0;
  return a.state == State::AtMeeting && (a.mask != b.mask || a.waits_for != b.waits_for);
}

// No thread can go on: name one that waits, and one that keeps it waiting.
std::string deadlock() {
  for (const Thread& waiting : block.threads) {
    if (waiting.state == State::Exited) continue;
    const int warp = block.number(waiting) / 32;
    for (const Thread& other : block.threads) {
      const bool named = block.number(other) / 32 == warp && waiting.mask >> block.number(other) % 32 & 1;
      if ((waiting.state == State::AtBarrier || named) && differ(waiting, other))
        return "divergent barrier: " + doing(waiting) + " while " + doing(other) +
               "; every thread it names must come to the same barrier, so move it out of the condition";
    }
    if (waiting.state == State::AtMeeting)
      return "divergent barrier: " + doing(waiting) + ", which names lanes that the block does not have";
  }
  return "no thread can go on";
}

void run_thread(Thread& thread) {
  block.current = &thread;
  threadIdx = thread.index;
  switch_stack(&scheduler, thread.saved);
  watching = false;
  if (memcmp(thread.stack, &kCanary, sizeof(kCanary)) != 0 && failure.empty())
    failure = name_of(thread) + " ran over its stack of 64 KB: its local arrays are too large for registers";
}

void run_block(std::vector<int>& order, std::mt19937* random) {
  for (;;) {
    if (random) std::shuffle(order.begin(), order.end(), *random);
    bool progress = false;
    for (int t : order) {
      if (block.threads[t].state != State::Ready) continue;
      progress = true;
      run_thread(block.threads[t]);
      if (!failure.empty()) return;
    }
    size_t at_barrier = 0, exited = 0;
    for (const Thread& thread : block.threads) {
      at_barrier += thread.state == State::AtBarrier && !differ(thread, block.threads[0]);
      exited += thread.state == State::Exited;
    }
    if (exited == order.size()) return;
    if (at_barrier == order.size()) {
      block.last_barrier = ++block.clock;
      for (Thread& thread : block.threads) thread.state = State::Ready;
    } else if (!progress) {
      failure = deadlock();
      return;
    }
  }
}

// Why a GPU would not start this launch; empty if it would.
std::string refuse(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 b = config.blockDim, g = config.gridDim;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z;
  if (threads == 0 || threads > kMaxThreads || b.z > 64) return text("a block of (%u, %u, %u) threads", b.x, b.y, b.z);
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
    return text("a grid of (%u, %u, %u) blocks", g.x, g.y, g.z);
  const int limit = shared_limit(kernel);
  if (config.dynamicSmemBytes <= static_cast<size_t>(limit)) return "";
  return text("%zu bytes of dynamic shared memory: without cudaFuncSetAttribute the limit is %d",
              config.dynamicSmemBytes, limit);
}

std::string formatted(const char* format, va_list arguments) {
  char buffer[1024];
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  return buffer;
}

}  // namespace

const char* only_noting() { return getenv("TRANSFUSE_CUDA_ON_CPU_LAUNCHES"); }

std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string result = formatted(format, arguments);
  va_end(arguments);
  return result;
}

std::string name_of(const Thread& thread) {
  return text("thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z);
}

void fail_at(const void* instruction, const std::string& message) {
  watching = false;
  failure = name_of(*block.current) + ": " + message;
  failed_instruction = instruction;
  yield();  // for good: the scheduler drops the block
  __builtin_unreachable();
}

void fail(const char* format, ...) {
  watching = false;
  va_list arguments;
  va_start(arguments, format);
  std::string message = formatted(format, arguments);
  va_end(arguments);
  const Thread& self = *block.current;
  if (self.state == State::AtMeeting) message += text(" [%s:%d]", base_name(self.site.file).c_str(), self.site.line);
  fail_at(nullptr, message);
}

void run(const cudaLaunchConfig_t& config, const void* kernel, void (*entry)(void*), void* frame, size_t frame_bytes) {
  static std::mutex one_at_a_time;  // Python threads launch without the GIL
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const std::string name = function_name(kernel);
  failure = refuse(config, kernel);
  failed_instruction = nullptr;
  if (!failure.empty()) throw std::runtime_error("cuda_on_cpu: " + name + ": a GPU refuses " + failure);
  thread_entry = entry;
  thread_frame = frame;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  std::vector<int> order(blockDim.x * blockDim.y * blockDim.z);
  std::iota(order.begin(), order.end(), 0);
  if (const char* notes = only_noting()) {
    std::ofstream(notes, std::ios::app) << name << " " << order.size() << " " << config.dynamicSmemBytes << "\n";
    return;
  }
  prepare_memory(kernel, config.dynamicSmemBytes, frame, frame_bytes);
  choose_switch();
  const char* seed = getenv("TRANSFUSE_CUDA_ON_CPU_SEED");
  std::mt19937 random(seed ? static_cast<unsigned>(atoi(seed)) : 0u);
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  for (uint64_t b = 0; b < blocks; ++b) {
    blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                static_cast<unsigned>(b / gridDim.x / gridDim.y)};
    prepare_threads(static_cast<unsigned>(order.size()), blockDim);
    run_block(order, seed ? &random : nullptr);
    if (failure.empty()) continue;
    forget_shared_memory();
    const uint3 at = blockIdx;
    throw std::runtime_error(text("cuda_on_cpu: %s: block (%u, %u, %u), ", name.c_str(), at.x, at.y, at.z) + failure +
                             source_of(failed_instruction));
  }
}

void block_barrier(Site site) {
  const Unwatched scope;
  Thread& self = *block.current;
  self.state = State::AtBarrier;
  self.waits_for = "__syncthreads";
  self.site = site;
  yield();
}

void meet(const char* name, unsigned mask, void* operand, Act act, void* argument, Site site) {
  const Unwatched scope;
  Thread& self = *block.current;
  const int number = block.number(self), lane = number % 32;
  Thread* const lanes = &self - lane;
  const int count = std::min(32, static_cast<int>(block.threads.size()) - (number - lane));
  self.state = State::AtMeeting;
  self.waits_for = name;
  self.site = site;
  self.mask = mask;
  self.operand = operand;
  if (!(mask >> lane & 1)) fail("%s with mask 0x%08x, which leaves out this lane (%d): add it", name, mask, lane);

  void* operands[32] = {};
  for (int i = 31; i >= 0; --i) {  // from the end: threads mostly come in order, so the first look tells
    if (!(mask >> i & 1)) continue;
    if (i >= count || differ(self, lanes[i])) return yield();
    operands[i] = lanes[i].operand;
  }
  if (act) act(operands, mask, argument);
  for (int i = 0; i < count; ++i) {
    if (mask >> i & 1) lanes[i].state = State::Ready;
  }
}

void warp_barrier(unsigned mask, Site site) {
  const auto passed = [](void* const*, unsigned, void*) {
    block.last_warp_barrier[block.number(*block.current) / 32] = ++block.clock;
  };
  meet("__syncwarp", mask, nullptr, passed, nullptr, site);
}

unsigned live_lanes() {
  const size_t first = block.number(*block.current) / 32 * 32;
  unsigned lanes = 0;
  for (size_t i = first; i < std::min(first + 32, block.threads.size()); ++i)
    lanes |= unsigned(block.threads[i].state != State::Exited) << (i - first);
  return lanes;
}

}  // namespace cuda_on_cpu
