// The activations of linear_act and ffn and their derivatives, from one formula: act(z) = z s(z).
#pragma once

namespace transfuse::ffn {

enum class Activation : int { None = 0, Relu, Gelu, GeluTanh, Silu };  // None, then ops.ffn.ACTIVATIONS in order

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// value = act(z), and for `with_slope` slope = act'(z) = s + z s'(z).
template <Activation ACT, int V>
__device__ __forceinline__ void activate_as(const float (&z)[V], float (&value)[V], float (&slope)[V],
                                            bool with_slope) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float x = z[i];
    if constexpr (ACT == Activation::None) {
      value[i] = x, slope[i] = 1.0f;
    } else if constexpr (ACT == Activation::Relu) {
      value[i] = x <= 0.0f ? 0.0f : x;  // not x s: -inf gives 0, NaN stays
      slope[i] = x > 0.0f ? 1.0f : 0.0f;
    } else if constexpr (ACT == Activation::Gelu) {
      const float s = 0.5f + 0.5f * erff(x * 0.7071067811865476f);
      value[i] = x * s;
      if (with_slope) slope[i] = s + x * (0.3989422804014327f * expf(-0.5f * x * x));
    } else {
      // (1 + tanh(t)) / 2 = sigmoid(2 t), 2 t = 2 sqrt(2 / pi) (x + 0.044715 x^3)
      constexpr bool kSilu = ACT == Activation::Silu;
      const float s = sigmoid(kSilu ? x : x * (1.5957691216057308f + 0.07135481282553435f * x * x));
      const float inner = kSilu ? 1.0f : 1.5957691216057308f + 0.21406443847660305f * x * x;
      value[i] = x * s;
      if (with_slope) slope[i] = s + x * (s * (1.0f - s)) * inner;
    }
  }
}

template <int V>
__device__ __forceinline__ void activate(Activation activation, const float (&z)[V], float (&value)[V],
                                         float (&slope)[V], bool with_slope) {
  switch (activation) {
    case Activation::None:
      return activate_as<Activation::None>(z, value, slope, with_slope);
    case Activation::Relu:
      return activate_as<Activation::Relu>(z, value, slope, with_slope);
    case Activation::Gelu:
      return activate_as<Activation::Gelu>(z, value, slope, with_slope);
    case Activation::GeluTanh:
      return activate_as<Activation::GeluTanh>(z, value, slope, with_slope);
    case Activation::Silu:
      return activate_as<Activation::Silu>(z, value, slope, with_slope);
  }
}

}  // namespace transfuse::ffn
