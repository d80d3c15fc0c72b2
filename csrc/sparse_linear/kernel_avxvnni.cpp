// AVX-VNNI: s8 in quads, 256-bit vpdpbusd, 32 tokens, groups of 2 outputs.
#include "int8_matmul/dot_avxvnni.h"
#include "sparse_linear/bitmap_avx2.h"
#include "sparse_linear/bitmap_engine.h"
#include "sparse_linear/index_engine.h"

namespace pycompress::sparse_linear {

const IndexKernel kIndexAvxVnni[1] = {
    {"sparse_linear_index_32_avxvnni", Isa::avxvnni, kQuads2, L, run_int_block<im::AvxVnni, 2, false>,
     int_scratch_bytes<im::AvxVnni>},
};

const BitmapKernel kBitmapAvxVnni[1] = {
    {"sparse_linear_bitmap_avxvnni", Isa::avxvnni, WeightType::s8, false,
     run_bitmap_block<BitmapS8AvxVnni<im::AvxVnni>>, bitmap_scratch_bytes<BitmapS8AvxVnni<im::AvxVnni>>},
};

}  // namespace pycompress::sparse_linear
