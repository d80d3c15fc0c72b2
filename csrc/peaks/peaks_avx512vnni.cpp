#include "common/vec_avx512.h"
#include "peaks/loops.h"
#include "peaks/peaks.h"

namespace pycompress::peaks {
namespace {

double burn_int8(int64_t rounds) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  return burn<16>(rounds, 128, _mm512_setzero_si512(), [=](__m512i s) { return _mm512_dpbusd_epi32(s, a, b); });
}

double burn_fp32(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.0f);
  return burn<16>(rounds, 32, _mm512_setzero_ps(), [=](__m512 s) { return _mm512_fmadd_ps(s, a, b); });
}

}  // namespace

const Loops kAvx512VnniLoops{Isa::avx512vnni, burn_int8, burn_fp32, burn_exp, read_all};

}  // namespace pycompress::peaks
