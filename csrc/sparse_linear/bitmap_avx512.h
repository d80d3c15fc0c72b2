// Expanding weights with AVX-512: the Forms of bitmap_engine.h. 16 or 32 columns of floats, 32 or 64 of s8 at a time.
#pragma once

#include "common/vec_avx512.h"
#include "sparse_linear/bitmap_table.h"

namespace pycompress::sparse_linear {
namespace {

// Masks come from memory: by way of a general register, where their bits are counted, they cost a fifth more.
// Asm, because the intrinsic may only read where an integer of that size may lie.
inline __mmask16 load_mask_16(const uint8_t* bits) {
  __mmask16 mask;
  asm("kmovw %1, %0" : "=k"(mask) : "m"(*reinterpret_cast<const uint8_t (*)[2]>(bits)));
  return mask;
}

inline __mmask32 load_mask_32(const uint8_t* bits) {
  __mmask32 mask;
  asm("kmovd %1, %0" : "=k"(mask) : "m"(*reinterpret_cast<const uint8_t (*)[4]>(bits)));
  return mask;
}

inline __mmask64 load_mask_64(const uint8_t* bits) {
  __mmask64 mask;
  asm("kmovq %1, %0" : "=k"(mask) : "m"(*reinterpret_cast<const uint8_t (*)[8]>(bits)));
  return mask;
}

struct BitmapFloatsAvx512 {
  using X = float;
  using Sum = __m512;
  static constexpr int kColumns = 16, kSums = 24;
  static constexpr bool kExact = true;  // the mask keeps x out where there is no weight

  struct Weights {
    __m512 w;
    __mmask16 kept;
  };
  static constexpr int kParts = 1;
  static Weights part(const Weights& w, int) { return w; }
  // Expanding from a register: from memory it is up to a fifth slower on Zen 5. The empty asm keeps GCC from joining
  // load and expansion.
  static Weights place(__m512 values, const uint8_t* bits) {
    asm("" : "+v"(values));
    const __mmask16 kept = load_mask_16(bits);
    return {_mm512_maskz_expand_ps(kept, values), kept};
  }
  static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
  static Sum multiply(Sum sum, const Weights& w, __m512 x) { return _mm512_mask3_fmadd_ps(w.w, x, sum, w.kept); }
};

struct BitmapF32Avx512 : BitmapFloatsAvx512 {
  using Value = float;
  static Weights expand(const uint8_t* bits, const float* values) { return place(_mm512_loadu_ps(values), bits); }
};

struct BitmapBf16Avx512 : BitmapFloatsAvx512 {
  using Value = uint16_t;
  static Weights expand(const uint8_t* bits, const uint16_t* values) {
    return place(Vec::load_as<Dtype::bf16>(values), bits);
  }
};

#ifdef __AVX512VBMI2__

// 32 columns at a time, expanded as they are stored. The even ones become floats by a shift, the odd ones by a mask,
// and x lies in the same order: 1.35 times as fast as widening 16 before they are expanded.
struct BitmapBf16Avx512Vbmi2 {
  using Value = uint16_t;
  using X = float;
  using Sum = __m512;
  static constexpr int kColumns = 32, kParts = 2, kSums = 20;
  static constexpr bool kExact = false;

  struct Weights {
    __m512i w;
  };
  static Weights expand(const uint8_t* bits, const uint16_t* values) {
    __m512i packed = _mm512_loadu_si512(values);
    asm("" : "+v"(packed));
    return {_mm512_maskz_expand_epi16(load_mask_32(bits), packed)};
  }
  static Weights part(const Weights& w, int p) {
    return {p == 0 ? _mm512_slli_epi32(w.w, 16) : _mm512_and_si512(w.w, _mm512_set1_epi32(int(0xffff0000)))};
  }
  static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
  static Sum multiply(Sum sum, const Weights& w, __m512 x) { return _mm512_fmadd_ps(_mm512_castsi512_ps(w.w), x, sum); }
  static int place(int column) { return column % 2 * 16 + column / 2; }
  static void arrange(float* x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
    _mm512_storeu_ps(x, _mm512_permutex2var_ps(first, even, second));
    _mm512_storeu_ps(x + 16, _mm512_permutex2var_ps(first, odd, second));
  }
};

#endif

struct BitmapBytesAvx512 {  // what every kind of s8 dot product shares
  using Value = int8_t;
  using Sum = __m512i;
  static constexpr int kSums = 24;
  static constexpr bool kExact = true;

  struct Weights {
    __m512i w;
  };
  static constexpr int kParts = 1;
  static Weights part(const Weights& w, int) { return w; }
  static __m512i load(const void* x) { return Vec::iload(x); }
  static __m256i expand_32(const uint8_t* bits, const int8_t* values) {
    uint16_t first;
    std::memcpy(&first, bits, sizeof first);
    return _mm256_set_m128i(expand_16_bytes(bits + 2, values + __builtin_popcount(first)),
                            expand_16_bytes(bits, values));
  }
};

// Dot8: int8_matmul's description of the dot product, s8 widened to s16.
template <class Dot8>
struct BitmapS8Avx512 : BitmapBytesAvx512 {
  using Quantize = Dot8;
  using X = typename Dot8::X;
  static constexpr int kColumns = 32;
  static Weights expand(const uint8_t* bits, const int8_t* values) {
    return {_mm512_cvtepi8_epi16(expand_32(bits, values))};
  }
  static Sum multiply(Sum sum, const Weights& w, __m512i x) {
    sum = Dot8::dot(sum, w.w, x);
    asm("" : "+v"(sum));  // GCC would add the products of several steps to each other first, and spill them
    return sum;
  }
};

// In quads, u8 . s8. With VBMI2 one instruction expands 64 columns.
template <class Dot8>
struct BitmapS8Avx512Vnni : BitmapBytesAvx512 {
  using Quantize = Dot8;
  using X = typename Dot8::X;
  static constexpr int kColumns = 64;
  static Weights expand(const uint8_t* bits, const int8_t* values) {
#ifdef __AVX512VBMI2__
    __m512i packed = _mm512_loadu_si512(values);
    asm("" : "+v"(packed));
    const __m512i w = _mm512_maskz_expand_epi8(load_mask_64(bits), packed);
#else
    uint32_t first;
    std::memcpy(&first, bits, sizeof first);
    const __m512i low = _mm512_castsi256_si512(expand_32(bits, values));
    const __m512i w = _mm512_inserti64x4(low, expand_32(bits + 4, values + __builtin_popcount(first)), 1);
#endif
    return {_mm512_xor_si512(w, _mm512_set1_epi8(int8_t(0x80)))};
  }
  static Sum multiply(Sum sum, const Weights& w, __m512i x) { return Dot8::dot(sum, w.w, x); }
};

}  // namespace
}  // namespace pycompress::sparse_linear
