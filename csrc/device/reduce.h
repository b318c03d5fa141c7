// Sums and maxima over a warp and over a block, in a fixed order: the same input gives the same bits every time.
#pragma once

namespace transfuse::device {

constexpr int kWarp = 32;

// Every lane gets the sum. All 32 lanes must call.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Every thread gets the sum over threadIdx.x; blockDim.x is a multiple of 32. With more than one warp, blockDim.y must
// be 1, all threads must call, and `smem` (32 floats) may be used again only after another barrier: a caller with two
// reductions a round gives each its own buffer, and the barrier of the one protects the buffer of the other.
__device__ __forceinline__ float row_sum(float x, float* smem) {
  x = warp_sum(x);
  if (blockDim.x == kWarp) return x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) smem[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? smem[lane] : 0.0f);
}

// Every lane gets the maximum; fmaxf passes over NaN. All 32 lanes must call.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// As row_sum, the maximum.
__device__ __forceinline__ float row_max(float x, float* smem) {
  x = warp_max(x);
  if (blockDim.x == kWarp) return x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) smem[warp] = x;
  __syncthreads();
  return warp_max(smem[lane < warps ? lane : 0]);
}

}  // namespace transfuse::device
