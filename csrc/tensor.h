// A tensor as the launchers see it: a pointer and its geometry. Plain data; Python owns the memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace transfuse {

// Python reads these numbers from the module (_C.dtypes), so their order is free to change.
enum class DType : int { Float32 = 0, Float16, BFloat16, Int32, Int64, Bool };

constexpr int kDTypes = 6;
constexpr const char* kDTypeNames[kDTypes] = {"float32", "float16", "bfloat16", "int32", "int64", "bool"};

struct TensorView {
  static constexpr int kMaxDims = 8;

  void* data;
  DType dtype;
  int ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements; 0 where a dimension was expanded

  template <typename T>
  T* as() const { return static_cast<T*>(data); }
};

using OptionalTensor = std::optional<TensorView>;

inline const TensorView* present(const OptionalTensor& t) { return t ? &*t : nullptr; }

// "float16 (8, 768)", for messages.
std::string describe(const TensorView& tensor);

}  // namespace transfuse
