// Rows of x, quantised, and activations, in plain C++: what every scalar kernel of a linear layer specifies.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

inline float activate(float v, Activation activation) {
  switch (activation) {
    case Activation::relu: return v < 0 ? 0.0f : v;  // NaN stays NaN
    case Activation::gelu: return 0.5f * v * std::erfc(-v * 0.70710678119f);
    case Activation::gelu_tanh: {
      const float u = 0.79788456080f * v * (1.0f + 0.044715f * v * v);
      return v / (1.0f + std::exp(-2.0f * u));
    }
    case Activation::silu: return v / (1.0f + std::exp(-v));
    default: return v;
  }
}

inline float element(const LinearArgs& a, int64_t m, int64_t k) {
  const int64_t row = m / a.inner_rows * a.outer_stride + m % a.inner_rows * a.row_stride;
  return load_float(a.x, row + k * a.col_stride, a.dtype);
}

inline float clamp(float v, float low, float high) { return v < low ? low : (v > high ? high : v); }

// q[k]: the quantised row. Returns its scale, NaN where the row holds NaN or Inf.
inline float quantize_row(const Block& block, int64_t m, int8_t* q) {
  const Args& a = *block.args;
  float largest = 0.0f;
  bool finite = true;
  for (int64_t k = 0; k < a.k; ++k) {
    const float magnitude = std::fabs(element(a, m, k));
    finite = finite && magnitude <= FLT_MAX;
    if (magnitude > largest) largest = magnitude;
  }
  if (!finite) {
    std::memset(q, 0, size_t(a.k));
    return NAN;
  }
  const bool is_static = a.mode == Mode::static_;
  // The floor keeps the reciprocal finite: a row that small quantises to 0 or a few steps of FLT_MIN.
  const float scale = is_static ? block.input_scale : std::fmax(largest / 127.0f, FLT_MIN);
  const float inverse = 1.0f / scale;
  const float low = is_static ? float(-128 - block.zero_point) : -127.0f;
  const float high = is_static ? float(127 - block.zero_point) : 127.0f;
  for (int64_t k = 0; k < a.k; ++k) {
    const float steps = std::nearbyint(clamp(element(a, m, k) * inverse, low, high));
    q[k] = int8_t(int32_t(steps) + block.zero_point);
  }
  return scale;
}

}  // namespace
}  // namespace pycompress::int8_matmul
