// The warp's collective functions and the instructions that csrc/device wraps, by the words of the PTX ISA.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda_bf16.h"
#include "internal.h"

namespace cuda_on_cpu {
namespace {

struct Shuffled {
  Shuffle kind;
  uint64_t bits, result;
  int lane, width;
};

// The lane that `lane` reads; its own where the source lies outside its segment of `width` lanes.
int source_lane(const Shuffled& ask, int lane) {
  const int first = lane & ~(ask.width - 1), last = first + ask.width - 1;
  const int source = ask.kind == Shuffle::Index  ? first + (ask.lane & (ask.width - 1))
                     : ask.kind == Shuffle::Up   ? lane - ask.lane
                     : ask.kind == Shuffle::Down ? lane + ask.lane
                                                 : lane ^ ask.lane;
  // An xor may reach into earlier segments, as the ISA has it; the others stay within their own.
  const bool below = ask.kind != Shuffle::Xor && source < first;
  return below || source > last ? lane : source;
}

void shuffle_all(void* const* operands, unsigned mask, void*) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<Shuffled*>(operands[lane]);
    if (!mine) continue;
    const int source = source_lane(*mine, lane);
    if (!(mask >> source & 1))
      fail("a shuffle reads lane %d, which its mask 0x%08x leaves out: the value is undefined", source, mask);
    mine->result = static_cast<const Shuffled*>(operands[source])->bits;
  }
}

constexpr const char* kShuffleNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
constexpr const char* kVoteNames[] = {"__ballot_sync", "__all_sync", "__any_sync"};

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int lane, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("a shuffle's width must be a power of 2 up to 32, got %d", width);
  Shuffled ask{kind, bits, 0, lane, width};
  meet(kShuffleNames[static_cast<int>(kind)], mask, &ask, shuffle_all, nullptr, site);
  return ask.result;
}

unsigned vote(Vote kind, unsigned mask, bool predicate, Site site) {
  unsigned ballot = predicate;
  const auto count = [](void* const* operands, unsigned, void*) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= operands[i] ? *static_cast<unsigned*>(operands[i]) << i : 0;
    for (int i = 0; i < 32; ++i) {
      if (operands[i]) *static_cast<unsigned*>(operands[i]) = all;
    }
  };
  meet(kVoteNames[static_cast<int>(kind)], mask, &ballot, count, nullptr, site);
  return kind == Vote::Ballot ? ballot : kind == Vote::All ? ballot == mask : ballot != 0;
}

// --- mma.sync: fragments as in "Matrix Fragments for mma.m16n8k8 / .m16n8k16" ---------------------------------------

namespace {

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};

struct MmaShape {
  Matrix kind;
  int k;
};

// Elements of a 32-bit register: two of 16 bits, or one of 32 whose low 13 bits the tensor cores do not read.
void unpack(Matrix kind, uint32_t bits, float* to) {
  if (kind == Matrix::TF32) {
    to[0] = bits_as<float>(bits & ~0x1fffu);
    return;
  }
  for (int h = 0; h < 2; ++h) {
    const auto element = static_cast<uint16_t>(bits >> 16 * h);
    to[h] = kind == Matrix::F16 ? half_value(element) : bfloat16_value(element);
  }
}

float rounded_toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// Sums are exact within an instruction and rounded toward zero at its end, as tensor cores round.
void multiply(void* const* operands, unsigned, void* argument) {
  const MmaShape shape = *static_cast<MmaShape*>(argument);
  const int wide = shape.kind == Matrix::TF32 ? 1 : 2;  // elements of a register
  const int registers = shape.k / (4 * wide);           // of B; A has twice as many
  float a[16][16], b[16][8];
  double d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MmaOperands*>(operands[lane]);
    const int group = lane / 4, in_group = lane % 4;
    float pair[2];
    for (int r = 0; r < 2 * registers; ++r) {
      unpack(shape.kind, mine.a[r], pair);
      for (int h = 0; h < wide; ++h) a[group + 8 * (r % 2)][in_group * wide + h + 4 * wide * (r / 2)] = pair[h];
    }
    for (int r = 0; r < registers; ++r) {
      unpack(shape.kind, mine.b[r], pair);
      for (int h = 0; h < wide; ++h) b[in_group * wide + h + 4 * wide * r][group] = pair[h];
    }
    for (int i = 0; i < 4; ++i) d[group + 8 * (i / 2)][in_group * 2 + i % 2] = mine.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < shape.k; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += double{a[row][k]} * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const double sum = d[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
      static_cast<const MmaOperands*>(operands[lane])->d[i] = rounded_toward_zero(sum);
    }
  }
}

}  // namespace

void mma(Matrix kind, int k, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaOperands operands{d, a, b};
  MmaShape shape{kind, k};
  meet("mma.sync", 0xffffffffu, &operands, multiply, &shape, site);
}

// --- ldmatrix -------------------------------------------------------------------------------------------------------

namespace {

struct LdmatrixOperands {
  uint32_t* registers;
  const unsigned char* row;
};

struct LdmatrixShape {
  int matrices;
  bool transposed;
  const void* instruction;
};

// Matrix m has its 8 rows of 16 bytes where lanes 8m to 8m+7 point. Each lane reads its own two elements of each.
void load_matrices(void* const* operands, unsigned, void* argument) {
  const LdmatrixShape shape = *static_cast<LdmatrixShape*>(argument);
  Thread* const self = block.current;
  Thread* const lanes = self - block.number(*self) % 32;
  const auto row_of = [&](int lane) { return static_cast<const LdmatrixOperands*>(operands[lane])->row; };
  for (int lane = 0; lane < 8 * shape.matrices; ++lane) {
    block.current = &lanes[lane];
    if (reinterpret_cast<uintptr_t>(row_of(lane)) % 16)
      fail_at(shape.instruction, "misaligned: ldmatrix reads rows at multiples of 16 bytes");
    if (!is_shared(row_of(lane))) fail_at(shape.instruction, "ldmatrix reads shared memory, and this address is not");
  }
  for (int lane = 0; lane < 32; ++lane) {
    block.current = &lanes[lane];
    for (int m = 0; m < shape.matrices; ++m) {
      uint16_t pair[2];
      for (int h = 0; h < 2; ++h) {
        const int row = shape.transposed ? lane % 4 * 2 + h : lane / 4,
                  column = shape.transposed ? lane / 4 : lane % 4 * 2 + h;
        const unsigned char* from = row_of(8 * m + row) + 2 * column;
        access(from, 2, Access::Read, true, shape.instruction);
        memcpy(&pair[h], from, 2);
      }
      static_cast<const LdmatrixOperands*>(operands[lane])->registers[m] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
  block.current = self;
}

}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* row, Site site) {
  LdmatrixOperands operands{registers, static_cast<const unsigned char*>(row)};
  LdmatrixShape shape{matrices, transposed, __builtin_return_address(0)};
  meet("ldmatrix.sync", 0xffffffffu, &operands, load_matrices, &shape, site);
}

// --- cp.async: nothing arrives before the wait ----------------------------------------------------------------------

void cp_async(void* shared, const void* global, int bytes, int read_bytes) {
  const Unwatched scope;
  const void* instruction = __builtin_return_address(0);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || read_bytes < 0 || read_bytes > bytes) {
    fail_at(instruction, text("cp.async copies 4, 8 or 16 bytes and reads no more, got %d and %d", bytes, read_bytes));
  }
  if (!is_shared(shared)) fail_at(instruction, "cp.async copies to shared memory, and this address is not");
  if (reinterpret_cast<uintptr_t>(global) % bytes) {
    fail_at(instruction, text("misaligned cp.async: its source must be at a multiple of %d bytes", bytes));
  }
  if (read_bytes) access(global, read_bytes, Access::Read, false, instruction);
  access(shared, bytes, Access::CopyBegins, true, instruction);
  Thread& self = *block.current;
  self.copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
                         read_bytes, self.open_group});
}

void cp_async_commit() { ++block.current->open_group; }

void cp_async_wait(int groups_left) {
  const Unwatched scope;
  Thread& self = *block.current;
  const int complete = groups_left < 0 ? self.open_group + 1 : self.open_group - groups_left;  // groups before this one
  size_t arrived = 0;
  for (; arrived < self.copies.size() && self.copies[arrived].group < complete; ++arrived) {
    const Copy& copy = self.copies[arrived];
    if (copy.read_bytes) memcpy(copy.to, copy.from, copy.read_bytes);
    memset(copy.to + copy.read_bytes, 0, copy.bytes - copy.read_bytes);
    access(copy.to, copy.bytes, Access::CopyEnds, false, nullptr);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + arrived);
}

}  // namespace cuda_on_cpu
