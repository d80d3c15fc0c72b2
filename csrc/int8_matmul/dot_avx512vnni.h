// Int8 dot products with AVX-512 VNNI: what the kernels that multiply s8 need to know of the instruction set.
#pragma once

#include "common/vec_avx512.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

struct Avx512Vnni {
  using X = int8_t;
  static constexpr Layout kLayout = kQuads16;
  static constexpr int kVectors = 4, kBytes = 64;  // registers a panel is wide, bytes that fill one

  static __m512i load_weight(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static __m512i broadcast(const int8_t* q) {
    int32_t quad;
    std::memcpy(&quad, q, sizeof quad);
    return _mm512_set1_epi32(quad);
  }
  // weight + 128 is the unsigned operand, x the signed one; the tile starts at -128 * sum of the row of x
  static __m512i dot(__m512i sum, __m512i w, __m512i q) { return _mm512_dpbusd_epi32(sum, w, q); }
  // weight k of 4, as s32
  static __m512i weight_at(__m512i w, int k) {
    const __m512i s8 = _mm512_xor_si512(w, _mm512_set1_epi8(int8_t(0x80)));
    return _mm512_srai_epi32(_mm512_slli_epi32(s8, unsigned(24 - 8 * k)), 24);
  }
  static void store_steps(int8_t* q, __m512i a, __m512i b, __m512i c, __m512i d) {
    // The two packs work within 128-bit quarters: a0 b0 c0 d0 | a1 b1 c1 d1 | ...; the permutation sorts them.
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, bytes));
  }
  static __m512i add_steps(__m512i sum, const int8_t* q) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(q));
  }
};

}  // namespace
}  // namespace pycompress::int8_matmul
