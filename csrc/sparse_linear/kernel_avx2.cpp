// AVX2: 32 tokens in 4 registers, groups of 2 outputs: 8 sums, 4 more for lists of one row. s8 in pairs, vpmaddwd.
#include "int8_matmul/dot_avx2.h"
#include "sparse_linear/bitmap_avx2.h"
#include "sparse_linear/bitmap_engine.h"
#include "sparse_linear/index_engine.h"

namespace pycompress::sparse_linear {

const IndexKernel kIndexAvx2[3] = {
    {"sparse_linear_index_32_avx2", Isa::avx2, kFloats2, L, run_float_block<FloatDot, 2>, float_scratch_bytes},
    {"sparse_linear_index_32_avx2", Isa::avx2, kHalves2, L, run_float_block<HalfDot, 2>, float_scratch_bytes},
    {"sparse_linear_index_32_avx2", Isa::avx2, kPairs2, L, run_int_block<im::Avx2, 2, false>,
     int_scratch_bytes<im::Avx2>},
};

const BitmapKernel kBitmapAvx2[3] = {
    {"sparse_linear_bitmap_avx2", Isa::avx2, WeightType::f32, false, run_bitmap_block<BitmapF32Avx2>,
     bitmap_scratch_bytes<BitmapF32Avx2>},
    {"sparse_linear_bitmap_avx2", Isa::avx2, WeightType::bf16, false, run_bitmap_block<BitmapBf16Avx2>,
     bitmap_scratch_bytes<BitmapBf16Avx2>},
    {"sparse_linear_bitmap_avx2", Isa::avx2, WeightType::s8, false, run_bitmap_block<BitmapS8Avx2<im::Avx2>>,
     bitmap_scratch_bytes<BitmapS8Avx2<im::Avx2>>},
};

}  // namespace pycompress::sparse_linear
