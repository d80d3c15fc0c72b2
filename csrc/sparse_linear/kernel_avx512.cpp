// AVX-512: 64 tokens in 4 registers, groups of 4 outputs: 16 sums, 4 more for lists of one row. s8 in pairs, vpmaddwd.
#include "int8_matmul/dot_avx512.h"
#include "sparse_linear/bitmap_avx512.h"
#include "sparse_linear/bitmap_engine.h"
#include "sparse_linear/index_engine.h"

namespace pycompress::sparse_linear {

const IndexKernel kIndexAvx512[3] = {
    {"sparse_linear_index_64_avx512", Isa::avx512, kFloats4, L, run_float_block<FloatDot, 4>, float_scratch_bytes},
    {"sparse_linear_index_64_avx512", Isa::avx512, kHalves4, L, run_float_block<HalfDot, 4>, float_scratch_bytes},
    {"sparse_linear_index_64_avx512", Isa::avx512, kPairs4, L, run_int_block<im::Avx512, 4, false>,
     int_scratch_bytes<im::Avx512>},
};

const BitmapKernel kBitmapAvx512[3] = {
    {"sparse_linear_bitmap_avx512", Isa::avx512, WeightType::f32, false, run_bitmap_block<BitmapF32Avx512>,
     bitmap_scratch_bytes<BitmapF32Avx512>},
    {"sparse_linear_bitmap_avx512", Isa::avx512, WeightType::bf16, false, run_bitmap_block<BitmapBf16Avx512>,
     bitmap_scratch_bytes<BitmapBf16Avx512>},
    {"sparse_linear_bitmap_avx512", Isa::avx512, WeightType::s8, false, run_bitmap_block<BitmapS8Avx512<im::Avx512>>,
     bitmap_scratch_bytes<BitmapS8Avx512<im::Avx512>>},
};

}  // namespace pycompress::sparse_linear
