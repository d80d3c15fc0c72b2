// Expanding weights with AVX2: the Forms of bitmap_engine.h. 8 columns of floats, 16 (32) of s8 at a time.
#pragma once

#include "common/vec_avx2.h"
#include "sparse_linear/bitmap_table.h"

namespace pycompress::sparse_linear {
namespace {

struct BitmapFloatsAvx2 {
  using X = float;
  using Sum = __m256;
  static constexpr int kColumns = 8, kSums = 8;
  static constexpr bool kExact = false;

  struct Weights {
    __m256 w;
  };
  static constexpr int kParts = 1;
  static Weights part(const Weights& w, int) { return w; }
  static int place(int column) { return column; }
  static Weights place(__m256 values, const uint8_t* bits) {
    const __m256i source = _mm256_cvtepi8_epi32(load_8(kExpandTable.source[*bits]));
    const __m256 placed = _mm256_permutevar8x32_ps(values, source);
    return {_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(source, 31)), placed)};
  }
  static __m256 load(const float* x) { return _mm256_loadu_ps(x); }
  static Sum multiply(Sum sum, const Weights& w, __m256 x) { return _mm256_fmadd_ps(w.w, x, sum); }
};

struct BitmapF32Avx2 : BitmapFloatsAvx2 {
  using Value = float;
  static Weights expand(const uint8_t* bits, const float* values) { return place(_mm256_loadu_ps(values), bits); }
};

struct BitmapBf16Avx2 : BitmapFloatsAvx2 {
  using Value = uint16_t;
  static Weights expand(const uint8_t* bits, const uint16_t* values) {
    return place(Vec::load_as<Dtype::bf16>(values), bits);
  }
};

struct BitmapBytesAvx2 {  // what both kinds of s8 dot product share
  using Value = int8_t;
  using Sum = __m256i;
  static constexpr int kSums = 8;
  static constexpr bool kExact = true;

  struct Weights {
    __m256i w;
  };
  static constexpr int kParts = 1;
  static Weights part(const Weights& w, int) { return w; }
  static __m256i load(const void* x) { return Vec::iload(x); }
};

// Dot8: int8_matmul's description of the dot product, s8 widened to s16.
template <class Dot8>
struct BitmapS8Avx2 : BitmapBytesAvx2 {
  using Quantize = Dot8;
  using X = typename Dot8::X;
  static constexpr int kColumns = 16;
  static Weights expand(const uint8_t* bits, const int8_t* values) {
    return {_mm256_cvtepi8_epi16(expand_16_bytes(bits, values))};
  }
  static Sum multiply(Sum sum, const Weights& w, __m256i x) {
    sum = Dot8::dot(sum, w.w, x);
    asm("" : "+v"(sum));  // GCC would add the products of several steps to each other first, and spill them
    return sum;
  }
};

// The same in quads: u8 . s8
template <class Dot8>
struct BitmapS8AvxVnni : BitmapBytesAvx2 {
  using Quantize = Dot8;
  using X = typename Dot8::X;
  static constexpr int kColumns = 32;
  static Weights expand(const uint8_t* bits, const int8_t* values) {
    const __m128i low = expand_16_bytes(bits, values);
    uint16_t first;
    std::memcpy(&first, bits, sizeof first);
    const __m128i high = expand_16_bytes(bits + 2, values + __builtin_popcount(first));
    return {_mm256_xor_si256(_mm256_set_m128i(high, low), _mm256_set1_epi8(int8_t(0x80)))};
  }
  static Sum multiply(Sum sum, const Weights& w, __m256i x) { return Dot8::dot(sum, w.w, x); }
};

}  // namespace
}  // namespace pycompress::sparse_linear
