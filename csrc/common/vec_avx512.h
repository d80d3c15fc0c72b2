// Sixteen lanes: AVX-512 F, BW, DQ, VL. Included only by files built for avx512 or better; see vec_math.h.
#pragma once

#include <immintrin.h>

#include "common/dtype.h"

namespace pycompress {
namespace {

struct Vec {
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;
  static constexpr int kLanes = 16;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  // Where one operand is NaN both return the second.
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }    // false where one is NaN
  static M not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }  // true where one is NaN
  static M both(M a, M b) { return _kand_mask16(a, b); }
  static M without(M a, M b) { return _kandn_mask16(b, a); }  // a and not b
  static F zero_unless(M keep, F a) { return _mm512_maskz_mov_ps(keep, a); }
  static F select(M yes, F a, F b) { return _mm512_mask_blend_ps(yes, b, a); }
  static F add_where(M where, F a, F b) { return _mm512_mask_add_ps(a, where, a, b); }  // a where not
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }
  // x = mantissa * 2^exponent with the mantissa in [1, 2), for positive normal x
  static F exponent(F x) { return _mm512_getexp_ps(x); }
  static F mantissa(F x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }

  static I izero() { return _mm512_setzero_si512(); }
  static I iset1(int32_t v) { return _mm512_set1_epi32(v); }
  static I iload(const void* p) { return _mm512_loadu_si512(p); }
  static void istore(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }  // round to nearest even
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }         // the same bits
  static F times_pow2(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^n for a whole n

  // 64 bytes of raw elements: the magnitude bits, and their running maximum. The order of the bits of |x| is the
  // order of |x|, with infinity and then NaN above every finite value.
  template <Dtype D>
  static I max_magnitude(I running, I raw) {
    if constexpr (D == Dtype::f32) {
      return _mm512_max_epu32(running, _mm512_and_si512(raw, _mm512_set1_epi32(0x7fffffff)));
    } else {
      return _mm512_max_epu16(running, _mm512_and_si512(raw, _mm512_set1_epi16(0x7fff)));
    }
  }

  // r[i] lane j <-> r[j] lane i, 16 x 16
  __attribute__((always_inline)) static void transpose(I (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // r[i + j]: column 4q + j of rows i..i+3, in quarter q
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);           // columns j, j + 8 of rows 0..7
      t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);       // columns j + 4, j + 12
      t[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);  // the same of rows 8..15
      t[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
      r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
      r[j + 4] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0x88);
      r[j + 12] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0xdd);
    }
  }

  // out[t] lane i = 32-bit element t of row i: 8 elements of 16 rows that lie `stride` bytes apart
  __attribute__((always_inline)) static void load_columns(const char* row, int64_t stride, I (&out)[8]) {
    const auto pair = [&](int64_t low, int64_t high) __attribute__((always_inline)) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + low * stride));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + high * stride));
      return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    };
    I r[8], t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = pair(i, i + 4);
      r[i + 4] = pair(i + 8, i + 12);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // r[i + j]: elements j, j + 4 of four rows, then of the four rows behind these
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      out[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
      out[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    }
  }

  static int32_t reduce_add(I v) { return _mm512_reduce_add_epi32(v); }
  static uint32_t reduce_max_u32(I v) { return _mm512_reduce_max_epu32(v); }
  static uint16_t reduce_max_u16(I v) {
    const I odd = _mm512_srli_epi32(v, 16), even = _mm512_and_si512(v, _mm512_set1_epi32(0xffff));
    return uint16_t(_mm512_reduce_max_epu32(_mm512_max_epu32(odd, even)));
  }

  template <Dtype D>
  static F load_as(const void* p) {
    if constexpr (D == Dtype::f32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if constexpr (D == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  // The first `count` lanes, and -infinity behind them.
  template <Dtype D>
  static F load_first(const void* p, int count) {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if constexpr (D == Dtype::f32) return _mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), mask, p);
    const __m256i fill = _mm256_set1_epi16(short(D == Dtype::f16 ? 0xfc00 : 0xff80));
    const __m256i half = _mm256_mask_loadu_epi16(fill, mask, p);
    if constexpr (D == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  // Past the cache; p is aligned to the size of what is stored.
  template <Dtype D>
  static void stream_as(void* p, F v) {
    if constexpr (D == Dtype::f32) {
      _mm512_stream_ps(static_cast<float*>(p), v);
    } else {
      _mm256_stream_si256(static_cast<__m256i*>(p), to_half<D>(v));
    }
  }

  template <Dtype D>
  static void store_as(void* p, F v) {
    if constexpr (D == Dtype::f32) {
      _mm512_storeu_ps(p, v);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(p), to_half<D>(v));
    }
  }

  template <Dtype D>
  static void store_as(void* p, F v, int count) {  // the first `count` lanes
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if constexpr (D == Dtype::f32) {
      _mm512_mask_storeu_ps(p, mask, v);
    } else {
      _mm256_mask_storeu_epi16(p, mask, to_half<D>(v));
    }
  }

 private:
  template <Dtype D>
  static __m256i to_half(F v) {
    if constexpr (D == Dtype::f16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(v);  // the same rounding in one instruction; subnormal values become 0
#endif
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half_up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_sub_epi32(half_up, odd, half_up, _mm512_set1_epi32(-1));
    // a NaN must not round to infinity
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    const __m512i upper_halves = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                                  31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper_halves, words));
  }
};

}  // namespace
}  // namespace pycompress
