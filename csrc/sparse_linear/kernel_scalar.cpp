// The specification: plain loops, any CPU. Every other kernel is tested against this one.
#include "sparse_linear/bitmap_scalar.h"
#include "sparse_linear/index_scalar.h"

namespace pycompress::sparse_linear {

const IndexKernel kIndexScalar[3] = {
    {"sparse_linear_index_scalar", Isa::scalar, kFloats1, 16, run_index_scalar, index_scalar_scratch_bytes},
    {"sparse_linear_index_scalar", Isa::scalar, kHalves1, 16, run_index_scalar, index_scalar_scratch_bytes},
    {"sparse_linear_index_scalar", Isa::scalar, kQuads1, 16, run_index_scalar, index_scalar_scratch_bytes},
};

const BitmapKernel kBitmapScalar[3] = {
    {"sparse_linear_bitmap_scalar", Isa::scalar, WeightType::f32, false, run_bitmap_scalar,
     bitmap_scalar_scratch_bytes},
    {"sparse_linear_bitmap_scalar", Isa::scalar, WeightType::bf16, false, run_bitmap_scalar,
     bitmap_scalar_scratch_bytes},
    {"sparse_linear_bitmap_scalar", Isa::scalar, WeightType::s8, false, run_bitmap_scalar, bitmap_scalar_scratch_bytes},
};

}  // namespace pycompress::sparse_linear
