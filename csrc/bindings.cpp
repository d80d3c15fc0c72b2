// pybind11: m.def lines and the conversions they need. Pointers arrive as integers (Tensor.data_ptr()), so that the
// module knows nothing of torch. Every call that computes releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/check.h"
#include "common/isa.h"
#include "int8_matmul/int8_matmul.h"
#include "peaks/peaks.h"

namespace py = pybind11;
namespace pc = pycompress;
namespace im = pycompress::int8_matmul;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Enum>
Enum to_enum(int value, int count, const char* what) {
  pc::check(value >= 0 && value < count, "int8_matmul: ", what, "=", value, " is unknown");
  return static_cast<Enum>(value);
}

// A layer's arguments but for x and y, as addresses that the caller keeps alive. A call then passes five integers,
// which is what a small product can afford.
class Int8Plan {
 public:
  Int8Plan(uintptr_t weight, int64_t weight_bytes, uintptr_t weight_scale, int64_t n, uintptr_t bias, int bias_dtype,
           uintptr_t input_scale, uintptr_t input_zero_point, int mode, int activation)
      : prepared_(im::prepare(pointer<const void>(weight), weight_bytes)) {
    args_.mode = to_enum<im::Mode>(mode, 3, "mode");
    args_.activation = to_enum<im::Activation>(activation, 5, "activation");
    args_.weight_scale = pointer<const float>(weight_scale);
    args_.bias = pointer<const void>(bias);
    args_.bias_dtype = to_enum<pc::Dtype>(bias_dtype, 3, "bias dtype");
    args_.input_scale = pointer<const float>(input_scale);
    args_.input_zero_point = pointer<const int32_t>(input_zero_point);
    args_.n = args_.ldy = n;
  }

  // x: contiguous [M,K]
  void run(uintptr_t x, int64_t m, int64_t k, int dtype, uintptr_t y, int threads) const {
    run_strided(x, {m, k, m > 0 ? m : 1, 0, k, 1}, dtype, y, threads);
  }

  // layout: M, K, inner_rows, outer_stride, row_stride, col_stride
  void run_strided(uintptr_t x, const std::array<int64_t, 6>& layout, int dtype, uintptr_t y, int threads) const {
    im::Args a = args_;
    a.x = pointer<const void>(x);
    a.y = pointer<void>(y);
    a.dtype = to_enum<pc::Dtype>(dtype, 3, "dtype");
    a.threads = threads;
    a.m = layout[0];
    a.k = layout[1];
    a.inner_rows = layout[2];
    a.outer_stride = layout[3];
    a.row_stride = layout[4];
    a.col_stride = layout[5];
    py::gil_scoped_release release;
    im::run(a, prepared_);
  }

 private:
  im::Args args_;
  im::Prepared prepared_;
};

std::vector<std::string> names(const std::vector<pc::Isa>& isas) {
  std::vector<std::string> out;
  for (pc::Isa isa : isas) out.emplace_back(pc::isa_name(isa));
  return out;
}

py::dict peaks_dict(int threads, double seconds, int64_t buffer_bytes) {
  pc::peaks::Rates rates;
  {
    py::gil_scoped_release release;
    rates = pc::peaks::measure(threads, seconds, buffer_bytes);
  }
  py::dict out;
  out["isa"] = pc::isa_name(rates.isa);
  out["int8_gops"] = rates.int8_gops;
  out["fp32_gflops"] = rates.fp32_gflops;
  out["bf16_gflops"] = rates.bf16_gflops;
  out["read_gbps"] = rates.read_gbps;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pycompress native kernels; call them through pycompress.ops";

  m.def("available_isas", [] { return names(pc::available_isas()); });
  m.def("selected_isa", [] { return std::string(pc::isa_name(pc::selected_isa())); });
  m.def("cpu_features", &pc::cpu_features);
  m.def("measure_peaks", &peaks_dict, py::arg("threads"), py::arg("seconds"), py::arg("buffer_bytes"));

  py::class_<Int8Plan>(m, "Int8Plan")
      .def(py::init<uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, int, uintptr_t, uintptr_t, int, int>())
      .def("run", &Int8Plan::run)
      .def("run_strided", &Int8Plan::run_strided);
  m.def("int8_kernel_name", [](uintptr_t packed, int64_t bytes) {
    return std::string(im::kernel_for(*im::open_packed(pointer<const void>(packed), bytes).layout).name);
  });
  m.def("int8_packed_bytes", [](int64_t n, int64_t k) { return im::packed_bytes(im::best_kernel().layout, n, k); });
  m.def("int8_pack", [](uintptr_t weight, int64_t n, int64_t k, int64_t ld, uintptr_t dst) {
    py::gil_scoped_release release;
    im::pack(im::best_kernel().layout, pointer<const int8_t>(weight), n, k, ld, pointer<void>(dst));
  });
  m.def("int8_packed_shape", [](uintptr_t packed, int64_t bytes) {
    const im::PackedWeight w = im::open_packed(pointer<const void>(packed), bytes);
    return py::make_tuple(w.n, w.k);
  });
  m.def("int8_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t weight, int64_t ld) {
    py::gil_scoped_release release;
    im::unpack(im::open_packed(pointer<const void>(packed), bytes), pointer<int8_t>(weight), ld);
  });
}
