#include "sparse_linear/sparse_linear.h"

#include <algorithm>

#include "common/check.h"

namespace pycompress::sparse_linear {

void check_args(const Args& a, WeightType type, int64_t n, int64_t k) {
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

const float* padded_floats(const void* values, Dtype dtype, int64_t n, int64_t padded, float* copy) {
  if (values != nullptr && dtype == Dtype::f32 && n == padded) return static_cast<const float*>(values);
  for (int64_t i = 0; i < n && values != nullptr; ++i) copy[i] = load_float(values, i, dtype);
  std::fill(copy + (values == nullptr ? 0 : n), copy + padded, 0.0f);
  return copy;
}

}  // namespace pycompress::sparse_linear
