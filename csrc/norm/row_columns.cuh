// What every norm kernel shares: which columns of a row a thread holds, and sums over a row.
#pragma once

#include <cstdint>

#include "device/reduce.h"
#include "device/vector_access.h"

namespace transfuse::norm {

// ELEMENTS columns of a row of N, from `begin` on, in packs of VEC neighbours: the i-th at
// begin + (i * blockDim.x + threadIdx.x) * VEC.
template <int VEC, int ELEMENTS>
class RowColumns {
 public:
  static constexpr int kPacks = ELEMENTS / VEC;

  __device__ __forceinline__ RowColumns(int64_t N, int64_t begin)
      : begin_(begin), columns_(static_cast<int>(min(N - begin, int64_t(ELEMENTS) * blockDim.x))) {}

 protected:
  // Counted from `begin`, in 32 bits: 64-bit columns would cost a register an address.
  __device__ __forceinline__ int column(int pack) const {
    return (pack * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * VEC;
  }

  __device__ __forceinline__ bool inside(int pack) const { return column(pack) < columns_; }

  // Row m of a (M, N) tensor from `begin` on.
  template <typename E, typename V>
  __device__ __forceinline__ E* row(V* data, int64_t m, int64_t row_stride) const {
    return static_cast<E*>(data) + m * row_stride + begin_;
  }

  // All loads before their first use, so that they are in flight together; 0 outside.
  template <typename T>
  __device__ __forceinline__ void load_all(device::Pack<T, VEC> (&packs)[kPacks], const T* from) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      packs[i] = inside(i) ? device::load<VEC>(from + column(i)) : device::Pack<T, VEC>{};
    }
  }

  const int64_t begin_;
  const int columns_;
};

// Sums over the threads of a row, one barrier each (none where a warp holds the row): two buffers take turns, and the
// barrier of one sum protects the buffer of the sum before it.
class RowSums {
 public:
  __device__ __forceinline__ explicit RowSums(float (&smem)[2][device::kWarp]) : smem_(smem) {}

  __device__ __forceinline__ float operator()(float x) {
    turn_ ^= 1;
    return device::row_sum(x, smem_[turn_]);
  }

 private:
  float (&smem_)[2][device::kWarp];
  int turn_ = 0;
};

}  // namespace transfuse::norm
