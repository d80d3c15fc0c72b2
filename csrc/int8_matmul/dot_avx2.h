// Int8 dot products with AVX2: what the kernels that multiply s8 need to know of the instruction set.
#pragma once

#include "common/vec_avx2.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

struct Avx2 {
  using X = int16_t;
  static constexpr Layout kLayout = kPairs8;
  static constexpr int kVectors = 2, kBytes = 16;  // registers a panel is wide, bytes that fill one

  static __m256i load_weight(const uint8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256i broadcast(const int16_t* q) {
    int32_t pair;
    std::memcpy(&pair, q, sizeof pair);
    return _mm256_set1_epi32(pair);
  }
  // two products of at most 2^14 each: exact, where the s16 sums of vpmaddubsw would saturate
  static __m256i dot(__m256i sum, __m256i w, __m256i q) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, q)); }
  // weight k of 2, as s32
  static __m256i weight_at(__m256i w, int k) { return _mm256_srai_epi32(k == 0 ? _mm256_slli_epi32(w, 16) : w, 16); }
  static void store_steps(int16_t* q, __m256i a, __m256i b, __m256i c, __m256i d) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + 16), _mm256_permute4x64_epi64(_mm256_packs_epi32(c, d), 0xd8));
  }
  static __m256i add_steps(__m256i sum, const int16_t*) { return sum; }  // signed weights: no sum is needed
};

}  // namespace
}  // namespace pycompress::int8_matmul
