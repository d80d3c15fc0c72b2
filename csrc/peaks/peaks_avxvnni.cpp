#include "common/vec_avx2.h"
#include "peaks/loops.h"
#include "peaks/peaks.h"

namespace pycompress::peaks {
namespace {

double burn_int8(int64_t rounds) {
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  return burn<12>(rounds, 64, _mm256_setzero_si256(), [=](__m256i s) { return _mm256_dpbusd_avx_epi32(s, a, b); });
}

double burn_fp32(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f);
  return burn<12>(rounds, 16, _mm256_setzero_ps(), [=](__m256 s) { return _mm256_fmadd_ps(s, a, b); });
}

}  // namespace

const Loops kAvxVnniLoops{Isa::avxvnni, burn_int8, burn_fp32, burn_exp, read_all};

}  // namespace pycompress::peaks
