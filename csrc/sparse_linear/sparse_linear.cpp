#include "sparse_linear/sparse_linear.h"

#include <algorithm>

namespace pycompress::sparse_linear {

const float* padded_floats(const void* values, Dtype dtype, int64_t n, int64_t padded, float* copy) {
  if (values != nullptr && dtype == Dtype::f32 && n == padded) return static_cast<const float*>(values);
  for (int64_t i = 0; i < n && values != nullptr; ++i) copy[i] = load_float(values, i, dtype);
  std::fill(copy + (values == nullptr ? 0 : n), copy + padded, 0.0f);
  return copy;
}

}  // namespace pycompress::sparse_linear
