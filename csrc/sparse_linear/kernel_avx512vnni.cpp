// AVX-512 VNNI: s8 in quads, or 4 x 1 blocks interleaved into quads, 512-bit vpdpbusd, 64 tokens, groups of 4 outputs.
#include "int8_matmul/dot_avx512vnni.h"
#include "sparse_linear/bitmap_avx512.h"
#include "sparse_linear/bitmap_engine.h"
#include "sparse_linear/index_engine.h"

namespace pycompress::sparse_linear {

const IndexKernel kIndexAvx512Vnni[1] = {
    {"sparse_linear_index_64_avx512vnni", Isa::avx512vnni, kQuads4, L, run_int_block<im::Avx512Vnni, 4, true>,
     int_scratch_bytes<im::Avx512Vnni>},
};

const BitmapKernel kBitmapAvx512Vnni[1] = {
    {"sparse_linear_bitmap_avx512vnni", Isa::avx512vnni, WeightType::s8, false,
     run_bitmap_block<BitmapS8Avx512Vnni<im::Avx512Vnni>>, bitmap_scratch_bytes<BitmapS8Avx512Vnni<im::Avx512Vnni>>},
};

}  // namespace pycompress::sparse_linear
