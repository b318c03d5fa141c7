// Every load and store of a kernel. The compiler's -fsanitize=thread puts a call before each; the functions it calls
// are at the end of this file, in place of a sanitizer's runtime.
#include "memory.h"

#include <algorithm>
#include <cstring>

#include "cuda_runtime.h"
#include "symbols.h"
#include "tensors.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kDynamicCapacity = 256 * 1024;  // more than any GPU gives, so that what lies past the end is ours too
alignas(1024) unsigned char dynamic_memory[kDynamicCapacity];
std::vector<Cell> dynamic_cells(kDynamicCapacity), static_cells;
size_t dynamic_bytes;
const unsigned char *parameters_begin, *parameters_end;

std::string shared_name(const void* address, const Symbol* variable) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (variable)
    return text("byte %zu of %s (%zu bytes, shared)", size_t(at - variable->begin), variable->name.c_str(),
                variable->size);
  return text("byte %zu of dynamic shared memory (%zu bytes)", size_t(at - reinterpret_cast<uintptr_t>(dynamic_memory)),
              dynamic_bytes);
}

std::string thread_name(int number) {
  if (number >= static_cast<int>(block.threads.size())) return "another thread";
  return name_of(block.threads[number]);
}

constexpr uint16_t kSeveralOfWarp = 0x8000;  // as Cell::reader, plus the warp's number

bool in_warp(uint16_t who, int warp) { return who < kSeveralOfWarp ? who / 32 == warp : who == kSeveralOfWarp + warp; }

// Whether what `who` did at `when` comes before what thread `me` does now.
bool ordered(uint32_t when, uint16_t who, int me) {
  return when < block.last_barrier || who == me || (in_warp(who, me / 32) && when < block.last_warp_barrier[me / 32]);
}

// What is wrong with this access to one byte of shared memory; nullptr if nothing.
const char* wrong(const Cell& cell, Access kind, int me) {
  const bool written = cell.written >= block.began;
  if (kind == Access::CopyEnds) return nullptr;
  if (cell.written == Cell::kInFlight) {
    return kind == Access::Read ? "reads %s before the cp.async of %s into it was waited for: cp_async_wait, then a "
                                  "barrier, must come first"
                                : "writes %s while the cp.async of %s into it is in flight: wait for it first";
  }
  const bool reads = kind == Access::Read || kind == Access::Atomic;
  if (reads && !written)
    return "reads %s, which no thread of this block has written yet: initialise it, or add the barrier that is missing";
  if (written && !(kind == Access::Atomic && cell.writer == Cell::kAtomic) && !ordered(cell.written, cell.writer, me)) {
    return kind == Access::Read ? "race: reads %s, which %s wrote with no barrier between: add __syncthreads"
                                : "race: writes %s, which %s wrote with no barrier between: add __syncthreads";
  }
  if (kind != Access::Read && cell.read >= block.began && !ordered(cell.read, cell.reader, me)) {
    return "race: writes %s, which %s reads with no barrier between: add __syncthreads";
  }
  return nullptr;
}

void record(Cell& cell, Access kind, uint16_t me) {
  if (kind == Access::Read) {
    const bool joins = cell.read >= block.last_barrier && cell.reader != me;
    if (!joins) {
      cell.reader = me;
    } else if (in_warp(cell.reader, me / 32)) {
      cell.reader = kSeveralOfWarp + me / 32;
    } else {
      cell.reader = Cell::kSeveral;
    }
    cell.read = block.clock;
  } else {
    cell.writer = kind == Access::Atomic ? Cell::kAtomic : me;
    cell.written = kind == Access::CopyBegins ? Cell::kInFlight : block.clock;
  }
}

void shared_access(Cell* cells, const void* address, size_t bytes, Access kind, const Symbol* variable,
                   const void* instruction) {
  const int me = block.number(*block.current);
  for (size_t i = 0; i < bytes; ++i) {
    if (const char* message = wrong(cells[i], kind, me)) {
      const bool about_reader = strstr(message, "reads with") != nullptr;
      const std::string where = shared_name(static_cast<const char*>(address) + i, variable);
      const std::string who = thread_name(about_reader ? cells[i].reader : cells[i].writer);
      char buffer[512];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
      snprintf(buffer, sizeof(buffer), message, where.c_str(), who.c_str());
#pragma GCC diagnostic pop
      fail_at(instruction, buffer);
    }
    record(cells[i], kind, static_cast<uint16_t>(me));
  }
}

const char* verb(Access kind) {
  return kind == Access::Read ? "read" : kind == Access::Atomic ? "atomic update" : "write";
}

[[noreturn]] void misaligned(const void* address, size_t alignment, const char* what, const void* instruction) {
  const Unwatched scope;
  const auto at = static_cast<const unsigned char*>(address);
  const std::string where = is_shared(at) ? shared_name(at, shared_symbol(at)) : place(at, 1);
  fail_at(instruction,
          text("misaligned %s at %s: its address must be a multiple of %zu bytes", what, where.c_str(), alignment));
}

}  // namespace

void prepare_memory(const void* kernel, size_t dynamic_shared_bytes, const void* parameters, size_t parameter_bytes) {
  show_shared_symbols_of(kernel);
  dynamic_bytes = dynamic_shared_bytes;
  parameters_begin = static_cast<const unsigned char*>(parameters);
  parameters_end = parameters_begin + parameter_bytes;
  static_cells.resize(shared_symbols().empty() ? 0 : shared_symbols().back().end() - shared_symbols().front().begin);
}

void forget_shared_memory() {
  std::fill(dynamic_cells.begin(), dynamic_cells.end(), Cell{});
  std::fill(static_cells.begin(), static_cells.end(), Cell{});
}

bool is_shared(const void* address) {
  const auto at = static_cast<const unsigned char*>(address);
  return (at >= dynamic_memory && at < dynamic_memory + kDynamicCapacity) || shared_symbol(address);
}

unsigned char* dynamic_shared_memory() { return dynamic_memory; }

void atomic(void* address, size_t bytes, void (*update)(void*, void*), void* argument) {
  const Unwatched scope;
  access(address, bytes, Access::Atomic, true, __builtin_return_address(0));
  update(address, argument);
}

void access(const void* address, size_t bytes, Access kind, bool aligned, const void* instruction) {
  const auto at = static_cast<const unsigned char*>(address);
  const Unwatched scope;
  if (aligned && reinterpret_cast<uintptr_t>(at) % bytes != 0) {
    misaligned(at, bytes, verb(kind), instruction);
  }
  if (at >= dynamic_memory && at < dynamic_memory + kDynamicCapacity) {
    const size_t offset = at - dynamic_memory;
    if (offset + bytes > dynamic_bytes) {
      fail_at(instruction, text("%zu-byte %s out of bounds at %s: ask for more in the launch", bytes, verb(kind),
                                shared_name(at, nullptr).c_str()));
    }
    return shared_access(&dynamic_cells[offset], at, bytes, kind, nullptr, instruction);
  }
  if (const Symbol* variable = shared_symbol(at)) {
    if (!variable->visible || reinterpret_cast<uintptr_t>(at) + bytes > variable->end()) {
      fail_at(
          instruction,
          text("%zu-byte %s out of bounds at %s%s", bytes, verb(kind), shared_name(at, variable).c_str(),
               variable->visible ? ""
                                 : ", a variable of another function: a kernel declares its own and passes pointers"));
    }
    const size_t offset = reinterpret_cast<uintptr_t>(at) - shared_symbols().front().begin;
    return shared_access(&static_cells[offset], at, bytes, kind, variable, instruction);
  }
  if (kind == Access::Read && (in_this_module(at) || (at >= parameters_begin && at + bytes <= parameters_end))) return;
  const std::string error = global_access(at, bytes, kind);
  if (!error.empty()) fail_at(instruction, error);
}

namespace {

inline void hook(const void* address, size_t bytes, Access kind, bool aligned, const void* instruction) {
  if (!watching || !on_fiber(__builtin_frame_address(0))) return;
  const auto at = static_cast<const unsigned char*>(address);
  // Most accesses are of local variables, or of threadIdx and its kin.
  if (at >= block.current->stack && at < block.current->stack + kStackBytes) return;
  if (at == reinterpret_cast<unsigned char*>(&threadIdx.x) || at == reinterpret_cast<unsigned char*>(&blockDim.x))
    return;
  access(address, bytes, kind, aligned, instruction);
}

struct SourceLocation {  // these two as the compiler lays them out
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  SourceLocation where;
  const void* type;
  unsigned char log_alignment, access_kind;
};

}  // namespace
}  // namespace cuda_on_cpu

#define HOOK __attribute__((visibility("hidden")))
extern "C" {

#define SIZED(n)                                                                                   \
  HOOK void __tsan_read##n(void* address) {                                                        \
    cuda_on_cpu::hook(address, n, cuda_on_cpu::Access::Read, true, __builtin_return_address(0));   \
  }                                                                                                \
  HOOK void __tsan_write##n(void* address) {                                                       \
    cuda_on_cpu::hook(address, n, cuda_on_cpu::Access::Write, true, __builtin_return_address(0));  \
  }                                                                                                \
  HOOK void __tsan_unaligned_read##n(void* address) {                                              \
    cuda_on_cpu::hook(address, n, cuda_on_cpu::Access::Read, false, __builtin_return_address(0));  \
  }                                                                                                \
  HOOK void __tsan_unaligned_write##n(void* address) {                                             \
    cuda_on_cpu::hook(address, n, cuda_on_cpu::Access::Write, false, __builtin_return_address(0)); \
  }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
#undef SIZED

HOOK void __tsan_read_range(void* address, unsigned long bytes) {
  cuda_on_cpu::hook(address, bytes, cuda_on_cpu::Access::Read, false, __builtin_return_address(0));
}
HOOK void __tsan_write_range(void* address, unsigned long bytes) {
  cuda_on_cpu::hook(address, bytes, cuda_on_cpu::Access::Write, false, __builtin_return_address(0));
}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_init() {}

// -fsanitize=bounds: an index into an array whose length the compiler knows, in registers or in shared memory.
HOOK void __ubsan_handle_out_of_bounds(cuda_on_cpu::SourceLocation* where, void* index) {
  if (!cuda_on_cpu::watching || !cuda_on_cpu::on_fiber(__builtin_frame_address(0))) return;
  cuda_on_cpu::fail_at(
      nullptr, cuda_on_cpu::text("index %td is out of bounds of its array [%s:%u]", reinterpret_cast<intptr_t>(index),
                                 cuda_on_cpu::base_name(where->file).c_str(), where->line));
}

// -fsanitize=alignment: a vector access at an address that is no multiple of it. The compiler may split such an access
// before __tsan_read16 could see it whole.
HOOK void __ubsan_handle_type_mismatch_v1(cuda_on_cpu::TypeMismatch* of, void* address) {
  if (!cuda_on_cpu::watching || !cuda_on_cpu::on_fiber(__builtin_frame_address(0))) return;
  cuda_on_cpu::misaligned(address, size_t(1) << of->log_alignment, "access", __builtin_return_address(0));
}
}
