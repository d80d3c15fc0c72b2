#include <immintrin.h>

#include "common/vec_avx512.h"
#include "peaks/loops.h"
#include "peaks/peaks.h"

namespace pycompress::peaks {

double burn_bf16_avx512(int64_t rounds) {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3f80);
  return burn<16>(rounds, 64, _mm512_setzero_ps(), [=](__m512 s) { return _mm512_dpbf16_ps(s, a, b); });
}

}  // namespace pycompress::peaks
