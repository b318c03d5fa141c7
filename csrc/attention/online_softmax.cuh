// The softmax over keys that come tile by tile (Milakov and Gimelshein 2018), of scores in base 2.
#pragma once

#include "attention/scores.cuh"

namespace transfuse::attention {

// The running softmax of a lane's two rows (g and g + 8 of its warp's 16) over the keys so far. `total` is this
// lane's share of the sum, which `quad_sum` completes.
struct OnlineSoftmax {
  float m[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  // Raises m to cover `next`; gives what everything summed so far shrinks by, and the finite stand-in for m: a row that
  // has seen nothing has m = -inf, and -inf - -inf would be NaN.
  __device__ __forceinline__ void raise(int r, float next, float& shrink, float& finite) {
    next = fmaxf(m[r], next);
    finite = next == -INFINITY ? 0.0f : next;
    shrink = exp2f(m[r] - finite);
    m[r] = next;
    total[r] *= shrink;
  }

  // s becomes p = 2^(s - m).
  template <int TILES>
  __device__ __forceinline__ void update(float (&s)[TILES][4], float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = -INFINITY, finite;
#pragma unroll
      for (int n = 0; n < TILES; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      raise(r, quad_max(highest), shrink[r], finite);
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[n][e] = exp2f(s[n][e] - finite);
          total[r] += s[n][e];
        }
      }
    }
  }
};

}  // namespace transfuse::attention
