// AVX-512 with VBMI2: one instruction expands 32 columns of bf16 (vpexpandw) or 64 of s8 (vpexpandb).
#include "int8_matmul/dot_avx512vnni.h"
#include "sparse_linear/bitmap_avx512.h"
#include "sparse_linear/bitmap_engine.h"

namespace pycompress::sparse_linear {
namespace {

using Bytes = BitmapS8Avx512Vnni<int8_matmul::Avx512Vnni>;

}  // namespace

const BitmapKernel kBitmapAvx512Vbmi2[2] = {
    {"sparse_linear_bitmap_avx512vbmi2", Isa::avx512vnni, WeightType::bf16, true,
     run_bitmap_block<BitmapBf16Avx512Vbmi2>, bitmap_scratch_bytes<BitmapBf16Avx512Vbmi2>},
    {"sparse_linear_bitmap_avx512vbmi2", Isa::avx512vnni, WeightType::s8, true, run_bitmap_block<Bytes>,
     bitmap_scratch_bytes<Bytes>},
};

}  // namespace pycompress::sparse_linear
