// AVX-512: sixteen values of a row a register.
#include "common/vec_avx512.h"
#include "int8_embedding/engine.h"

namespace pycompress::int8_embedding {
namespace {

struct RowsAvx512 {
  static Vec::F load(const int8_t* p) {
    return Vec::to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Vec::F load(const int8_t* p, int count) {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    return Vec::to_float(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
  }
};

}  // namespace

const Kernel kAvx512{"int8_embedding_avx512", Isa::avx512, run_outputs<RowsAvx512>};

}  // namespace pycompress::int8_embedding
