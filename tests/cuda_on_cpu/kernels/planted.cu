// One small kernel for each kind of bug that the engine must find: right when `bug` is 0, wrong in one place else.
// Each reads `in` (n floats), writes `out` (n floats), one thread an element unless it says otherwise.
#include <map>

#include "device/cp_async.h"
#include "device/mma.h"
#include "device/shared_memory.h"
#include "planted.h"

namespace planted {
namespace {

using namespace transfuse::device;

__device__ int index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// --- global memory

__global__ void read_past_end(const float* in, float* out, int n, int bug) {
  const int i = index();
  if (i < n) out[i] = in[bug ? i + 1 : i];
}

__global__ void write_past_end(const float* in, float* out, int n, int bug) {
  const int i = index();
  if (i < n + bug) out[i] = i < n ? in[i] : 0.0f;
}

__global__ void read_before_start(const float* in, float* out, int n, int bug) {
  const int i = index();
  if (i < n) out[i] = in[i - bug];
}

__global__ void read_absent(const float* in, float* out, int n, int bug) {
  const int i = index();
  const float* absent = nullptr;
  if (i < n) out[i] = in[i] + (bug ? absent[i] : 0.0f);
}

__global__ void misaligned_vector(const float* in, float* out, int n, int bug) {
  const int i = index();  // four elements a thread
  if (4 * i + bug < n) {
    const float4 x = *reinterpret_cast<const float4*>(in + 4 * i + bug);
    out[4 * i] = x.x, out[4 * i + 1] = x.y, out[4 * i + 2] = x.z, out[4 * i + 3] = x.w;
  }
}

__global__ void writes_an_input(const float* in, float* out, int n, int bug) {
  const int i = index();
  if (i < n) out[i] = in[i];
  if (i < n && bug) const_cast<float*>(in)[i] = 1.0f;
}

__global__ void leaves_an_output(const float* in, float* out, int n, int bug) {
  const int i = index();
  if (i < n - bug) out[i] = in[i];
}

__global__ void reads_an_output(const float* in, float* out, int n, int bug) {
  const int i = index();
  if (i >= n) return;
  if (!bug) out[i] = in[i];
  out[i] += 1.0f;
}

// --- registers and shared memory

__global__ void register_index(const float* in, float* out, int n, int bug) {
  float local[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  const int i = index(), which = i % 4 + (bug ? 4 : 0);
  if (i < n) out[i] = in[i] * local[which];
}

__global__ void static_shared_index(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  float* const all = staged;
  const int i = index(), t = static_cast<int>(threadIdx.x);
  all[t] = i < n ? in[i] : 0.0f;
  __syncthreads();
  if (i < n) out[i] = bug ? all[t + 64] : all[t];
}

__global__ void dynamic_shared_index(const float* in, float* out, int n, int bug) {
  float* staged = reinterpret_cast<float*>(dynamic_shared_memory());  // blockDim.x floats
  const int i = index(), t = static_cast<int>(threadIdx.x);
  staged[t + (bug ? 1 : 0)] = i < n ? in[i] : 0.0f;
  __syncthreads();
  if (i < n) out[i] = staged[t + (bug ? 1 : 0)];
}

__global__ void uninitialised_shared(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  if (i < n && !(bug && t == 5)) staged[t] = in[i];
  __syncthreads();
  if (i < n) out[i] = staged[t];
}

__global__ void read_races(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  staged[t] = i < n ? in[i] : 0.0f;
  if (!bug) __syncthreads();
  const float left = staged[t ? t - 1 : 0];
  if (i < n) out[i] = left;
}

__global__ void write_races(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  staged[t] = i < n ? in[i] : 0.0f;
  __syncthreads();
  const float other = staged[63 - t];
  if (!bug) __syncthreads();
  staged[t] = other;
  if (i < n) out[i] = staged[t];
}

__global__ void warp_races(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  staged[t] = i < n ? in[i] : 0.0f;
  if (!bug) __syncwarp();
  if (i < n) out[i] = staged[t ^ 1];
}

__global__ void atomic_races(const float* in, float* out, int n, int bug) {
  __shared__ float total;
  const int i = index();
  if (threadIdx.x == 0) total = 0.0f;
  __syncthreads();
  const float x = i < n ? in[i] : 0.0f;
  if (bug) {
    total += x;
  } else {
    atomicAdd(&total, x);
  }
  __syncthreads();
  if (i < n) out[i] = total;
}

// --- barriers and warps

__global__ void exits_before_barrier(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  if (bug && t == 7) return;
  staged[t] = i < n ? in[i] : 0.0f;
  __syncthreads();
  if (i < n) out[i] = staged[t];
}

__global__ void two_barriers(const float* in, float* out, int n, int bug) {
  const int i = index();
  if (bug && threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (i < n) out[i] = in[i];
}

__global__ void divergent_shuffle(const float* in, float* out, int n, int bug) {
  const int i = index();
  float x = i < n ? in[i] : 0.0f;
  if (!bug || threadIdx.x % 32 < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
  __syncthreads();
  if (i < n) out[i] = x;
}

__global__ void shuffle_without_itself(const float* in, float* out, int n, int bug) {
  const int i = index();
  const float x = __shfl_sync(bug ? 0xfffffffeu : 0xffffffffu, i < n ? in[i] : 0.0f, 1);
  if (i < n) out[i] = x;
}

__global__ void shuffle_from_outside(const float* in, float* out, int n, int bug) {
  const int i = index();
  float x = i < n ? in[i] : 0.0f;
  if (threadIdx.x % 32 < 16) x = __shfl_down_sync(0x0000ffffu, x, 1, bug ? 32 : 16);
  if (i < n) out[i] = x;
}

// --- cp.async and ldmatrix

__global__ void copy_without_wait(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  cp_async<4>(&staged[t], in + i, i < n ? 4 : 0);
  cp_async_commit();
  if (!bug) cp_async_wait<0>();
  if (i < n) out[i] = staged[t];
}

__global__ void copy_waits_for_too_few(const float* in, float* out, int n, int bug) {
  __shared__ float first[64], second[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  cp_async<4>(&first[t], in + i, i < n ? 4 : 0);
  cp_async_commit();
  cp_async<4>(&second[t], in + i, i < n ? 4 : 0);
  cp_async_commit();
  cp_async_wait<1>();
  if (i < n) out[i] = bug ? second[t] : first[t];
}

__global__ void copy_without_barrier(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  cp_async<4>(&staged[t], in + i, i < n ? 4 : 0);
  cp_async_commit();
  cp_async_wait<0>();
  if (!bug) __syncthreads();
  if (i < n) out[i] = staged[t ^ 1];
}

__global__ void copy_misaligned(const float* in, float* out, int n, int bug) {
  __shared__ __align__(16) float staged[256];
  const int i = index(), t = static_cast<int>(threadIdx.x);  // four elements a thread
  cp_async<16>(&staged[4 * t], in + 4 * i + (bug ? 1 : 0), 4 * i + 4 + bug <= n ? 16 : 0);
  cp_async_commit();
  cp_async_wait<0>();
  for (int j = 0; j < 4 && 4 * i + j < n; ++j) out[4 * i + j] = staged[4 * t + j];
}

// What the failed kernel left in flight must not meet the next one.
__global__ void copy_left_behind(const float* in, float* out, int n, int bug) {
  __shared__ float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  cp_async<4>(&staged[t], in + i, i < n ? 4 : 0);
  cp_async_commit();
  if (bug && t == 40) out[n] = 0.0f;
  cp_async_wait<0>();
  if (i < n) out[i] = staged[t];
}

__global__ void ldmatrix_misaligned(const float* in, float* out, int n, int bug) {
  __shared__ __align__(16) float staged[64];
  const int i = index(), t = static_cast<int>(threadIdx.x);
  staged[t] = i < n ? in[i] : 0.0f;
  __syncthreads();
  uint32_t m[1];
  ldmatrix(m, &staged[t % 8 * 4 + bug]);
  if (i < n) out[i] = static_cast<float>(m[0] & 1u);
}

using Kernel = void (*)(const float*, float*, int, int);
#define NAMED(kernel) {#kernel, kernel}
const std::map<std::string, Kernel> kernels = {NAMED(read_past_end),
                                               NAMED(write_past_end),
                                               NAMED(read_before_start),
                                               NAMED(read_absent),
                                               NAMED(misaligned_vector),
                                               NAMED(writes_an_input),
                                               NAMED(leaves_an_output),
                                               NAMED(reads_an_output),
                                               NAMED(register_index),
                                               NAMED(static_shared_index),
                                               NAMED(dynamic_shared_index),
                                               NAMED(uninitialised_shared),
                                               NAMED(read_races),
                                               NAMED(write_races),
                                               NAMED(warp_races),
                                               NAMED(atomic_races),
                                               NAMED(exits_before_barrier),
                                               NAMED(two_barriers),
                                               NAMED(divergent_shuffle),
                                               NAMED(shuffle_without_itself),
                                               NAMED(shuffle_from_outside),
                                               NAMED(copy_without_wait),
                                               NAMED(copy_waits_for_too_few),
                                               NAMED(copy_without_barrier),
                                               NAMED(copy_misaligned), NAMED(copy_left_behind),
                                               NAMED(ldmatrix_misaligned)};

}  // namespace

void run(const std::string& name, bool bug, const TensorView& in, const TensorView& out, int threads, int shared_bytes,
         const transfuse::LaunchTarget& target) {
  using transfuse::Role;
  const transfuse::Call call("planted", {{"in", &in}, {"out", &out, Role::Output}});
  const int n = static_cast<int>(in.sizes[0]);
  transfuse::launch(call, target, dim3((n + threads - 1) / threads), dim3(threads), shared_bytes, kernels.at(name),
                    in.as<float>(), out.as<float>(), n, int(bug));
}

// Copies the columns of a (rows, columns) view one by one; the bug copies one more, into the gap to the next row.
__global__ void copy_rows(const float* in, float* out, int rows, int columns, int in_stride, int out_stride) {
  for (int row = 0; row < rows; ++row) {
    for (int c = static_cast<int>(threadIdx.x); c < columns; c += static_cast<int>(blockDim.x)) {
      out[row * out_stride + c] = in[row * in_stride + c];
    }
  }
}

void run_rows(bool bug, const TensorView& in, const TensorView& out, const transfuse::LaunchTarget& target) {
  const transfuse::Call call("planted_rows", {{"in", &in}, {"out", &out, transfuse::Role::Output}});
  transfuse::launch(call, target, dim3(1), dim3(32), 0, copy_rows, in.as<float>(), out.as<float>(), int(in.sizes[0]),
                    int(in.sizes[1]) + bug, int(in.strides[0]), int(out.strides[0]));
}

__global__ void copy(const float* in, float* out, int n) {
  const int i = index();
  if (i < n) out[i] = in[i];
}

// Two launches of one call, the second reads what the first wrote; the bug leaves an element of it out.
void run_workspace(bool bug, const TensorView& in, const TensorView& work, const TensorView& out,
                   const transfuse::LaunchTarget& target) {
  using transfuse::Role;
  const transfuse::Call call("planted_workspace",
                             {{"in", &in}, {"work", &work, Role::Workspace}, {"out", &out, Role::Output}});
  const int n = static_cast<int>(in.sizes[0]);
  const dim3 grid((n + 31) / 32);
  transfuse::launch(call, target, grid, dim3(32), 0, copy, in.as<float>(), work.as<float>(), n - int(bug));
  transfuse::launch(call, target, grid, dim3(32), 0, copy, work.as<float>(), out.as<float>(), n);
}

// The bug forgets to list an input.
void run_unlisted(bool bug, const TensorView& in, const TensorView& out, const transfuse::LaunchTarget& target) {
  const transfuse::Call call("planted_unlisted",
                             {{"in", bug ? nullptr : &in}, {"out", &out, transfuse::Role::Output}});
  const int n = static_cast<int>(in.sizes[0]);
  transfuse::launch(call, target, dim3((n + 31) / 32), dim3(32), 0, copy, in.as<float>(), out.as<float>(), n);
}

}  // namespace planted
