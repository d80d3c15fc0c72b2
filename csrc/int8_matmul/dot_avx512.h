// Int8 dot products with AVX-512 without VNNI: what the kernels that multiply s8 need to know of the instruction set.
#pragma once

#include "common/vec_avx512.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

struct Avx512 {
  using X = int16_t;
  static constexpr Layout kLayout = kPairs16;
  static constexpr int kVectors = 4, kBytes = 32;  // registers a panel is wide, bytes that fill one

  static __m512i load_weight(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512i broadcast(const int16_t* q) {
    int32_t pair;
    std::memcpy(&pair, q, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  // two products of at most 2^14 each: exact, where the s16 sums of vpmaddubsw would saturate
  static __m512i dot(__m512i sum, __m512i w, __m512i q) { return _mm512_add_epi32(sum, _mm512_madd_epi16(w, q)); }
  // weight k of 2, as s32
  static __m512i weight_at(__m512i w, int k) { return _mm512_srai_epi32(k == 0 ? _mm512_slli_epi32(w, 16) : w, 16); }
  static void store_steps(int16_t* q, __m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(q, _mm512_permutexvar_epi64(order, _mm512_packs_epi32(a, b)));
    _mm512_storeu_si512(q + 32, _mm512_permutexvar_epi64(order, _mm512_packs_epi32(c, d)));
  }
  static __m512i add_steps(__m512i sum, const int16_t*) { return sum; }  // signed weights: no sum is needed
};

}  // namespace
}  // namespace pycompress::int8_matmul
