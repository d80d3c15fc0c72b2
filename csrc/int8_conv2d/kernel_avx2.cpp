// 6x16 tile, AVX2: s16 steps by s8 weights widened as they are loaded, vpmaddwd.
#include "int8_matmul/dot_avx2.h"

#include "int8_conv2d/conv_engine.h"

namespace pycompress::int8_conv2d {
namespace {

struct ConvAvx2 : int8_matmul::Avx2 {
  // lane i: channels 0 and 1 of pixel i
  static __m256i interleave(const __m256i (&q)[2]) {
    return _mm256_blend_epi16(q[0], _mm256_slli_epi32(q[1], 16), 0xaa);
  }
};

}  // namespace

const Kernel kAvx2{
    "int8_conv2d_6x16_avx2", Isa::avx2,         int8_matmul::kPairs8, 2, false, sizeof(Scratch<ConvAvx2>), largest,
    quantize<ConvAvx2>,      multiply<ConvAvx2>};

}  // namespace pycompress::int8_conv2d
