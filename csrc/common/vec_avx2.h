// Eight lanes: AVX2, FMA, F16C. Included only by files built for avx2 or avxvnni; see vec_math.h.
#pragma once

#include <immintrin.h>

#include "common/dtype.h"

namespace pycompress {
namespace {

struct Vec {
  using F = __m256;
  using I = __m256i;
  using M = __m256;  // a mask: all bits of a lane, or none
  static constexpr int kLanes = 8;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  // Where one operand is NaN both return the second.
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }    // false where one is NaN
  static M not_less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }  // true where one is NaN
  static M both(M a, M b) { return _mm256_and_ps(a, b); }
  static M without(M a, M b) { return _mm256_andnot_ps(b, a); }  // a and not b
  static F zero_unless(M keep, F a) { return _mm256_and_ps(keep, a); }
  static F select(M yes, F a, F b) { return _mm256_blendv_ps(b, a, yes); }
  static F add_where(M where, F a, F b) { return _mm256_add_ps(a, _mm256_and_ps(where, b)); }  // a where not
  static float sum(F a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static float largest(F a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // x = mantissa * 2^exponent with the mantissa in [1, 2), for positive normal x
  static F exponent(F x) {
    const I biased = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
    return to_float(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
  }
  static F mantissa(F x) {
    const I fraction = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffff));
    return _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f800000)));
  }

  static I izero() { return _mm256_setzero_si256(); }
  static I iset1(int32_t v) { return _mm256_set1_epi32(v); }
  static I iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void istore(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }  // round to nearest even
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static F as_float(I a) { return _mm256_castsi256_ps(a); }  // the same bits
  // a * 2^n for a whole n in [-126, 127]; infinity for n = 128
  static F times_pow2(F a, F n) {
    const I exponent = _mm256_slli_epi32(_mm256_add_epi32(to_int(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
  }

  // 32 bytes of raw elements: the magnitude bits, and their running maximum. The order of the bits of |x| is the
  // order of |x|, with infinity and then NaN above every finite value.
  template <Dtype D>
  static I max_magnitude(I running, I raw) {
    if constexpr (D == Dtype::f32) {
      return _mm256_max_epu32(running, _mm256_and_si256(raw, _mm256_set1_epi32(0x7fffffff)));
    } else {
      return _mm256_max_epu16(running, _mm256_and_si256(raw, _mm256_set1_epi16(0x7fff)));
    }
  }

  // r[i] lane j <-> r[j] lane i, 8 x 8
  __attribute__((always_inline)) static void transpose(I (&r)[8]) {
    __m256i t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm256_permute2x128_si256(r[j], r[j + 4], 0x20);
      t[j + 4] = _mm256_permute2x128_si256(r[j], r[j + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) r[j] = t[j];
  }

  // out[t] lane i = 32-bit element t of row i: 8 elements of 8 rows that lie `stride` bytes apart
  __attribute__((always_inline)) static void load_columns(const char* row, int64_t stride, I (&out)[8]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) out[i] = iload(row + i * stride);
    transpose(out);
  }

  static int32_t reduce_add(I v) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
  static uint32_t reduce_max_u32(I v) {
    alignas(32) uint32_t lane[8];
    istore(lane, v);
    for (int i = 1; i < 8; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
    return lane[0];
  }
  static uint16_t reduce_max_u16(I v) {
    const I odd = _mm256_srli_epi32(v, 16), even = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    return uint16_t(reduce_max_u32(_mm256_max_epu32(odd, even)));
  }

  template <Dtype D>
  static F load_as(const void* p) {
    if constexpr (D == Dtype::f32) return _mm256_loadu_ps(static_cast<const float*>(p));
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if constexpr (D == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  // The first `count` lanes, and -infinity behind them.
  template <Dtype D>
  static F load_first(const void* p, int count) {
    if constexpr (D == Dtype::f32) {
      const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const I in = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
      const F values = _mm256_maskload_ps(static_cast<const float*>(p), in);
      return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), values, _mm256_castsi256_ps(in));
    }
    alignas(16) uint16_t padded[8];
    for (int i = 0; i < 8; ++i) padded[i] = D == Dtype::f16 ? 0xfc00 : 0xff80;
    for (int i = 0; i < count; ++i) padded[i] = static_cast<const uint16_t*>(p)[i];
    return load_as<D>(padded);
  }

  // Past the cache; p is aligned to the size of what is stored.
  template <Dtype D>
  static void stream_as(void* p, F v) {
    if constexpr (D == Dtype::f32) {
      _mm256_stream_ps(static_cast<float*>(p), v);
    } else {
      _mm_stream_si128(static_cast<__m128i*>(p), to_half<D>(v));
    }
  }

  template <Dtype D>
  static void store_as(void* p, F v) {
    if constexpr (D == Dtype::f32) {
      _mm256_storeu_ps(static_cast<float*>(p), v);
    } else {
      _mm_storeu_si128(static_cast<__m128i*>(p), to_half<D>(v));
    }
  }

  template <Dtype D>
  static void store_as(void* p, F v, int count) {  // the first `count` lanes
    alignas(32) char all[32];
    store_as<D>(all, v);
    std::memcpy(p, all, size_t(count) * (D == Dtype::f32 ? 4 : 2));
  }

 private:
  template <Dtype D>
  static __m128i to_half(F v) {
    if constexpr (D == Dtype::f16) return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // a NaN must not round to infinity
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    return _mm256_castsi256_si128(packed);
  }
};

}  // namespace
}  // namespace pycompress
