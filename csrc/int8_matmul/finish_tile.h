// Accumulators to y: scales, bias, activation, rounding to y's dtype. See tile_engine.h.
#pragma once

#include "common/vec_activation.h"
#include "int8_matmul/int8_matmul.h"
#include "int8_matmul/tiles.h"

namespace pycompress::int8_matmul {
namespace {

struct Finish {
  const void* tile;      // [rows, nr] accumulators: s32, or f32 where `is_float`
  const float* x_scale;  // [rows]
  const float* w_scale;  // [columns, padded to lanes]
  const float* bias;
  char* y;
  int64_t ldy_bytes;
  int rows, columns;
  bool is_float;
};

// w_scale before x_scale: x_scale may be as large as FLT_MAX / 127, and the product with it must come last.
template <Activation A>
Vec::F finish_vector(const void* sums, bool is_float, Vec::F x_scale, Vec::F w_scale, Vec::F bias) {
  const Vec::F sum = is_float ? Vec::load(static_cast<const float*>(sums)) : Vec::to_float(Vec::iload(sums));
  return activate<A>(Vec::fma(Vec::mul(sum, w_scale), x_scale, bias));
}

template <class Isa, Activation A, Dtype D>
void finish_tile(const Finish& f) {
  constexpr int L = Vec::kLanes, NV = Isa::kVectors, nr = Isa::kLayout.nr, kSize = D == Dtype::f32 ? 4 : 2;
  const char* tile = static_cast<const char*>(f.tile);
  if (f.columns == nr && !f.is_float) {
    // Start here; below is the same without the assumptions. Four instructions a register instead of eighteen: at
    // K = 384 finishing was a seventh of the time.
    Vec::F w_scale[NV], bias[NV];
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) {
      w_scale[j] = Vec::load(f.w_scale + j * L);
      bias[j] = Vec::load(f.bias + j * L);
    }
    char* y = f.y;
    for (int r = 0; r < f.rows; ++r, y += f.ldy_bytes, tile += nr * 4) {
      const Vec::F x_scale = Vec::set1(f.x_scale[r]);
      PYCOMPRESS_UNROLL
      for (int j = 0; j < NV; ++j) {
        Vec::store_as<D>(y + j * L * kSize, finish_vector<A>(tile + j * L * 4, false, x_scale, w_scale[j], bias[j]));
      }
    }
    return;
  }
  for (int r = 0; r < f.rows; ++r) {
    const Vec::F x_scale = Vec::set1(f.x_scale[r]);
    char* y = f.y + r * f.ldy_bytes;
    for (int n = 0; n < f.columns; n += L) {
      const Vec::F v = finish_vector<A>(tile + (r * nr + n) * 4, f.is_float, x_scale, Vec::load(f.w_scale + n),
                                        Vec::load(f.bias + n));
      if (n + L <= f.columns) {
        Vec::store_as<D>(y + n * kSize, v);
      } else {
        Vec::store_as<D>(y + n * kSize, v, f.columns - n);
      }
    }
  }
}

using FinishTile = void (*)(const Finish&);

template <class Isa, Activation A>
FinishTile finisher(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return finish_tile<Isa, A, Dtype::f32>;
    case Dtype::bf16: return finish_tile<Isa, A, Dtype::bf16>;
    default: return finish_tile<Isa, A, Dtype::f16>;
  }
}

template <class Isa>
FinishTile finisher(Activation activation, Dtype dtype) {
  switch (activation) {
    case Activation::relu: return finisher<Isa, Activation::relu>(dtype);
    case Activation::gelu: return finisher<Isa, Activation::gelu>(dtype);
    case Activation::gelu_tanh: return finisher<Isa, Activation::gelu_tanh>(dtype);
    case Activation::silu: return finisher<Isa, Activation::silu>(dtype);
    default: return finisher<Isa, Activation::none>(dtype);
  }
}

}  // namespace
}  // namespace pycompress::int8_matmul
