#include "common/vec_avx2.h"
#include "peaks/loops.h"
#include "peaks/peaks.h"

namespace pycompress::peaks {
namespace {

// vpmaddwd + vpaddd, as exact int8 needs without VNNI. The product takes the sum, or else it would leave the loop.
double burn_int8(int64_t rounds) {
  const __m256i b = _mm256_set1_epi16(5);
  return burn<12>(rounds, 32, _mm256_set1_epi16(3),
                  [=](__m256i s) { return _mm256_add_epi32(s, _mm256_madd_epi16(s, b)); });
}

double burn_fp32(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f);
  return burn<12>(rounds, 16, _mm256_setzero_ps(), [=](__m256 s) { return _mm256_fmadd_ps(s, a, b); });
}

}  // namespace

const Loops kAvx2Loops{Isa::avx2, burn_int8, burn_fp32, burn_exp, read_all};

}  // namespace pycompress::peaks
