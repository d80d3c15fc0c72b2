// Int8 dot products with AVX-VNNI: what the kernels that multiply s8 need to know of the instruction set.
#pragma once

#include "common/vec_avx2.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

struct AvxVnni {
  using X = int8_t;
  static constexpr Layout kLayout = kQuads8;
  static constexpr int kVectors = 2, kBytes = 32;  // registers a panel is wide, bytes that fill one

  static __m256i load_weight(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i broadcast(const int8_t* q) {
    int32_t quad;
    std::memcpy(&quad, q, sizeof quad);
    return _mm256_set1_epi32(quad);
  }
  // weight + 128 is the unsigned operand, x the signed one; the tile starts at -128 * sum of the row of x
  static __m256i dot(__m256i sum, __m256i w, __m256i q) { return _mm256_dpbusd_avx_epi32(sum, w, q); }
  // weight k of 4, as s32
  static __m256i weight_at(__m256i w, int k) {
    const __m256i s8 = _mm256_xor_si256(w, _mm256_set1_epi8(int8_t(0x80)));
    return _mm256_srai_epi32(_mm256_slli_epi32(s8, 24 - 8 * k), 24);
  }
  static void store_steps(int8_t* q, __m256i a, __m256i b, __m256i c, __m256i d) {
    // The two packs work within 128-bit halves: a0 b0 c0 d0 | a1 b1 c1 d1; the permutation sorts them.
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permutevar8x32_epi32(bytes, order));
  }
  static __m256i add_steps(__m256i sum, const int8_t* q) {
    const __m256i steps = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), steps);
  }
};

}  // namespace
}  // namespace pycompress::int8_matmul
