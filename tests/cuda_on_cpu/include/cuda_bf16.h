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

CUDA_ON_CPU_FLOAT16(__nv_bfloat16, cuda_on_cpu::bfloat16_bits, cuda_on_cpu::bfloat16_value)

using __nv_bfloat162 = __nv_bfloat162_pair;

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.raw; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return bits_as<__nv_bfloat16>(x); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {__nv_bfloat16(x.x), __nv_bfloat16(x.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline float __low2float(__nv_bfloat162 x) { return x.x; }
inline float __high2float(__nv_bfloat162 x) { return x.y; }
