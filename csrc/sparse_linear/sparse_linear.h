// Linear layer with a pruned weight: y = act(x . (w * mask)^T + bias). One call, transpositions included.
//
//   f32, bf16 weights   y[m,n] = act(sum_k x[m,k] * w[n,k] + bias[n]), fp32 accumulation
//   s8 weights          y[m,n] = act(w_scale[n] * x_scale[m] * sum_k qx[m,k] * qw[n,k] + bias[n]), x quantised for each
//                       row as int8_matmul's dynamic mode does; the integer sum is exact
//
// The sums run over the kept weights only. x: f32, bf16 or f16 [M,K], any strides. y: x's dtype, rows ldy apart. bias:
// any of the dtypes, or null. f32, bf16: a NaN or Inf in x stays in its row of y, and reaches the outputs that keep a
// weight there. s8: a row of x that holds NaN or Inf gives NaN in that row of y and nowhere else; a zero row gives
// act(bias). An output without weights is act(bias). M == 0 or N == 0 does nothing.
//
// Two forms of the weight, for few tokens and for many:
//
//   bitmap   the plain form, which is also the state that a checkpoint holds. bits [N, ceil(K / 8)]: bit k % 8 of byte
//            k / 8 says whether w[n,k] is kept; values [nnz]: the kept weights, row after row. The weight is expanded in
//            registers and read once for up to kBitmapTokens tokens: the speed of memory is what bounds it.
//   index    derived; lists of columns, with tokens in the lanes of a register. See index.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/linear_args.h"
#include "common/range.h"

namespace pycompress::sparse_linear {

enum class WeightType : int { f32 = 0, bf16 = 1, s8 = 2, f16 = 3 };  // f16: on GPUs alone, see cuda.h

static inline int weight_size(WeightType type) { return type == WeightType::f32 ? 4 : type == WeightType::s8 ? 1 : 2; }

using Args = LinearArgs;  // weight_scale: s8 only

struct Bitmap {
  WeightType type;
  int64_t n, k;
  const uint8_t* bits;       // [N, ceil(K / 8)]
  const void* values;        // [row_start[N]]
  const int64_t* row_start;  // [N + 1] where the values of a row begin
};

// ---- sparse_linear.cpp: what both forms share -------------------------------------------------------------------

// `values` [n] as f32 with zeros up to `padded`: as they are where they already lie so, else written to `copy`.
const float* padded_floats(const void* values, Dtype dtype, int64_t n, int64_t padded, float* copy);

// ---- bitmap.cpp --------------------------------------------------------------------------------------------------

constexpr int64_t kBitmapTokens = 8;  // rows of x that meet a weight each time it is expanded

// Fills row_start [N + 1] and returns the number of kept weights. Throws ArgumentError where a bit behind K is set.
int64_t scan_bitmap(const uint8_t* bits, int64_t n, int64_t k, int64_t* row_start);

// Checks every field, then computes. Throws ArgumentError before any work.
void run_bitmap(const Args& args, const Bitmap& weight);

const char* bitmap_kernel_name(WeightType type);

}  // namespace pycompress::sparse_linear
