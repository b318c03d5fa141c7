// The functions of csrc/device/mma.h, on the engine.
#pragma once

#include "cuda_bf16.h"

namespace transfuse::device {

template <int MATRICES>
void ldmatrix(uint32_t (&m)[MATRICES], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::ldmatrix(m, MATRICES, false, row, CUDA_ON_CPU_HERE);
}

template <int MATRICES>
void ldmatrix_transposed(uint32_t (&m)[MATRICES], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::ldmatrix(m, MATRICES, true, row, CUDA_ON_CPU_HERE);
}

template <typename T>
constexpr cuda_on_cpu::Matrix kMatrix =
    std::is_same_v<T, __half> ? cuda_on_cpu::Matrix::F16 : cuda_on_cpu::Matrix::BF16;

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma(kMatrix<T>, 16, d, a, b, CUDA_ON_CPU_HERE);
}

template <typename T>
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma(kMatrix<T>, 8, d, a, b, CUDA_ON_CPU_HERE);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma(cuda_on_cpu::Matrix::TF32, 8, d, a, b, CUDA_ON_CPU_HERE);
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace transfuse::device
