// Sixteen classes a register, and bf16 gradients rounded by vcvtneps2bf16 instead of six instructions.
#include "common/vec_avx512.h"
#include "distill_loss/short_rows.h"
#include "distill_loss/sweeps.h"

namespace pycompress::distill_loss {

const Kernel kAvx512Bf16{
    "distill_loss_avx512bf16", Isa::avx512vnni, any_sums, any_moments, any_gradient, widen, narrow, kLanes, short_rows};

}  // namespace pycompress::distill_loss
