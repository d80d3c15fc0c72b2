// The bitmap form in plain C++: the specification. Every other kernel is tested against this one.
#pragma once

#include "int8_matmul/scalar_rows.h"
#include "sparse_linear/bitmap.h"

namespace pycompress::sparse_linear {
namespace {

// Calls visit(k, i) for the i-th kept weight of a row, which is in column k.
template <class Visit>
void visit_kept(const uint8_t* bits, int64_t k, const Visit& visit) {
  int64_t i = 0;
  for (int64_t byte = 0; byte < (k + 7) / 8; ++byte) {
    for (unsigned left = bits[byte]; left != 0; left &= left - 1) visit(byte * 8 + __builtin_ctz(left), i++);
  }
}

// x as floats, or quantised: one row at a time.
inline void run_bitmap_scalar(const BitmapBlock& block) {
  const Args& a = *block.args;
  const Bitmap& w = *block.weight;
  const bool integer = w.type == WeightType::s8;
  const Dtype dtype = w.type == WeightType::f32 ? Dtype::f32 : Dtype::bf16;
  auto* x = reinterpret_cast<float*>(block.scratch);
  auto* qx = reinterpret_cast<int8_t*>(block.scratch);
  int8_matmul::Args args;
  static_cast<LinearArgs&>(args) = a;
  int8_matmul::Block int8_block{};
  int8_block.args = &args;
  for (int64_t m = 0; m < a.m; ++m) {
    float x_scale = 1;
    if (integer) {
      x_scale = int8_matmul::quantize_row(int8_block, m, qx);
    } else {
      for (int64_t k = 0; k < a.k; ++k) x[k] = int8_matmul::element(a, m, k);
    }
    for (int64_t n = block.outputs.begin; n < block.outputs.end; ++n) {
      const uint8_t* bits = w.bits + n * ((a.k + 7) / 8);
      const char* values = static_cast<const char*>(w.values) + w.row_start[n] * weight_size(w.type);
      float sum;
      if (integer) {
        int64_t exact = 0;
        visit_kept(bits, a.k,
                   [&](int64_t k, int64_t i) { exact += int32_t(qx[k]) * reinterpret_cast<const int8_t*>(values)[i]; });
        sum = float(exact);
      } else {
        double wide = 0;  // what every other order of adding in float32 is compared with
        visit_kept(bits, a.k,
                   [&](int64_t k, int64_t i) { wide += double(x[k]) * double(load_float(values, i, dtype)); });
        sum = float(wide);
      }
      // fused, as the vector kernels do it
      const float value = std::fma(sum * block.scale[n], x_scale, block.bias[n]);
      store_float(a.y, m * a.ldy + n, a.dtype, int8_matmul::activate(value, a.activation));
    }
  }
}

inline int64_t bitmap_scalar_scratch_bytes(int64_t, int64_t k) { return k * 4; }

}  // namespace
}  // namespace pycompress::sparse_linear
