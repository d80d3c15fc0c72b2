// The specification: plain loops, any layout, any CPU. Every other kernel is tested against this one.
#include <cfloat>
#include <cmath>

#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

float activate(float v, Activation activation) {
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

float element(const Args& a, int64_t m, int64_t k) {
  const int64_t row = m / a.inner_rows * a.outer_stride + m % a.inner_rows * a.row_stride;
  return load_float(a.x, row + k * a.col_stride, a.dtype);
}

float clamp(float v, float low, float high) { return v < low ? low : (v > high ? high : v); }

// q[k]: the quantised row. Returns its scale, NaN where the row holds NaN or Inf.
float quantize_row(const Block& block, int64_t m, int8_t* q) {
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

constexpr int64_t kRows = 16;  // rows quantised at a time, so that each weight row is fetched once for all of them

int64_t dot(const int8_t* q, const int8_t* w, int32_t zero_point, int64_t k) {
  int64_t sum = 0;
  for (int64_t begin = 0; begin < k; begin += kMaxChunkK) {
    const int64_t end = begin + kMaxChunkK < k ? begin + kMaxChunkK : k;
    int32_t chunk = 0;
    for (int64_t i = begin; i < end; ++i) chunk += (int32_t(q[i]) - zero_point) * w[i];
    sum += chunk;
  }
  return sum;
}

float weight_only_dot(const Args& a, int64_t m, const int8_t* w) {
  double sum = 0;
  for (int64_t k = 0; k < a.k; ++k) sum += double(element(a, m, k)) * w[k];
  return float(sum);
}

void run_rows(const Block& block, Range rows) {
  const Args& a = *block.args;
  const bool quantized = a.mode != Mode::weight_only;
  auto* x_scale = reinterpret_cast<float*>(block.scratch);
  auto* q = reinterpret_cast<int8_t*>(x_scale + kRows);
  int8_t* foreign = q + kRows * a.k;  // a weight row, where the layout is not the plain one

  for (int64_t m = rows.begin; m < rows.end && quantized; ++m) {
    x_scale[m - rows.begin] = quantize_row(block, m, q + (m - rows.begin) * a.k);
  }
  const int nr = block.weight.layout->nr;
  const int64_t n_end = block.panels.end * nr < a.n ? block.panels.end * nr : a.n;
  for (int64_t n = block.panels.begin * nr; n < n_end; ++n) {
    const int8_t* w = foreign;
    if (block.weight.layout->id == kRowMajor.id) {
      w = reinterpret_cast<const int8_t*>(block.weight.panels + n * a.k);
    } else {
      unpack_row(block.weight, n, foreign);
    }
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const int64_t i = m - rows.begin;
      float value;
      if (quantized) {
        value = float(dot(q + i * a.k, w, block.zero_point, a.k)) * block.scale[n] * x_scale[i] + block.bias[n];
      } else {
        value = weight_only_dot(a, m, w) * block.scale[n] + block.bias[n];
      }
      store_float(a.y, m * a.ldy + n, a.dtype, activate(value, a.activation));
    }
  }
}

void run(const Block& block) {
  for (int64_t m = block.rows.begin; m < block.rows.end; m += kRows) {
    run_rows(block, {m, m + kRows < block.rows.end ? m + kRows : block.rows.end});
  }
}

int64_t scratch_bytes(Mode, int64_t k) { return kRows * 4 + (kRows + 1) * k; }

}  // namespace

const Kernel kScalar{"int8_matmul_scalar", Isa::scalar, kRowMajor, run, scratch_bytes};

}  // namespace pycompress::int8_matmul
