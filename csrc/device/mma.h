// Matrix products of one warp on tensor cores: ldmatrix and mma.sync, each instruction wrapped once. Every lane calls.
//
// With g = lane / 4 and t = lane % 4, a lane holds of D += A B (D fp32 16 x 8, A row-major 16 x K, B K x 8):
//   d[i]                      D(g + 8 (i / 2), 2 t + i % 2)
//   16-bit, a[r] half h       A(g + 8 (r % 2), 2 t + h + 8 (r / 2))     b[r] half h   B(2 t + h + 8 r, g)
//   tf32,   a[r]              A(g + 8 (r % 2), t + 4 (r / 2))           b[r]          B(t + 4 r, g)
// ldmatrix gives a lane of an 8 x 8 matrix of 16-bit elements M(g, 2 t + h), transposed M(2 t + h, g): so for A from
// shared memory of row-major A, and for B from B transposed (a row of it per column), plainly; for B from row-major B
// transposed. Matrix m's row r begins where lane 8 m + r points, at a multiple of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#ifdef TRANSFUSE_CUDA_ON_CPU
#include "on_cpu/mma.h"  // the same functions, in tests/cuda_on_cpu
#else

namespace transfuse::device {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void ldmatrix(uint32_t (&m)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(m[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&m)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(m[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

// d += a b with T = __half or __nv_bfloat16, K = 16.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with K = 8.
template <typename T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);
template <>
__device__ __forceinline__ void mma_m16n8k8<__half>(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
template <>
__device__ __forceinline__ void mma_m16n8k8<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[2],
                                                           const uint32_t (&b)[1]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// x with 10 bits of fraction, ties away from zero. x - to_tf32(x) is exact: the low part of a product in three steps.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d += a b, K = 8, of tf32 elements: the low 13 bits of a and b are not read.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace transfuse::device
#endif

namespace transfuse::device {

template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // elements of 16 bytes
template <typename T>
constexpr int kStep = 2 * kChunk<T>;  // of K in one mma: 16, or 8 of tf32

// fp32 x = high + low for a product in three steps, high in tf32. Of low's 12 bits or fewer a tensor core reads the
// first 11: rounding would gain nothing. `high` may be `bits`.
template <int N>
__device__ __forceinline__ void split(uint32_t (&high)[N], uint32_t (&low)[N], const uint32_t (&bits)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float x, h;
    memcpy(&x, &bits[i], 4);
    high[i] = to_tf32(x);
    memcpy(&h, &high[i], 4);
    x -= h;
    memcpy(&low[i], &x, 4);
  }
}

}  // namespace transfuse::device
