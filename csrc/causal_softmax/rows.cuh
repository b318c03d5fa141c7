// Rows of (..., q_len, k_len) tensors of any strides: where a row starts, and its packs of neighbouring keys.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/vector_access.h"
#include "tensor.h"

namespace transfuse::causal_softmax {

constexpr int kRowDims = TensorView::kMaxDims - 1;

// One tensor: a row's start is the sum of its indices times `row`, its keys are `column` elements apart.
struct Rows {
  void* data;            // null: absent
  int64_t row[kRowDims];
  int64_t column;        // 0 where broadcast over the keys
  bool packed;           // VEC neighbouring keys are one aligned access
};

// The row dimensions that all tensors of a call share, and the one along which queries are counted.
struct Grid {
  int64_t sizes[kRowDims];
  int dims;
  int query;         // -1: a single query, number 0
  int64_t diagonal;  // query i sees keys 0 .. i + diagonal
  int64_t N;         // keys
};

// Takes the index along the last dimension off a row's number. 64-bit divisions take a dozen times those of 32 bits.
__device__ __forceinline__ int64_t take_last(int64_t& row, int64_t size) {
  if (((row | size) >> 32) == 0) {
    const uint32_t whole = static_cast<uint32_t>(row) / static_cast<uint32_t>(size);
    const int64_t index = row - whole * size;
    row = whole;
    return index;
  }
  const int64_t whole = row / size, index = row - whole * size;
  row = whole;
  return index;
}

// Where row number `row` of the dimensions [first, last) starts in each of COUNT tensors; `query` gets its index too.
template <int COUNT>
struct Starts {
  int64_t at[COUNT];
  int64_t query;

  __device__ __forceinline__ Starts(const Grid& grid, const Rows (&tensors)[COUNT], int64_t row, int first, int last)
      : at{}, query(0) {
    for (int d = last - 1; d >= first; --d) {
      const int64_t index = d == first ? row : take_last(row, grid.sizes[d]);
#pragma unroll
      for (int t = 0; t < COUNT; ++t) at[t] += index * tensors[t].row[d];
      if (d == grid.query) query = index;
    }
  }

  __device__ __forceinline__ Starts& operator+=(const Starts& other) {
#pragma unroll
    for (int t = 0; t < COUNT; ++t) at[t] += other.at[t];
    query += other.query;
    return *this;
  }
};

__device__ __forceinline__ int64_t visible_keys(const Grid& grid, int64_t query) {
  return min(max(query + grid.diagonal + 1, int64_t(0)), grid.N);
}

// Keys [column, column + VEC) of a row that starts at `row`; VEC > 1 only where such packs are aligned.
template <typename T, int VEC>
__device__ __forceinline__ device::Pack<T, VEC> read_keys(const Rows& tensor, int64_t row, int64_t column) {
  const T* keys = static_cast<const T*>(tensor.data) + row;
  if constexpr (VEC > 1) {
    return device::load<VEC>(keys + column);
  } else {
    return {keys[column * tensor.column]};
  }
}

// The same where tensor.packed says whether they are: of mask (bytes) and bias, which are often broadcast.
template <typename T, int VEC>
__device__ __forceinline__ device::Pack<T, VEC> read_broadcast_keys(const Rows& tensor, int64_t row, int64_t column) {
  const T* keys = static_cast<const T*>(tensor.data) + row;
  device::Pack<T, VEC> pack;
  if (VEC > 1 && tensor.packed) {
    if constexpr (VEC > 1 && sizeof(T) == 1) {
      using Word = std::conditional_t<VEC == 8, uint64_t, uint32_t>;
      static_assert(sizeof(Word) == VEC);
      const Word word = *reinterpret_cast<const Word*>(keys + column);
      memcpy(&pack, &word, sizeof(Word));
    } else {
      pack = device::load<VEC>(keys + column);
    }
    return pack;
  }
#pragma unroll
  for (int j = 0; j < VEC; ++j) pack.at[j] = keys[(column + j) * tensor.column];
  return pack;
}

}  // namespace transfuse::causal_softmax
