// The index form in plain C++: the specification. Every other kernel is tested against this one.
#pragma once

#include "int8_matmul/scalar_rows.h"
#include "sparse_linear/index.h"

namespace pycompress::sparse_linear {
namespace {

namespace im = int8_matmul;

constexpr int64_t kScalarTokens = 16;  // that share a walk through the lists

struct ScalarRows {
  const float* x;    // [tokens, K]
  const int8_t* qx;  // [tokens, K padded to whole units]
  const float* x_scale;
  int64_t ld;
};

// One row's list: float sums in double, which every other order of adding in float32 is compared with.
inline void walk_row(const IndexWeight& w, const uint16_t* units, const char* values, int count, const ScalarRows& rows,
                     int64_t tokens, double* sum) {
  for (int i = 0; i < count; ++i) {
    for (int64_t t = 0; t < tokens; ++t) {
      if (w.layout->type == WeightType::s8) {
        const int8_t* q = rows.qx + t * rows.ld + int64_t(units[i]) * w.layout->unit;
        const auto* value = reinterpret_cast<const int8_t*>(values + i * 4);
        for (int j = 0; j < w.layout->unit; ++j) sum[t] += int32_t(q[j]) * value[j];
      } else {
        const Dtype dtype = w.layout->type == WeightType::f32 ? Dtype::f32 : Dtype::bf16;
        sum[t] += double(rows.x[t * rows.ld + units[i]]) * load_float(values, i, dtype);
      }
    }
  }
}

inline ScalarRows scalar_rows(const IndexBlock& block, Range tokens) {
  const Args& a = *block.args;
  const bool integer = block.weight->layout->type == WeightType::s8;
  auto* x_scale = reinterpret_cast<float*>(block.scratch);
  auto* x = x_scale + kScalarTokens;
  auto* qx = reinterpret_cast<int8_t*>(x);
  const int64_t ld = (a.k + 3) / 4 * 4;
  im::Args args;
  static_cast<LinearArgs&>(args) = a;
  im::Block int8_block{};
  int8_block.args = &args;
  for (int64_t m = tokens.begin; m < tokens.end; ++m) {
    const int64_t t = m - tokens.begin;
    if (integer) {
      std::memset(qx + t * ld, 0, size_t(ld));
      x_scale[t] = im::quantize_row(int8_block, m, qx + t * ld);
    } else {
      for (int64_t k = 0; k < a.k; ++k) x[t * ld + k] = im::element(a, m, k);
    }
  }
  return {x, qx, x_scale, ld};
}

inline void run_index_scalar(const IndexBlock& block) {
  const Args& a = *block.args;
  const IndexWeight& w = *block.weight;
  const bool integer = w.layout->type == WeightType::s8;
  for (int64_t m = block.tokens.begin; m < block.tokens.end; m += kScalarTokens) {
    const Range tokens{m, m + kScalarTokens < block.tokens.end ? m + kScalarTokens : block.tokens.end};
    const ScalarRows rows = scalar_rows(block, tokens);
    for (int64_t s = block.strips.begin; s < block.strips.end; ++s) {
      const uint16_t* list = w.lists + w.strips[s].list;
      const char* values = w.values + w.strips[s].value * value_bytes(*w.layout);
      for (int64_t n = s * kStrip; n < (s + 1) * kStrip && n < a.n; ++n) {  // groups of one row
        const int count = list[1];
        double sum[kScalarTokens] = {};
        walk_row(w, list + 2, values, count, rows, tokens.end - tokens.begin, sum);
        for (int64_t t = 0; t < tokens.end - tokens.begin; ++t) {
          // fused, as the vector kernels do it
          const float value = integer ? std::fma(float(sum[t]) * block.scale[n], rows.x_scale[t], block.bias[n])
                                      : float(sum[t]) + block.bias[n];
          store_float(a.y, (m + t) * a.ldy + n, a.dtype, im::activate(value, a.activation));
        }
        list += 2 + count;
        values += count * value_bytes(*w.layout);
      }
    }
  }
}

inline int64_t index_scalar_scratch_bytes(const Args& a, const IndexWeight&) {
  return kScalarTokens * 4 + kScalarTokens * ((a.k + 3) / 4 * 4) * 4;
}

}  // namespace
}  // namespace pycompress::sparse_linear
