// What every linear layer takes: y[M,N] = act(x[M,K] . w[N,K] + bias[N]).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pycompress {

enum class Activation : int { none = 0, relu, gelu, gelu_tanh, silu };

struct LinearArgs {
  Activation activation = Activation::none;
  int threads = 1;

  // x[m,k] lies at (m / inner_rows) * outer_stride + (m % inner_rows) * row_stride + k * col_stride, in elements.
  // Two levels of rows, so that a slice of a batch x time x feature tensor needs no copy.
  const void* x = nullptr;
  Dtype dtype = Dtype::f32;  // of x and y
  int64_t m = 0, k = 0;
  int64_t inner_rows = 1, outer_stride = 0, row_stride = 0, col_stride = 1;

  const float* weight_scale = nullptr;  // [N], int8 weights only
  const void* bias = nullptr;           // [N] of bias_dtype, or null
  Dtype bias_dtype = Dtype::f32;

  void* y = nullptr;
  int64_t n = 0, ldy = 0;
};

}  // namespace pycompress
