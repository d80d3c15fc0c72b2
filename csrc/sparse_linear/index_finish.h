// Sums with tokens in lanes to y: transposed back, then scales, bias, activation, rounding to y's dtype.
#pragma once

#include "common/vec_activation.h"
#include "sparse_linear/index_panel.h"

namespace pycompress::sparse_linear {
namespace {

template <bool INTEGER, Activation A>
PYCOMPRESS_INLINE Vec::F finish_outputs(Vec::I sums, float x_scale, Vec::F w_scale, Vec::F bias) {
  // w_scale before x_scale, as in int8_matmul: the product with x_scale, which may be huge, must come last
  if constexpr (INTEGER) {
    return activate<A>(Vec::fma(Vec::mul(Vec::to_float(sums), w_scale), Vec::set1(x_scale), bias));
  }
  return activate<A>(Vec::add((Vec::F)sums, bias));
}

// The tile of some strips, [strips * kStrip, nv * L], to rows `tokens` of y.
//
// For each register of tokens all strips, so that a row of y is written in pieces of several cache lines: where rows
// are a multiple of 4096 bytes apart, one line of each of 64 rows would be more than a cache set holds.
template <bool INTEGER, Activation A, Dtype D>
void finish_strips(const IndexBlock& block, Range tokens, Range strips, int nv, const PanelScratch& scratch) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2;
  const Args& a = *block.args;
  // Copies: what is stored to y might otherwise be any of these, and each store would be followed by their loads.
  const int64_t ldy = a.ldy * kSize, ld_tile = int64_t(nv) * L * 4;
  const int64_t begin = strips.begin * kStrip, end = at_most(strips.end * kStrip, a.n);
  const float *const x_scales = scratch.scale, *const w_scales = block.scale, *const biases = block.bias;
  for (int v = 0; v < nv; ++v) {
    const int64_t first = tokens.begin + v * L;
    const int count = int(at_most(L, tokens.end - first));
    const float* const x_scale = x_scales + v * L;
    for (int64_t n = begin; n < end; n += L) {
      const char* tile = scratch.tile + (n - begin) * ld_tile + v * L * 4;
      const int columns = int(at_most(L, end - n));
      const Vec::F w_scale = Vec::load(w_scales + n), bias = Vec::load(biases + n);
      Vec::I square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = Vec::iload(tile + i * ld_tile);
      Vec::transpose(square);
      char* y = static_cast<char*>(a.y) + first * ldy + n * kSize;
      if (count == L && columns == L) {
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t, y += ldy) {
          Vec::store_as<D>(y, finish_outputs<INTEGER, A>(square[t], x_scale[t], w_scale, bias));
        }
        continue;
      }
      alignas(64) Vec::I rows[L];
#pragma GCC unroll 16
      for (int t = 0; t < L; ++t) rows[t] = square[t];
      for (int t = 0; t < count; ++t, y += ldy) {
        Vec::store_as<D>(y, finish_outputs<INTEGER, A>(rows[t], x_scale[t], w_scale, bias), columns);
      }
    }
  }
}

using FinishStrips = void (*)(const IndexBlock&, Range, Range, int, const PanelScratch&);

template <bool INTEGER, Activation A>
FinishStrips strip_finisher(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return finish_strips<INTEGER, A, Dtype::f32>;
    case Dtype::bf16: return finish_strips<INTEGER, A, Dtype::bf16>;
    default: return finish_strips<INTEGER, A, Dtype::f16>;
  }
}

template <bool INTEGER>
FinishStrips strip_finisher(Activation activation, Dtype dtype) {
  switch (activation) {
    case Activation::relu: return strip_finisher<INTEGER, Activation::relu>(dtype);
    case Activation::gelu: return strip_finisher<INTEGER, Activation::gelu>(dtype);
    case Activation::gelu_tanh: return strip_finisher<INTEGER, Activation::gelu_tanh>(dtype);
    case Activation::silu: return strip_finisher<INTEGER, Activation::silu>(dtype);
    default: return strip_finisher<INTEGER, Activation::none>(dtype);
  }
}

}  // namespace
}  // namespace pycompress::sparse_linear
