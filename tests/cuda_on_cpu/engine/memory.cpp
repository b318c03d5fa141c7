// Every load and store of a kernel. The compiler's -fsanitize=thread puts a call before each; the functions it calls
// are at the end of this file, in place of a sanitizer's runtime.
#include <algorithm>
#include <cstring>

#include "cuda_runtime.h"
#include "internal.h"

namespace cuda_on_cpu {
namespace {

// The state of one byte of shared memory. Times are of Block::clock; a time before the block began is no time.
struct Cell {
  uint32_t written, read;
  uint16_t writer, reader;  // numbers of threads, or one of these:
  static constexpr uint16_t kSeveral = 0xffff, kAtomic = 0xfffe, kSeveralOfWarp = 0x8000;  // + the warp's number
  static constexpr uint32_t kInFlight = 0xffffffff;  // as `written`: a cp.async that nobody has waited for
  bool operator==(const Cell& other) const { return memcmp(this, &other, sizeof(Cell)) == 0; }
};

constexpr size_t kDynamicCapacity = 256 * 1024;  // more than any GPU gives, so that what lies past the end is ours too
alignas(1024) unsigned char dynamic_memory[kDynamicCapacity];
std::vector<Cell> dynamic_cells(kDynamicCapacity), static_cells;
size_t dynamic_bytes;
const unsigned char *parameters_begin, *parameters_end;

bool is_dynamic(const unsigned char* at) { return at >= dynamic_memory && at < dynamic_memory + kDynamicCapacity; }

std::string shared_name(const unsigned char* at) {
  const Symbol* variable = shared_symbol(at);
  if (!variable) return text("byte %td of dynamic shared memory (%zu bytes)", at - dynamic_memory, dynamic_bytes);
  return text("byte %zu of %s (%zu bytes, shared)", size_t(reinterpret_cast<uintptr_t>(at) - variable->begin),
              variable->name.c_str(), size_t(variable->end - variable->begin));
}

bool in_warp(uint16_t who, int warp) {
  return who < Cell::kSeveralOfWarp ? who / 32 == warp : who == Cell::kSeveralOfWarp + warp;
}

// Whether what `who` did at `when` comes before what thread `me` does now.
bool ordered(uint32_t when, uint16_t who, int me) {
  return when < block.last_barrier || who == me || (in_warp(who, me / 32) && when < block.last_warp_barrier[me / 32]);
}

// What is wrong with this access to one byte of shared memory; empty if nothing.
std::string wrong(const Cell& cell, Access kind, int me, const unsigned char* at) {
  const bool written = cell.written >= block.began;
  const auto message = [&](const char* format, uint16_t who) {
    const std::string by = who < block.threads.size() ? name_of(block.threads[who]) : "another thread";
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    return text(format, shared_name(at).c_str(), by.c_str());
#pragma GCC diagnostic pop
  };
  if (kind == Access::CopyEnds) return "";
  if (cell.written == Cell::kInFlight)
    return message(kind == Access::Read ? "reads %s before the cp.async of %s into it was waited for: cp_async_wait, "
                                          "then a barrier, must come first"
                                        : "writes %s while the cp.async of %s into it is in flight: wait for it first",
                   cell.writer);
  if (!written && (kind == Access::Read || kind == Access::Atomic))
    return "reads " + shared_name(at) +
           ", which no thread of this block has written yet: initialise it, or add the barrier that is missing";
  if (written && !(kind == Access::Atomic && cell.writer == Cell::kAtomic) && !ordered(cell.written, cell.writer, me))
    return message(kind == Access::Read
                       ? "race: reads %s, which %s wrote with no barrier between: add __syncthreads"
                       : "race: writes %s, which %s wrote with no barrier between: add __syncthreads",
                   cell.writer);
  if (kind != Access::Read && cell.read >= block.began && !ordered(cell.read, cell.reader, me))
    return message("race: writes %s, which %s reads with no barrier between: add __syncthreads", cell.reader);
  return "";
}

Cell recorded(Cell cell, Access kind, uint16_t me) {
  if (kind != Access::Read) {
    cell.writer = kind == Access::Atomic ? Cell::kAtomic : me;
    cell.written = kind == Access::CopyBegins ? Cell::kInFlight : block.clock;
    return cell;
  }
  const bool joins = cell.read >= block.last_barrier && cell.reader != me;
  const uint16_t several = in_warp(cell.reader, me / 32) ? Cell::kSeveralOfWarp + me / 32 : Cell::kSeveral;
  cell.reader = joins ? several : me;
  cell.read = block.clock;
  return cell;
}

void shared_access(Cell* cells, const unsigned char* at, size_t bytes, Access kind, const void* instruction) {
  const int me = block.number(*block.current);
  Cell before{}, after{};
  for (size_t i = 0; i < bytes; ++i) {
    if (i == 0 || !(cells[i] == before)) {  // an access's bytes mostly share one state
      before = cells[i];
      const std::string error = wrong(before, kind, me, at + i);
      if (!error.empty()) fail_at(instruction, error);
      after = recorded(before, kind, static_cast<uint16_t>(me));
    }
    cells[i] = after;
  }
}

const char* verb(Access kind) {
  return kind == Access::Read ? "read" : kind == Access::Atomic ? "atomic update" : "write";
}

[[noreturn]] void misaligned(const unsigned char* at, size_t alignment, const char* what, const void* instruction) {
  const Unwatched scope;
  const std::string where = is_shared(at) ? shared_name(at) : place(at, 1);
  fail_at(instruction,
          text("misaligned %s at %s: its address must be a multiple of %zu bytes", what, where.c_str(), alignment));
}

}  // namespace

void prepare_memory(const void* kernel, size_t dynamic_shared_bytes, const void* parameters, size_t parameter_bytes) {
  show_shared_symbols_of(kernel);
  dynamic_bytes = dynamic_shared_bytes;
  parameters_begin = static_cast<const unsigned char*>(parameters);
  parameters_end = parameters_begin + parameter_bytes;
  static_cells.resize(shared_symbols().empty() ? 0 : shared_symbols().back().end - shared_symbols().front().begin);
}

void forget_shared_memory() {
  std::fill(dynamic_cells.begin(), dynamic_cells.end(), Cell{});
  std::fill(static_cells.begin(), static_cells.end(), Cell{});
}

bool is_shared(const void* address) {
  return is_dynamic(static_cast<const unsigned char*>(address)) || shared_symbol(address);
}

unsigned char* dynamic_shared_memory() { return dynamic_memory; }

void atomic(void* address, size_t bytes, void (*update)(void*, void*), void* argument) {
  const Unwatched scope;
  access(address, bytes, Access::Atomic, true, __builtin_return_address(0));
  update(address, argument);
}

void access(const void* address, size_t bytes, Access kind, bool aligned, const void* instruction) {
  const auto at = static_cast<const unsigned char*>(address);
  const auto number = reinterpret_cast<uintptr_t>(at);
  const Unwatched scope;
  if (aligned && number % bytes != 0) misaligned(at, bytes, verb(kind), instruction);
  if (is_dynamic(at)) {
    const size_t offset = at - dynamic_memory;
    if (offset + bytes > dynamic_bytes)
      fail_at(instruction, text("%zu-byte %s out of bounds at %s: ask for more in the launch", bytes, verb(kind),
                                shared_name(at).c_str()));
    return shared_access(&dynamic_cells[offset], at, bytes, kind, instruction);
  }
  if (const Symbol* variable = shared_symbol(at)) {
    const char* remedy =
        variable->visible ? "" : ", a variable of another function: a kernel declares its own and passes pointers";
    if (!variable->visible || number + bytes > variable->end)
      fail_at(instruction,
              text("%zu-byte %s out of bounds at %s%s", bytes, verb(kind), shared_name(at).c_str(), remedy));
    return shared_access(&static_cells[number - shared_symbols().front().begin], at, bytes, kind, instruction);
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
  if (address == &threadIdx.x || address == &blockDim.x) return;
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

#define HOOK(name, bytes, kind, aligned)                                                                \
  __attribute__((visibility("hidden"))) void name {                                                     \
    cuda_on_cpu::hook(address, bytes, cuda_on_cpu::Access::kind, aligned, __builtin_return_address(0)); \
  }
#define SIZED(n)                                                \
  HOOK(__tsan_read##n(void* address), n, Read, true)            \
  HOOK(__tsan_write##n(void* address), n, Write, true)          \
  HOOK(__tsan_unaligned_read##n(void* address), n, Read, false) \
  HOOK(__tsan_unaligned_write##n(void* address), n, Write, false)
extern "C" {
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
HOOK(__tsan_read_range(void* address, unsigned long bytes), bytes, Read, false)
HOOK(__tsan_write_range(void* address, unsigned long bytes), bytes, Write, false)
#pragma GCC visibility push(hidden)
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// -fsanitize=bounds: an index into an array whose length the compiler knows, in registers or in shared memory.
void __ubsan_handle_out_of_bounds(cuda_on_cpu::SourceLocation* where, void* index) {
  if (!cuda_on_cpu::watching || !cuda_on_cpu::on_fiber(__builtin_frame_address(0))) return;
  cuda_on_cpu::fail_at(
      nullptr, cuda_on_cpu::text("index %td is out of bounds of its array [%s:%u]", reinterpret_cast<intptr_t>(index),
                                 cuda_on_cpu::base_name(where->file).c_str(), where->line));
}

// -fsanitize=alignment: a vector access at an address that is no multiple of it. The compiler may split such an access
// before __tsan_read16 could see it whole.
void __ubsan_handle_type_mismatch_v1(cuda_on_cpu::TypeMismatch* of, unsigned char* address) {
  if (!cuda_on_cpu::watching || !cuda_on_cpu::on_fiber(__builtin_frame_address(0))) return;
  cuda_on_cpu::misaligned(address, size_t(1) << of->log_alignment, "access", __builtin_return_address(0));
}
#pragma GCC visibility pop
}
