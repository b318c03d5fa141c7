// What attention's backward needs of each query:  L = lse log2 e (+inf where it sees nothing),
//                                                 delta = rowsum(dO out) - dlse
// and of each tile of queries what it adds to the sink's gradient, -sum exp(sink - lse) delta.
//
// A block owns kStatisticsRows queries of one head, eight lanes a row.
#pragma once

#include "attention/gradients.cuh"

namespace transfuse::attention {

constexpr int kStatisticsRows = 64, kStatisticsThreads = 256, kRowLanes = 8;

struct StatisticsParams : BackwardParams {
  Strided out, lse, dlse, sinks;  // dlse null: zeros
  Strided dsinks;                 // (batch, heads, tiles, 1) float, partial sums; null where not wanted
};

template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads) attention_backward_statistics(const StatisticsParams p) {
  __shared__ float of_warps[32];
  constexpr int kVec = 16 / sizeof(T);
  const int block = static_cast<int>(blockIdx.x), tile = block % p.tiles;
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  const Sequence at(p, block / p.tiles / p.heads, block / p.tiles % p.heads);
  const int end = min((tile + 1) * kStatisticsRows, at.q_rows);
  float dsink = 0.0f;
  for (int first = tile * kStatisticsRows; first < end; first += kStatisticsThreads / kRowLanes) {
    const int i = first + static_cast<int>(threadIdx.x) / kRowLanes;
    float delta = 0.0f;
    if (i < end) {
      const T* dout = at.queries<T>(p.dout) + i * p.dout.row;
      const T* out = at.queries<T>(p.out) + i * p.out.row;
      for (int column = lane * kVec; column < p.v_dim; column += kRowLanes * kVec) {
        const auto x = device::load<kVec>(dout + column), y = device::load<kVec>(out + column);
#pragma unroll
        for (int c = 0; c < kVec; ++c) delta += device::to_float(x.at[c]) * device::to_float(y.at[c]);
      }
    }
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    if (i >= end || lane > 0) continue;
    if (p.dlse.data) delta -= at.queries<float>(p.dlse)[i * p.dlse.row];
    const float lse = at.queries<float>(p.lse)[i * p.lse.row];
    const float base2 = lse == -INFINITY ? INFINITY : fmaxf(lse * kLog2e, kLowest);
    float* to = const_cast<float*>(at.queries<float>(p.statistics)) + i * p.statistics.row;
    *reinterpret_cast<float2*>(to) = {base2, delta};
    if (p.dsinks.data) dsink -= exp2f(*p.sinks.at<float>(at.b, at.h) * kLog2e - base2) * delta;
  }
  if (!p.dsinks.data) return;
  dsink = device::row_sum(dsink, of_warps);
  if (threadIdx.x == 0) p.dsinks.to<float>(at.b, at.h)[tile * p.dsinks.row] = dsink;
}

}  // namespace transfuse::attention
