// What the kernels of every device check. In a header: those of the CPU and those of CUDA are in different modules.
#pragma once

#include "common/check.h"
#include "sparse_linear/sparse_linear.h"

namespace pycompress::sparse_linear {

// x, y, sizes against the weight's N and K. Throws ArgumentError.
inline void check_args(const Args& a, WeightType type, int64_t n, int64_t k) {
  check(a.m >= 0 && a.threads >= 1, "sparse_linear: M=", a.m, ", threads=", a.threads);
  check(a.k == k, "sparse_linear: x has K=", a.k, " but weight has K=", k);
  check(a.n == n, "sparse_linear: y has N=", a.n, " but weight has N=", n);
  check(a.inner_rows >= 1, "sparse_linear: inner_rows=", a.inner_rows, ", expected at least 1");
  check(a.m * a.n == 0 || a.y != nullptr, "sparse_linear: y is missing");
  check(a.m * a.k == 0 || a.x != nullptr, "sparse_linear: x is missing");
  check(a.ldy >= a.n, "sparse_linear: ldy=", a.ldy, " is less than N=", a.n);
  if (type == WeightType::s8) {
    check(a.n == 0 || a.weight_scale != nullptr, "sparse_linear: weight_scale is missing, which an int8 weight needs");
  } else {
    check(a.weight_scale == nullptr, "sparse_linear: weight_scale belongs to an int8 weight");
  }
}

}  // namespace pycompress::sparse_linear
