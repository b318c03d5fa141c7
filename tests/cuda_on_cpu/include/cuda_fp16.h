// Stands in for NVIDIA's header of this name: __half with IEEE binary16 rounding to nearest even. Kernels reckon in
// float, so the 16-bit types only convert.
#pragma once

#include "cuda_runtime.h"

namespace cuda_on_cpu {

inline uint16_t half_bits(float value) {
  const uint32_t all = bits_as<uint32_t>(value), sign = all >> 16 & 0x8000u;
  uint32_t u = all & 0x7fffffffu;
  if (u > 0x7f800000u) return 0x7fff;
  if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and beyond
  if (u < 0x38800000u) {  // below 2^-14: subnormal, a multiple of 2^-24, which is the last place of 0.5f
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(bits_as<float>(u) + 0.5f) - bits_as<uint32_t>(0.5f)));
  }
  u += 0xfffu + (u >> 13 & 1u);
  return static_cast<uint16_t>(sign | (u - 0x38000000u) >> 13);
}

inline float half_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude < 0x400u) return bits_as<float>(sign | bits_as<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  return bits_as<float>(sign | ((magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u)));
}

}  // namespace cuda_on_cpu

struct __half {
  uint16_t raw;
};

inline __half __float2half_rn(float x) { return {cuda_on_cpu::half_bits(x)}; }
inline float __half2float(__half x) { return cuda_on_cpu::half_value(x.raw); }
