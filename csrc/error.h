// What a launcher throws. pybind11 turns std::invalid_argument into ValueError and std::runtime_error into RuntimeError.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "tensor.h"

namespace transfuse {

// "x float16 (8, 768), weight float32 (768)"; absent tensors (nullptr) are left out.
std::string describe(std::initializer_list<std::pair<const char*, const TensorView*>> tensors);

// ValueError "op: message". Python validated before; these checks only keep a wrong call from reading wild memory.
inline void require(bool ok, const char* op, const std::string& message) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": " + message);
}

// RuntimeError "op: CUDA error <name>: <text>; shapes ...; remedy" unless `code` is cudaSuccess. `code` is a
// cudaError_t: an int here, so that this header serves the host compiler without CUDA's.
void check_cuda(int code, const char* op, const char* doing, const std::string& shapes);

}  // namespace transfuse
