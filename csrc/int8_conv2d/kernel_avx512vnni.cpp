// 6x64 tile, AVX-512 VNNI: u8 steps by s8 weights, vpdpbusd; 24 accumulators, 4 weight registers, 1 broadcast.
#include "int8_matmul/dot_avx512vnni.h"

#include "int8_conv2d/conv_engine.h"

namespace pycompress::int8_conv2d {
namespace {

struct ConvAvx512Vnni : int8_matmul::Avx512Vnni {
  using X = uint8_t;
  static constexpr Layout kLayout = int8_matmul::kSignedQuads16;

  static __m512i broadcast(const uint8_t* q) { return Avx512Vnni::broadcast(reinterpret_cast<const int8_t*>(q)); }
  static __m512i dot(__m512i sum, __m512i w, __m512i q) { return _mm512_dpbusd_epi32(sum, q, w); }
  static void store_steps(uint8_t* q, __m512i a, __m512i b, __m512i c, __m512i d) {
    // The two packs work within 128-bit quarters: a0 b0 c0 d0 | a1 b1 c1 d1 | ...; the permutation sorts them.
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, bytes));
  }
  // lane i: channels 0 to 3 of pixel i
  static __m512i interleave(const __m512i (&q)[4]) {
    const __m512i low = _mm512_or_si512(q[0], _mm512_slli_epi32(q[1], 8));
    const __m512i high = _mm512_or_si512(_mm512_slli_epi32(q[2], 16), _mm512_slli_epi32(q[3], 24));
    return _mm512_or_si512(low, high);
  }
};

}  // namespace

const Kernel kAvx512Vnni{"int8_conv2d_6x64_avx512vnni",
                         Isa::avx512vnni,
                         int8_matmul::kSignedQuads16,
                         1,
                         true,
                         sizeof(Scratch<ConvAvx512Vnni>),
                         largest,
                         quantize<ConvAvx512Vnni>,
                         multiply<ConvAvx512Vnni>};

}  // namespace pycompress::int8_conv2d
