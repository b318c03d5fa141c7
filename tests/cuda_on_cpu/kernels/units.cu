// Kernels that show what one device function does, for comparison with torch and with the PTX ISA's formulas.
#include "device/cp_async.h"
#include "device/mma.h"
#include "device/vector_access.h"
#include "planted.h"

namespace planted {
namespace {

using transfuse::Call;
using transfuse::DType;
using transfuse::Role;
using namespace transfuse::device;

template <typename From, typename To>
__global__ void convert_kernel(const From* from, To* to, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) to[i] = from_float<To>(to_float(from[i]));
}

__global__ void shuffles_kernel(const float* in, float* out, int kind, int lane, int width) {
  const float x = in[threadIdx.x];
  constexpr unsigned all = 0xffffffffu;
  out[threadIdx.x] = kind == 0   ? __shfl_sync(all, x, lane, width)
                     : kind == 1 ? __shfl_up_sync(all, x, lane, width)
                     : kind == 2 ? __shfl_down_sync(all, x, lane, width)
                                 : __shfl_xor_sync(all, x, lane, width);
}

// out: (4, 32): ballot, all, any, and how many lanes are there
__global__ void votes_kernel(const int* in, int* out) {
  const bool predicate = in[threadIdx.x] != 0;
  out[96 + threadIdx.x] = __popc(__activemask());
  out[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffffffu, predicate));
  out[32 + threadIdx.x] = __all_sync(0xffffffffu, predicate);
  out[64 + threadIdx.x] = __any_sync(0xffffffffu, predicate);
}

// a, b, d: (32 lanes, registers)
template <typename T, int K>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  constexpr int kA = K / 4, kB = K / 8;
  uint32_t a_reg[kA], b_reg[kB];
  float d_reg[4];
  for (int i = 0; i < kA; ++i) a_reg[i] = a[threadIdx.x * kA + i];
  for (int i = 0; i < kB; ++i) b_reg[i] = b[threadIdx.x * kB + i];
  for (int i = 0; i < 4; ++i) d_reg[i] = d[threadIdx.x * 4 + i];
  if constexpr (K == 16) {
    mma_m16n8k16<T>(d_reg, a_reg, b_reg);
  } else {
    mma_m16n8k8<T>(d_reg, a_reg, b_reg);
  }
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = d_reg[i];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, float* d) {
  uint32_t a_reg[4], b_reg[2];
  float d_reg[4];
  for (int i = 0; i < 4; ++i) a_reg[i] = to_tf32(a[threadIdx.x * 4 + i]);
  for (int i = 0; i < 2; ++i) b_reg[i] = to_tf32(b[threadIdx.x * 2 + i]);
  for (int i = 0; i < 4; ++i) d_reg[i] = d[threadIdx.x * 4 + i];
  mma_m16n8k8_tf32(d_reg, a_reg, b_reg);
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = d_reg[i];
}

// in: (MATRICES, 8, 8) of 16 bits; rows: (32), the row of `in` to which each lane points; out: (32 lanes, MATRICES)
// registers
template <int MATRICES>
__global__ void ldmatrix_kernel(const uint16_t* in, const int* rows, uint32_t* out, bool transposed) {
  __shared__ alignas(16) uint16_t tile[MATRICES * 64];
  for (unsigned i = threadIdx.x; i < MATRICES * 64; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t m[MATRICES];
  const uint16_t* row = &tile[rows[threadIdx.x] * 8];
  if (transposed) {
    ldmatrix_transposed(m, row);
  } else {
    ldmatrix(m, row);
  }
  for (int i = 0; i < MATRICES; ++i) out[threadIdx.x * MATRICES + i] = m[i];
}

__global__ void barriers_kernel(float* out, int rounds) {
  __shared__ float ring[1024];
  const unsigned t = threadIdx.x;
  ring[t] = static_cast<float>(t);
  for (int i = 0; i < rounds; ++i) {
    __syncthreads();
    const float next = ring[(t + 1) % blockDim.x];
    __syncthreads();
    ring[t] = next;
  }
  out[t] = ring[t];
}

// in, out: (2, 128). Two stages in flight; each thread reads what its neighbour copied. A stage's second half is filled
// with zeros.
__global__ void copies_kernel(const float* in, float* out) {
  __shared__ __align__(16) float stages[2][128];
  const unsigned t = threadIdx.x;
  for (int s = 0; s < 2; ++s) {
    cp_async<16>(&stages[s][4 * t], in + 128 * s + 4 * t, t < 16 ? 16 : 0);
    cp_async_commit();
  }
  for (int s = 0; s < 2; ++s) {
    if (s == 0) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    for (unsigned i = t; i < 128; i += 32) out[128 * s + i] = stages[s][i];
  }
}

template <typename From, typename To>
void launch_convert(const Call& call, const TensorView& from, const TensorView& to, const LaunchTarget& target) {
  const int n = static_cast<int>(from.sizes[0]);
  launch(call, target, dim3((n + 255) / 256), dim3(256), 0, convert_kernel<From, To>, from.as<From>(), to.as<To>(), n);
}

}  // namespace

void convert(const TensorView& from, const TensorView& to, const LaunchTarget& target) {
  const Call call("convert", {{"from", &from}, {"to", &to, Role::Output}});
  if (from.dtype == DType::Float16) return launch_convert<__half, float>(call, from, to, target);
  if (from.dtype == DType::BFloat16) return launch_convert<__nv_bfloat16, float>(call, from, to, target);
  if (to.dtype == DType::Float16) return launch_convert<float, __half>(call, from, to, target);
  launch_convert<float, __nv_bfloat16>(call, from, to, target);
}

void shuffles(const TensorView& in, const TensorView& out, int kind, int lane, int width, const LaunchTarget& target) {
  const Call call("shuffles", {{"in", &in}, {"out", &out, Role::Output}});
  launch(call, target, dim3(1), dim3(32), 0, shuffles_kernel, in.as<float>(), out.as<float>(), kind, lane, width);
}

void votes(const TensorView& in, const TensorView& out, const LaunchTarget& target) {
  const Call call("votes", {{"in", &in}, {"out", &out, Role::Output}});
  launch(call, target, dim3(1), dim3(32), 0, votes_kernel, in.as<int>(), out.as<int>());
}

void run_mma(const std::string& kind, const TensorView& a, const TensorView& b, const TensorView& d,
             const LaunchTarget& target) {
  const Call call("mma", {{"a", &a}, {"b", &b}, {"d", &d, Role::Updated}});
  if (kind == "tf32") {
    launch(call, target, dim3(1), dim3(32), 0, mma_tf32_kernel, a.as<float>(), b.as<float>(), d.as<float>());
    return;
  }
  const bool half = kind == "float16", short_k = a.sizes[1] == 2;
  const auto kernel = half ? (short_k ? mma_kernel<__half, 8> : mma_kernel<__half, 16>)
                           : (short_k ? mma_kernel<__nv_bfloat16, 8> : mma_kernel<__nv_bfloat16, 16>);
  launch(call, target, dim3(1), dim3(32), 0, kernel, a.as<uint32_t>(), b.as<uint32_t>(), d.as<float>());
}

void run_ldmatrix(const TensorView& in, const TensorView& rows, const TensorView& out, bool transposed,
                  const LaunchTarget& target) {
  const Call call("ldmatrix", {{"in", &in}, {"rows", &rows}, {"out", &out, Role::Output}});
  const auto kernel = in.sizes[0] == 1   ? ldmatrix_kernel<1>
                      : in.sizes[0] == 2 ? ldmatrix_kernel<2>
                                         : ldmatrix_kernel<4>;
  launch(call, target, dim3(1), dim3(32), 0, kernel, in.as<uint16_t>(), rows.as<int>(), out.as<uint32_t>(),
         transposed);
}

void barriers(const TensorView& out, int rounds, const LaunchTarget& target) {
  const Call call("barriers", {{"out", &out, Role::Output}});
  launch(call, target, dim3(1), dim3(static_cast<unsigned>(out.sizes[0])), 0, barriers_kernel, out.as<float>(), rounds);
}

void copies(const TensorView& in, const TensorView& out, const LaunchTarget& target) {
  const Call call("copies", {{"in", &in}, {"out", &out, Role::Output}});
  launch(call, target, dim3(1), dim3(32), 0, copies_kernel, in.as<float>(), out.as<float>());
}

}  // namespace planted
