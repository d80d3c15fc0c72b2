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
// Eight tokens at a time, and for these all strips: rows of y that are a multiple of 4096 bytes apart fall into one set
// of the cache, which holds twelve lines. With 16 tokens, lines that were fetched to be written were lost again.
template <bool INTEGER, Activation A, Dtype D>
void finish_strips(const IndexBlock& block, Range tokens, Range strips, int nv, const PanelScratch& scratch) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, kTokens = 8;
  const Args& a = *block.args;
  // Copies: what is stored to y might otherwise be any of these, and each store would be followed by their loads.
  const int64_t ldy = a.ldy * kSize, ld_tile = int64_t(nv) * L * 4;
  const int64_t begin = strips.begin * kStrip, end = at_most(strips.end * kStrip, a.n);
  const float *const w_scales = block.scale, *const biases = block.bias;
  for (int64_t first = tokens.begin; first < tokens.end; first += kTokens) {
    const int64_t count = at_most(kTokens, tokens.end - first);
    const float* const x_scale = scratch.scale + (first - tokens.begin);
    const char* tile = scratch.tile + (first - tokens.begin) * 4;
    for (int64_t n = begin; n < end; n += L, tile += L * ld_tile) {
      const int columns = int(at_most(L, end - n));
      const Vec::F w_scale = Vec::load(w_scales + n), bias = Vec::load(biases + n);
      Vec::I sums[kTokens];
      Vec::load_columns(tile, ld_tile, sums);
      char* y = static_cast<char*>(a.y) + first * ldy + n * kSize;
      if (count == kTokens && columns == L) {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t, y += ldy) {
          Vec::store_as<D>(y, finish_outputs<INTEGER, A>(sums[t], x_scale[t], w_scale, bias));
        }
        continue;
      }
      alignas(64) Vec::I rows[kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) rows[t] = sums[t];
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
