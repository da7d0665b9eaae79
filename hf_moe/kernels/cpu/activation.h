// The activations of an expert and their derivatives; written so that the compiler vectorises the float32 loops.
#pragma once

#include "vectors.h"

#include <cmath>
#include <limits>

namespace hf_moe {

enum class Kind { silu, gelu, gelu_tanh, relu, relu2 };

template <class A>
struct Activation {
  Kind kind;
  A alpha, limit, offset;
  bool gated, interleaved;
};

// exp for float32 within 2 units in the last place (Cephes); the argument is clamped to where it is finite and normal.
INLINE float fast_exp(float x) {
  float clamped = x > 88.0f ? 88.0f : x;
  clamped = clamped < -87.0f ? -87.0f : clamped;
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}
INLINE double fast_exp(double x) { return std::exp(x); }

// erf for float32 within 1 unit in the last place (N. Juffa's two polynomials).
INLINE float fast_erf(float a) {
  const float t = std::fabs(a), s = a * a;
  float far = -1.72853470e-5f * t + 3.83197126e-4f;
  float u = -3.88396438e-3f * t + 2.42546219e-2f;
  far = far * s + u;
  far = far * t - 1.06777877e-1f;
  far = far * t - 6.34846687e-1f;
  far = far * t - 1.28717512e-1f;
  far = far * t - t;
  far = std::copysign(1.0f - fast_exp(far), a);
  float near = -5.96761703e-4f;
  near = near * s + 4.99119423e-3f;
  near = near * s - 2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s - 3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * a + a;
  return t > 0.927734375f ? far : near;
}
INLINE double fast_erf(double x) { return std::erf(x); }

template <class A>
INLINE A sigmoid(A x) {
  return A(1) / (A(1) + fast_exp(-x));
}

template <Kind kind, class A>
INLINE A activate(A x, A alpha) {
  if constexpr (kind == Kind::silu) return x * sigmoid(alpha * x);
  if constexpr (kind == Kind::gelu) return A(0.5) * x * (A(1) + fast_erf(x * A(M_SQRT1_2)));
  if constexpr (kind == Kind::gelu_tanh) {  // (1 + tanh(z)) / 2 = sigmoid(2 z)
    return x * sigmoid(A(2) * A(M_SQRT2 * M_2_SQRTPI * 0.5) * (x + A(0.044715) * x * x * x));
  }
  const A positive = x < A(0) ? A(0) : x;
  return kind == Kind::relu2 ? positive * positive : positive;
}

template <Kind kind, class A>
INLINE A activate_slope(A x, A alpha) {
  if constexpr (kind == Kind::silu) {
    const A s = sigmoid(alpha * x);
    return s * (A(1) + alpha * x * (A(1) - s));
  }
  if constexpr (kind == Kind::gelu) {
    const A density = A(M_2_SQRTPI * M_SQRT1_2 * 0.5) * fast_exp(A(-0.5) * x * x);
    return A(0.5) * (A(1) + fast_erf(x * A(M_SQRT1_2))) + x * density;
  }
  if constexpr (kind == Kind::gelu_tanh) {
    const A scale = A(2) * A(M_SQRT2 * M_2_SQRTPI * 0.5);
    const A s = sigmoid(scale * (x + A(0.044715) * x * x * x));
    return s + x * s * (A(1) - s) * scale * (A(1) + A(3 * 0.044715) * x * x);
  }
  if constexpr (kind == Kind::relu2) return x < A(0) ? A(0) : A(2) * x;
  return x > A(0) ? A(1) : (x == x ? A(0) : x);
}

// One row of pre-activations to activations: gate and up lie apart (step 1) or alternate (step 2).
template <Kind kind, class A>
void activate_row(
    const A* __restrict gate, const A* __restrict up, int step, int64_t n, const Activation<A>& f, A* __restrict act) {
  if (up == nullptr) {
    for (int64_t i = 0; i < n; ++i) act[i] = activate<kind>(gate[i], f.alpha);
    return;
  }
  auto row = [&](int stride) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) {
      const A g = gate[i * stride] > f.limit ? f.limit : gate[i * stride];
      A u = up[i * stride] > f.limit ? f.limit : up[i * stride];
      u = u < -f.limit ? -f.limit : u;
      act[i] = (u + f.offset) * activate<kind>(g, f.alpha);
    }
  };
  step == 1 ? row(1) : row(2);
}

// The same row backward: `d_act` is the gradient of the activations, `weight` the row's routing weight. Writes the
// activations again and the gradients of gate and up times `weight`; returns sum(d_act * act).
template <Kind kind, class A>
A activate_row_backward(
    const A* __restrict gate, const A* __restrict up, int step, int64_t n, const Activation<A>& f, A weight,
    const A* __restrict d_act, A* __restrict act, A* __restrict d_gate, A* __restrict d_up) {
  if (up == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      act[i] = activate<kind>(gate[i], f.alpha);
      d_gate[i] = weight * d_act[i] * activate_slope<kind>(gate[i], f.alpha);
    }
  } else {
    auto row = [&](int stride) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; ++i) {
        const A raw_gate = gate[i * stride], raw_up = up[i * stride];
        const A g = raw_gate > f.limit ? f.limit : raw_gate;
        A u = raw_up > f.limit ? f.limit : raw_up;
        u = u < -f.limit ? -f.limit : u;
        const A value = activate<kind>(g, f.alpha), d = weight * d_act[i];
        act[i] = (u + f.offset) * value;
        const A to_gate = d * (u + f.offset) * activate_slope<kind>(g, f.alpha), to_up = d * value;
        d_gate[i * stride] = raw_gate > f.limit ? A(0) : to_gate;
        d_up[i * stride] = (raw_up > f.limit || raw_up < -f.limit) ? A(0) : to_up;
      }
    };
    step == 1 ? row(1) : row(2);
  }
  A sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += d_act[i] * act[i];
  return sum;
}

// Calls `f(integral_constant<Kind>)` for the kind at hand.
template <class F>
auto with_kind(Kind kind, F f) {
  switch (kind) {
    case Kind::silu: return f(std::integral_constant<Kind, Kind::silu>());
    case Kind::gelu: return f(std::integral_constant<Kind, Kind::gelu>());
    case Kind::gelu_tanh: return f(std::integral_constant<Kind, Kind::gelu_tanh>());
    case Kind::relu: return f(std::integral_constant<Kind, Kind::relu>());
    default: return f(std::integral_constant<Kind, Kind::relu2>());
  }
}

}  // namespace hf_moe
