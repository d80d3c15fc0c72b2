// The activations of a linear layer over Vec. Include vec_avx2.h or vec_avx512.h first; see vec_math.h.
#pragma once

#include "common/linear_args.h"
#include "common/vec_math.h"

namespace pycompress {
namespace {

template <Activation A>
Vec::F activate(Vec::F v) {
  if constexpr (A == Activation::relu) return vrelu(v);
  if constexpr (A == Activation::gelu) return vgelu(v);
  if constexpr (A == Activation::gelu_tanh) return vgelu_tanh(v);
  if constexpr (A == Activation::silu) return vsilu(v);
  return v;
}

}  // namespace
}  // namespace pycompress
