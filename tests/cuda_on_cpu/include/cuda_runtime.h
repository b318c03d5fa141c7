// Stands in for NVIDIA's header of this name, and for what nvcc knows by itself: keywords, vector types, built-in
// variables, warp functions, atomics and intrinsics, as the CUDA C++ programming guide defines them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#ifdef CUDA_ON_CPU_KERNELS  // a .cu file: the standard headers that use alignas, before it becomes a macro
#include <atomic>
#include <functional>
#include <memory>
#endif

#include "cuda_runtime_api.h"
#include "engine.h"

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One copy will do: blocks run one after another. The engine finds these variables by their symbols. Dynamic shared
// memory comes from device/shared_memory.h: `extern __shared__` cannot compile here. CUDA allows alignas after
// __shared__, C++ does not after static: GCC's own word may stand there.
#define __shared__ static
#ifdef CUDA_ON_CPU_KERNELS
#define alignas(...) __attribute__((aligned(__VA_ARGS__)))
#endif

#define CUDA_ON_CPU_VECTOR(type, name, bytes)                      \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(bytes) name##4 { type x, y, z, w; };              \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(float, float, 16)
CUDA_ON_CPU_VECTOR(int, int, 16)
CUDA_ON_CPU_VECTOR(unsigned, uint, 16)
CUDA_ON_CPU_VECTOR(short, short, 8)
CUDA_ON_CPU_VECTOR(unsigned short, ushort, 8)
#undef CUDA_ON_CPU_VECTOR

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  struct Frame {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> values;
  } frame{kernel, {std::forward<Args>(args)...}};
  const auto entry = [](void* data) {
    Frame& mine = *static_cast<Frame*>(data);
    std::apply(mine.kernel, mine.values);
  };
  cuda_on_cpu::run(*config, reinterpret_cast<const void*>(kernel), entry, &frame, sizeof(frame));
  return cudaSuccess;
}

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Barriers, votes and shuffles.
inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier(CUDA_ON_CPU_HERE); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_barrier(mask, CUDA_ON_CPU_HERE);
}
inline unsigned __activemask() { return cuda_on_cpu::live_lanes(); }
inline unsigned __ballot_sync(unsigned mask, bool predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(cuda_on_cpu::Vote::Ballot, mask, predicate, CUDA_ON_CPU_HERE);
}
inline int __all_sync(unsigned mask, bool predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(cuda_on_cpu::Vote::All, mask, predicate, CUDA_ON_CPU_HERE);
}
inline int __any_sync(unsigned mask, bool predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(cuda_on_cpu::Vote::Any, mask, predicate, CUDA_ON_CPU_HERE);
}

namespace cuda_on_cpu {
template <typename T>
T shuffle_any(Shuffle kind, unsigned mask, T value, int lane, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, lane, width, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SHUFFLE(name, kind)                                                                      \
  template <typename T>                                                                                      \
  T name(unsigned mask, T value, int lane, int width = 32, CUDA_ON_CPU_SITE) {                               \
    return cuda_on_cpu::shuffle_any(cuda_on_cpu::Shuffle::kind, mask, value, lane, width, CUDA_ON_CPU_HERE); \
  }
CUDA_ON_CPU_SHUFFLE(__shfl_sync, Index)
CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, Up)
CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, Down)
CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, Xor)
#undef CUDA_ON_CPU_SHUFFLE

// Atomics: threads of one host thread interleave only at barriers, so a plain update is atomic.
template <typename T, typename F>
T atomic_update(T* address, F update) {
  struct Step {
    F update;
    T before;
  } step{update, {}};
  const auto run = [](void* at, void* argument) {
    Step& mine = *static_cast<Step*>(argument);
    memcpy(&mine.before, at, sizeof(T));
    const T after = mine.update(mine.before);
    memcpy(at, &after, sizeof(T));
  };
  cuda_on_cpu::atomic(address, sizeof(T), run, &step);
  return step.before;
}
template <typename T>
T atomicAdd(T* address, T value) {
  return atomic_update(address, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMax(T* address, T value) {
  return atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, T value) {
  return atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* address, T value) {
  return atomic_update(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return atomic_update(address, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Arithmetic. The approximate functions are the exact ones here: a kernel's error on a GPU is a GPU's to show.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;
  return product;
}
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
#define __expf(x) expf(x)  // glibc declares these names, and does not define them
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanhf(x) tanhf(x)
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((uint64_t(x) * y) >> 32); }

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }

// Cache hints change no value.
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}
