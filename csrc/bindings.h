// What both Python modules, _C and _cuda, convert alike. Pointers arrive as integers (Tensor.data_ptr()), so that neither
// knows of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "common/check.h"
#include "common/dtype.h"
#include "common/linear_args.h"

namespace pycompress::bindings {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Enum>
Enum to_enum(int value, int count, const char* what) {
  check(value >= 0 && value < count, what, "=", value, " is unknown");
  return static_cast<Enum>(value);
}

// M, K, inner_rows, outer_stride, row_stride, col_stride: what ops/rows.py calls a row layout
using RowLayout = std::array<int64_t, 6>;

// The arguments of a linear layer, with x and y of one call.
template <class Args>
Args with_rows(Args a, uintptr_t x, const RowLayout& layout, int dtype, uintptr_t y, int threads, const char* what) {
  a.x = pointer<const void>(x);
  a.y = pointer<void>(y);
  a.dtype = to_enum<Dtype>(dtype, 3, what);
  a.threads = threads;
  a.m = layout[0];
  a.k = layout[1];
  a.inner_rows = layout[2];
  a.outer_stride = layout[3];
  a.row_stride = layout[4];
  a.col_stride = layout[5];
  return a;
}

// Each in a file of its own: what an operation adds to _C.
void bind_conv(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_int4(pybind11::module_& m);

}  // namespace pycompress::bindings
