// Rows of x made ready for the bitmap kernels, and the scratch memory. See bitmap_engine.h.
#pragma once

#include "sparse_linear/bitmap_walk.h"

namespace pycompress::sparse_linear {
namespace {

// Up to kBitmapTokens rows of x, prepared, and the tile. s8: quantised by int8_matmul.
template <class X>
struct BitmapScratch {
  int8_matmul::Pass<X> pass;  // s8: quantised rows, scales, what each sum begins with
  X* x;                       // as Walk::x
  char* gathered;             // floats: [K] elements of x, for a row whose columns are not adjacent
  char* tile;                 // [tokens, kBitmapBlock] registers of sums
  float* sums;                // [tokens, kBitmapBlock]
  float* scale;               // [tokens] x_scale; 1 for floats
  bool* finite;               // [tokens]

  static constexpr bool kInteger = sizeof(X) < sizeof(float);
  static int64_t padded(int64_t k) { return int8_matmul::round_up(k, kBitmapWord); }
  static int64_t tokens(int64_t m) { return int8_matmul::at_most(m, kBitmapTokens); }
  static int64_t pass_bytes(int64_t m, int64_t k) {
    return kInteger ? int8_matmul::round_up(int8_matmul::Pass<X>::bytes(k, 0, tokens(m)), kAlignment) : 0;
  }
  static int64_t bytes(int64_t m, int64_t k) {
    const int64_t tile = tokens(m) * kBitmapBlock;
    return pass_bytes(m, k) + tokens(m) * padded(k) * int64_t(sizeof(X)) + padded(k) * 4 +
           tile * int64_t(sizeof(Vec::F) + sizeof(float)) + 2 * kAlignment;
  }
  BitmapScratch(char* scratch, int64_t m, int64_t k) : pass(scratch, k, tokens(m)) {
    scratch += pass_bytes(m, k);
    x = reinterpret_cast<X*>(scratch);
    scratch += tokens(m) * padded(k) * int64_t(sizeof(X));
    gathered = scratch;
    scratch += padded(k) * 4;
    tile = scratch;
    scratch += tokens(m) * kBitmapBlock * int64_t(sizeof(Vec::F));
    sums = reinterpret_cast<float*>(scratch);
    scratch += tokens(m) * kBitmapBlock * int64_t(sizeof(float));
    scale = reinterpret_cast<float*>(scratch);
    finite = reinterpret_cast<bool*>(scratch + kAlignment);
  }
};

// Row m of x as token t of `tokens`, widened.
template <class Form, Dtype D>
void widen_token(const Args& a, int64_t m, int64_t t, int64_t tokens, BitmapScratch<float>& scratch) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, L = Vec::kLanes;
  const char* row = int8_matmul::row_of(a, m, scratch.gathered);
  scratch.scale[t] = 1.0f;
  scratch.finite[t] = int8_matmul::largest_magnitude<D>(row, a.k) <= 3.4028234664e38f;
  constexpr int64_t C = Form::kColumns;
  const auto at = [&](int64_t k) { return scratch.x + (k / C * tokens + t) * C + k % C; };
  int64_t k = 0;
  for (; k + L <= a.k; k += L) Vec::store(at(k), Vec::load_as<D>(row + k * kSize));
  for (; k < scratch.padded(a.k); k += L) {
    alignas(64) char tail[L * kSize] = {};
    if (k < a.k) std::memcpy(tail, row + k * kSize, size_t((a.k - k) * kSize));
    Vec::store(at(k), Vec::load_as<D>(tail));
  }
  if constexpr (Form::kParts > 1) {
    for (k = 0; k < scratch.padded(a.k); k += C) Form::arrange(at(k));
  }
}

template <class Form>
const float* prepare_tokens(const Args& a, Range rows, BitmapScratch<float>& scratch) {
  const int64_t tokens = rows.end - rows.begin;
  for (int64_t t = 0; t < tokens; ++t) {
    switch (a.dtype) {
      case Dtype::f32: widen_token<Form, Dtype::f32>(a, rows.begin + t, t, tokens, scratch); break;
      case Dtype::bf16: widen_token<Form, Dtype::bf16>(a, rows.begin + t, t, tokens, scratch); break;
      case Dtype::f16: widen_token<Form, Dtype::f16>(a, rows.begin + t, t, tokens, scratch); break;
    }
  }
  return scratch.x;
}

template <class Form, class X>
const X* prepare_tokens(const Args& a, Range rows, BitmapScratch<X>& scratch) {
  using Dot8 = typename Form::Quantize;
  int8_matmul::Args args;
  static_cast<LinearArgs&>(args) = a;
  int8_matmul::Block block{};
  block.args = &args;
  switch (a.dtype) {
    case Dtype::f32: int8_matmul::quantize_rows<Dot8, Dtype::f32>(block, rows, scratch.pass); break;
    case Dtype::bf16: int8_matmul::quantize_rows<Dot8, Dtype::bf16>(block, rows, scratch.pass); break;
    case Dtype::f16: int8_matmul::quantize_rows<Dot8, Dtype::f16>(block, rows, scratch.pass); break;
  }
  const int64_t tokens = rows.end - rows.begin;
  for (int64_t t = 0; t < tokens; ++t) {
    scratch.scale[t] = scratch.pass.scale[t];
    scratch.finite[t] = true;  // a row that is not was quantised to zeros, with a scale of NaN
  }
  if (tokens == 1) return scratch.pass.rows;
  constexpr int64_t C = Form::kColumns;
  X* to = scratch.x;
  for (int64_t k = 0; k < scratch.padded(a.k); k += C) {
    for (int64_t t = 0; t < tokens; ++t, to += C) {
      std::memcpy(to, scratch.pass.rows + t * scratch.pass.stride + k, C * sizeof(X));
    }
  }
  return scratch.x;
}

}  // namespace
}  // namespace pycompress::sparse_linear
