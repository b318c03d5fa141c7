// What a launcher throws. pybind11 makes std::invalid_argument a ValueError and std::runtime_error a RuntimeError.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace transfuse {

// What a call does with a tensor. Only tests/cuda_on_cpu reads this: it holds the kernels to it.
enum class Role {
  Input,      // is never written
  Output,     // every element is written before the call ends, and read back only after that
  Workspace,  // elements are read only after they were written; some may stay unwritten
  Updated,    // holds values already: any element may be read or written
};

struct NamedTensor {
  const char* name;
  const TensorView* tensor;  // nullptr when absent
  Role role = Role::Input;
};

// One call of a launcher: its op and all tensors that its kernels touch. Text is only made when something is wrong.
class Call {
 public:
  Call(const char* op, std::initializer_list<NamedTensor> tensors) : op(op) {
    for (const NamedTensor& t : tensors) {
      if (count_ < kMaxTensors) tensors_[count_++] = t;
    }
  }

#ifdef TRANSFUSE_CUDA_ON_CPU
  ~Call() noexcept(false);  // throws when the kernels left an output unwritten
#endif

  // "x float16 (8, 768), weight float32 (768)"
  std::string shapes() const;

  const NamedTensor* begin() const { return tensors_; }
  const NamedTensor* end() const { return tensors_ + count_; }

  const char* const op;

 private:
  static constexpr int kMaxTensors = 32;
  NamedTensor tensors_[kMaxTensors];
  int count_ = 0;
};

// ValueError "op: message; got shapes" unless ok. Python validated before, in the user's words; these checks only keep
// a wrong call from reading wild memory.
inline void require(bool ok, const Call& call, const char* message) {
  if (!ok) throw std::invalid_argument(std::string(call.op) + ": " + message + "; got " + call.shapes());
}

// RuntimeError "op: doing failed with <CUDA's name and text> for shapes; remedy" unless the cudaError_t `code` is 0.
void check_cuda(int code, const Call& call, const char* doing);

}  // namespace transfuse
