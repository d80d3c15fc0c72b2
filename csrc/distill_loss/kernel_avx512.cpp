// Sixteen classes a register.
#include "common/vec_avx512.h"
#include "distill_loss/short_rows.h"
#include "distill_loss/sweeps.h"

namespace pycompress::distill_loss {

const Kernel kAvx512{
    "distill_loss_avx512", Isa::avx512, any_sums, any_moments, any_gradient, widen, narrow, kLanes, short_rows};

}  // namespace pycompress::distill_loss
