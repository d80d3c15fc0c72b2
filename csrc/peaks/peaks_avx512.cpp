#include "common/vec_avx512.h"
#include "peaks/loops.h"
#include "peaks/peaks.h"

namespace pycompress::peaks {
namespace {

// vpmaddwd + vpaddd, as exact int8 needs without VNNI. The product takes the sum, or else it would leave the loop.
double burn_int8(int64_t rounds) {
  const __m512i b = _mm512_set1_epi16(5);
  return burn<16>(rounds, 64, _mm512_set1_epi16(3),
                  [=](__m512i s) { return _mm512_add_epi32(s, _mm512_madd_epi16(s, b)); });
}

double burn_fp32(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.0f);
  return burn<16>(rounds, 32, _mm512_setzero_ps(), [=](__m512 s) { return _mm512_fmadd_ps(s, a, b); });
}

}  // namespace

const Loops kAvx512Loops{Isa::avx512, burn_int8, burn_fp32, burn_exp, read_all};

}  // namespace pycompress::peaks
