// pybind11: int4_matmul. Every call that computes releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "int4_matmul/int4_matmul.h"

namespace py = pybind11;
namespace i4 = pycompress::int4_matmul;

namespace pycompress::bindings {
namespace {

// As Int8Plan: a layer's arguments but for x and y, as addresses that the caller keeps alive.
class Int4Plan {
 public:
  Int4Plan(uintptr_t weight, int64_t weight_bytes, uintptr_t bias, int bias_dtype, int activation)
      : prepared_(i4::prepare(pointer<const void>(weight), weight_bytes)) {
    args_.activation = to_enum<Activation>(activation, 5, "int4_matmul: activation");
    args_.bias = pointer<const void>(bias);
    args_.bias_dtype = to_enum<Dtype>(bias_dtype, 3, "int4_matmul: bias dtype");
    args_.n = args_.ldy = prepared_.weight.shape.n;
  }

  // x: contiguous [M,K]
  void run(uintptr_t x, int64_t m, int64_t k, int dtype, uintptr_t y, int threads) const {
    run_strided(x, {m, k, m > 0 ? m : 1, 0, k, 1}, dtype, y, threads);
  }

  void run_strided(uintptr_t x, const RowLayout& layout, int dtype, uintptr_t y, int threads) const {
    const i4::Args args = with_rows(args_, x, layout, dtype, y, threads, "int4_matmul: dtype");
    py::gil_scoped_release release;
    i4::run(args, prepared_);
  }

 private:
  i4::Args args_;
  i4::Prepared prepared_;
};

i4::Shape to_shape(int64_t n, int64_t k, int64_t group_size, int format, bool has_zero_point) {
  return {n, k, group_size, to_enum<i4::Format>(format, 2, "int4_matmul: format"), has_zero_point};
}

void pack(uintptr_t weight, uintptr_t scale, uintptr_t zero_point, int64_t n, int64_t k, int64_t group_size, int format,
          bool has_zero_point, uintptr_t dst) {
  const i4::Shape shape = to_shape(n, k, group_size, format, has_zero_point);
  py::gil_scoped_release release;
  i4::pack(i4::best_kernel().layout, shape,
           {pointer<const uint8_t>(weight), pointer<const float>(scale), pointer<const uint8_t>(zero_point)},
           pointer<void>(dst));
}

}  // namespace

void bind_int4(py::module_& m) {
  py::class_<Int4Plan>(m, "Int4Plan")
      .def(py::init<uintptr_t, int64_t, uintptr_t, int, int>())
      .def("run", &Int4Plan::run)
      .def("run_strided", &Int4Plan::run_strided);
  m.def("int4_kernel_name", [](uintptr_t packed, int64_t bytes) {
    return std::string(i4::kernel_for(*i4::open_packed(pointer<const void>(packed), bytes).layout).name);
  });
  m.def("int4_packed_bytes", [](int64_t n, int64_t k, int64_t group_size, int format, bool has_zero_point) {
    return i4::packed_bytes(i4::best_kernel().layout, to_shape(n, k, group_size, format, has_zero_point));
  });
  m.def("int4_pack", &pack);
  m.def("int4_packed_info", [](uintptr_t packed, int64_t bytes) {
    const i4::Shape s = i4::open_packed(pointer<const void>(packed), bytes).shape;
    return py::make_tuple(s.n, s.k, s.group_size, int(s.format), s.has_zero_point);
  });
  m.def("int4_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t weight, uintptr_t scale, uintptr_t zero_point) {
    py::gil_scoped_release release;
    i4::unpack(i4::open_packed(pointer<const void>(packed), bytes), pointer<uint8_t>(weight), pointer<float>(scale),
               pointer<uint8_t>(zero_point));
  });
}

}  // namespace pycompress::bindings
