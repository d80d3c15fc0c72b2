// 6x16 tile, AVX-VNNI: u8 steps by s8 weights, vpdpbusd.
#include "int8_matmul/dot_avxvnni.h"

#include "int8_conv2d/conv_engine.h"

namespace pycompress::int8_conv2d {
namespace {

struct ConvAvxVnni : int8_matmul::AvxVnni {
  using X = uint8_t;
  static constexpr Layout kLayout = int8_matmul::kSignedQuads8;

  static __m256i broadcast(const uint8_t* q) { return AvxVnni::broadcast(reinterpret_cast<const int8_t*>(q)); }
  static __m256i dot(__m256i sum, __m256i w, __m256i q) { return _mm256_dpbusd_avx_epi32(sum, q, w); }
  static void store_steps(uint8_t* q, __m256i a, __m256i b, __m256i c, __m256i d) {
    // The two packs work within 128-bit halves: a0 b0 c0 d0 | a1 b1 c1 d1; the permutation sorts them.
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permutevar8x32_epi32(bytes, order));
  }
  // lane i: channels 0 to 3 of pixel i
  static __m256i interleave(const __m256i (&q)[4]) {
    const __m256i low = _mm256_or_si256(q[0], _mm256_slli_epi32(q[1], 8));
    const __m256i high = _mm256_or_si256(_mm256_slli_epi32(q[2], 16), _mm256_slli_epi32(q[3], 24));
    return _mm256_or_si256(low, high);
  }
};

}  // namespace

const Kernel kAvxVnni{"int8_conv2d_6x16_avxvnni",
                      Isa::avxvnni,
                      int8_matmul::kSignedQuads8,
                      1,
                      true,
                      sizeof(Scratch<ConvAvxVnni>),
                      largest,
                      quantize<ConvAvxVnni>,
                      multiply<ConvAvxVnni>};

}  // namespace pycompress::int8_conv2d
