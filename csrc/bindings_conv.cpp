// pybind11: int8 convolution. Every call that computes releases the GIL.
#include <pybind11/stl.h>

#include "bindings.h"
#include "int8_conv2d/int8_conv2d.h"

namespace py = pybind11;
namespace pc = pycompress;
namespace cv = pycompress::int8_conv2d;

namespace {

using pc::bindings::pointer;
using pc::bindings::to_enum;

// O, I / groups, kh, kw, groups
using Shape = std::array<int64_t, 5>;
using Four = std::array<int64_t, 4>;

cv::WeightShape to_shape(const Shape& s) { return {s[0], s[1], s[2], s[3], s[4]}; }

// A layer's arguments but for x and y, as addresses that the caller keeps alive.
class Int8ConvPlan {
 public:
  // window: stride, padding (top, left), dilation; height first
  Int8ConvPlan(uintptr_t weight, int64_t weight_bytes, uintptr_t weight_scale, uintptr_t bias, int bias_dtype,
               uintptr_t input_scale, uintptr_t input_zero_point, int mode, int activation,
               const std::array<int64_t, 6>& window)
      : prepared_(cv::prepare(pointer<const void>(weight), weight_bytes)) {
    args_.mode = to_enum<cv::Mode>(mode, 3, "int8_conv2d: mode");
    args_.activation = to_enum<pc::Activation>(activation, 5, "int8_conv2d: activation");
    args_.weight_scale = pointer<const float>(weight_scale);
    args_.bias = pointer<const void>(bias);
    args_.bias_dtype = to_enum<pc::Dtype>(bias_dtype, 3, "int8_conv2d: bias dtype");
    args_.input_scale = pointer<const float>(input_scale);
    args_.input_zero_point = pointer<const int32_t>(input_zero_point);
    args_.stride_h = window[0];
    args_.stride_w = window[1];
    args_.pad_top = window[2];
    args_.pad_left = window[3];
    args_.dilation_h = window[4];
    args_.dilation_w = window[5];
  }

  // shape, strides: of x, N C H W. out: rows and columns of y, which is dense.
  void run(uintptr_t x, const Four& shape, const Four& strides, int dtype, uintptr_t y,
           const std::array<int64_t, 2>& out, bool channels_last, int threads) const {
    cv::Args a = args_;
    a.x = pointer<const void>(x);
    a.dtype = to_enum<pc::Dtype>(dtype, 3, "int8_conv2d: dtype");
    a.n = shape[0];
    a.c = shape[1];
    a.h = shape[2];
    a.w = shape[3];
    a.x_stride_n = strides[0];
    a.x_stride_c = strides[1];
    a.x_stride_h = strides[2];
    a.x_stride_w = strides[3];
    a.y = pointer<void>(y);
    a.out_h = out[0];
    a.out_w = out[1];
    a.channels_last = channels_last;
    a.threads = threads;
    py::gil_scoped_release release;
    cv::run(a, prepared_);
  }

 private:
  cv::Args args_;
  cv::Prepared prepared_;
};

}  // namespace

namespace pycompress::bindings {

void bind_conv(py::module_& m) {
  py::class_<Int8ConvPlan>(m, "Int8ConvPlan")
      .def(py::init<uintptr_t, int64_t, uintptr_t, uintptr_t, int, uintptr_t, uintptr_t, int, int,
                    const std::array<int64_t, 6>&>())
      .def("run", &Int8ConvPlan::run);
  m.def("conv_refuses", &cv::refuses);
  m.def("conv_packed_bytes",
        [](const Shape& shape) { return cv::packed_bytes(cv::best_kernel().layout, to_shape(shape)); });
  m.def("conv_pack", [](uintptr_t weight, const Shape& shape, uintptr_t dst) {
    py::gil_scoped_release release;
    cv::pack(cv::best_kernel().layout, pointer<const int8_t>(weight), to_shape(shape), pointer<void>(dst));
  });
  m.def("conv_packed_shape", [](uintptr_t packed, int64_t bytes) {
    const cv::WeightShape s = cv::open_packed(pointer<const void>(packed), bytes).shape;
    return py::make_tuple(s.out, s.per_group, s.kh, s.kw, s.groups);
  });
  m.def("conv_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t weight) {
    py::gil_scoped_release release;
    cv::unpack(cv::open_packed(pointer<const void>(packed), bytes), pointer<int8_t>(weight));
  });
  m.def("conv_kernel_name", [](uintptr_t packed, int64_t bytes) {
    return std::string(cv::kernel_for(*cv::open_packed(pointer<const void>(packed), bytes).layout).name);
  });
}

}  // namespace pycompress::bindings
