// What four bits stand for, before zero point and scale: all of it exact, so that nothing is lost before x is met.
#pragma once

#include "int4_matmul/int4_matmul.h"

namespace pycompress::int4_matmul {
namespace {

// symmetric: q - 8; asymmetric: q, less a zero point for each output; codebook: an NF4 value
enum class Kind { symmetric, asymmetric, codebook };

constexpr float kSteps[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float kCentredSteps[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

constexpr const float* values_of(Kind kind) {
  return kind == Kind::codebook ? kNf4 : kind == Kind::asymmetric ? kSteps : kCentredSteps;
}

}  // namespace
}  // namespace pycompress::int4_matmul
