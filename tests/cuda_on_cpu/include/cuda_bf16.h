// Stands in for NVIDIA's header of this name: __nv_bfloat16, the upper half of an fp32, rounded to nearest even.
#pragma once

#include "cuda_fp16.h"

namespace cuda_on_cpu {

inline uint16_t bfloat16_bits(float value) {
  const uint32_t u = bits_as<uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

inline float bfloat16_value(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

}  // namespace cuda_on_cpu

struct __nv_bfloat16 {
  uint16_t raw;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {cuda_on_cpu::bfloat16_bits(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return cuda_on_cpu::bfloat16_value(x.raw); }
