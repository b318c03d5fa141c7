// Stands in for NVIDIA's header of this name: __half with IEEE binary16 rounding to nearest even.
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

// The conversions and operators of both 16-bit types; each operator rounds once, as the hardware's does.
#define CUDA_ON_CPU_FLOAT16(type, to_bits, to_value)                          \
  struct type {                                                               \
    uint16_t raw;                                                             \
    type() = default;                                                         \
    type(float value) : raw(to_bits(value)) {}                                \
    operator float() const { return to_value(raw); }                          \
  };                                                                          \
  inline type operator+(type a, type b) { return type(float(a) + float(b)); } \
  inline type operator-(type a, type b) { return type(float(a) - float(b)); } \
  inline type operator*(type a, type b) { return type(float(a) * float(b)); } \
  inline type operator/(type a, type b) { return type(float(a) / float(b)); } \
  inline type operator-(type a) {                                             \
    a.raw ^= 0x8000u;                                                         \
    return a;                                                                 \
  }                                                                           \
  inline bool operator<(type a, type b) { return float(a) < float(b); }       \
  inline bool operator>(type a, type b) { return float(a) > float(b); }       \
  inline bool operator==(type a, type b) { return float(a) == float(b); }     \
  inline bool operator!=(type a, type b) { return float(a) != float(b); }     \
  struct alignas(4) type##2_pair { type x, y; };
CUDA_ON_CPU_FLOAT16(__half, cuda_on_cpu::half_bits, cuda_on_cpu::half_value)

using half = __half;
using __half2 = __half2_pair;
using half2 = __half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.raw; }
inline __half __ushort_as_half(unsigned short x) { return bits_as<__half>(x); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline float __low2float(__half2 x) { return x.x; }
inline float __high2float(__half2 x) { return x.y; }
