// 6x64 tile, AVX-512 without VNNI: s16 steps by s8 weights widened as they are loaded, vpmaddwd.
#include "int8_matmul/dot_avx512.h"

#include "int8_conv2d/conv_engine.h"

namespace pycompress::int8_conv2d {
namespace {

struct ConvAvx512 : int8_matmul::Avx512 {
  // lane i: channels 0 and 1 of pixel i
  static __m512i interleave(const __m512i (&q)[2]) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, q[0], _mm512_slli_epi32(q[1], 16));
  }
};

}  // namespace

const Kernel kAvx512{"int8_conv2d_6x64_avx512",
                     Isa::avx512,
                     int8_matmul::kPairs16,
                     2,
                     false,
                     sizeof(Scratch<ConvAvx512>),
                     largest,
                     quantize<ConvAvx512>,
                     multiply<ConvAvx512>};

}  // namespace pycompress::int8_conv2d
