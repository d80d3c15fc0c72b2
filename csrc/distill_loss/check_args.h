// What is wrong with the arguments of a call, told before any work.
#pragma once

#include "distill_loss/distill_loss.h"

namespace pycompress::distill_loss {

// Returns items: what the mean divides by (0 where no token is valid), 1 for sum and none. Throws ArgumentError.
double check_args(const Args& args);

}  // namespace pycompress::distill_loss
