// AVX2: eight values of a row a register.
#include "common/vec_avx2.h"
#include "int8_embedding/engine.h"

namespace pycompress::int8_embedding {
namespace {

struct RowsAvx2 {
  static Vec::F load(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return Vec::to_float(_mm256_cvtepi8_epi32(bytes));
  }
  static Vec::F load(const int8_t* p, int count) {
    int64_t bytes = 0;
    std::memcpy(&bytes, p, size_t(count));
    return Vec::to_float(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)));
  }
};

}  // namespace

const Kernel kAvx2{"int8_embedding_avx2", Isa::avx2, run_outputs<RowsAvx2>};

}  // namespace pycompress::int8_embedding
