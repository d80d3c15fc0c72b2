// Sums to y: scales, bias, activation, rounding to y's dtype. See bitmap_engine.h.
#pragma once

#include "common/vec_activation.h"
#include "sparse_linear/bitmap_walk.h"

namespace pycompress::sparse_linear {
namespace {

struct BitmapFinish {
  const float* sums;   // [tokens, kBitmapBlock]
  const float* scale;  // [tokens]
  const BitmapBlock* block;
  Range rows;  // of y
  int64_t n, count;
};

template <Activation A, Dtype D>
void finish_block(const BitmapFinish& f) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, L = Vec::kLanes;
  const Args& a = *f.block->args;
  for (int64_t m = f.rows.begin; m < f.rows.end; ++m) {
    const int64_t t = m - f.rows.begin;
    const Vec::F x_scale = Vec::set1(f.scale[t]);
    char* y = static_cast<char*>(a.y) + (m * a.ldy + f.n) * kSize;
    for (int64_t i = 0; i < f.count; i += L) {
      // w_scale before x_scale, as in int8_matmul: the product with x_scale, which may be huge, must come last
      const Vec::F sum = Vec::mul(Vec::load(f.sums + t * kBitmapBlock + i), Vec::load(f.block->scale + f.n + i));
      const Vec::F v = activate<A>(Vec::fma(sum, x_scale, Vec::load(f.block->bias + f.n + i)));
      if (i + L <= f.count) {
        Vec::store_as<D>(y + i * kSize, v);
      } else {
        Vec::store_as<D>(y + i * kSize, v, int(f.count - i));
      }
    }
  }
}

using FinishBlock = void (*)(const BitmapFinish&);

template <Activation A>
FinishBlock block_finisher(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return finish_block<A, Dtype::f32>;
    case Dtype::bf16: return finish_block<A, Dtype::bf16>;
    default: return finish_block<A, Dtype::f16>;
  }
}

inline FinishBlock block_finisher(Activation activation, Dtype dtype) {
  switch (activation) {
    case Activation::relu: return block_finisher<Activation::relu>(dtype);
    case Activation::gelu: return block_finisher<Activation::gelu>(dtype);
    case Activation::gelu_tanh: return block_finisher<Activation::gelu_tanh>(dtype);
    case Activation::silu: return block_finisher<Activation::silu>(dtype);
    default: return block_finisher<Activation::none>(dtype);
  }
}

}  // namespace
}  // namespace pycompress::sparse_linear
