// Eight classes a register.
#include "common/vec_avx2.h"
#include "distill_loss/short_rows.h"
#include "distill_loss/sweeps.h"

namespace pycompress::distill_loss {

const Kernel kAvx2{"distill_loss_avx2", Isa::avx2, any_sums, any_moments, any_gradient, widen, narrow, kLanes,
                   short_rows};

}  // namespace pycompress::distill_loss
