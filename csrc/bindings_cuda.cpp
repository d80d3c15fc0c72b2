// pybind11: m.def lines of the CUDA module and the conversions they need. A call gets addresses, a device and its stream,
// starts kernels and returns: it neither waits nor allocates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "bindings.h"
#include "common/cuda/launch.h"
#include "distill_loss/cuda.h"
#include "int8_matmul/cuda.h"
#include "sparse_linear/cuda.h"

namespace py = pybind11;
namespace pc = pycompress;
namespace dl = pycompress::distill_loss;
namespace im = pycompress::int8_matmul;
namespace sl = pycompress::sparse_linear;
using pc::bindings::pointer;
using pc::bindings::RowLayout;
using pc::bindings::to_enum;
using pc::bindings::with_rows;

namespace {

// (device, stream handle), as pycompress.gpu.place gives them
pc::cuda::Place to_place(const std::pair<int, uintptr_t>& place) {
  return {place.first, reinterpret_cast<cudaStream_t>(place.second)};
}

// ---- int8_matmul -------------------------------------------------------------------------------------------------

// A layer's arguments but for x and y, as addresses that the caller keeps alive; 0 for what there is not.
class Int8Plan {
 public:
  Int8Plan(uintptr_t weight, int64_t n, int64_t k, uintptr_t weight_scale, uintptr_t bias, int bias_dtype,
           uintptr_t input_scale, uintptr_t input_zero_point, int mode, int activation) {
    args_.mode = to_enum<im::Mode>(mode, 3, "int8_linear: mode");
    args_.activation = to_enum<pc::Activation>(activation, 5, "int8_linear: activation");
    args_.weight = pointer<const int8_t>(weight);
    args_.weight_scale = pointer<const float>(weight_scale);
    args_.bias = pointer<const void>(bias);
    args_.bias_dtype = to_enum<pc::Dtype>(bias_dtype, 3, "int8_linear: bias dtype");
    args_.input_scale = pointer<const float>(input_scale);
    args_.input_zero_point = pointer<const int32_t>(input_zero_point);
    args_.n = args_.ldy = n;
    args_.k = k;
  }

  // For m rows of x on a device: 0 where no workspace is needed.
  int64_t workspace_bytes(int64_t m, int device) const {
    im::CudaArgs args = args_;
    args.m = m;
    return im::workspace_bytes(args, im::pick(args, pc::cuda::device_info(device)));
  }

  // y: contiguous [M,N]
  void run(uintptr_t x, const RowLayout& layout, int dtype, uintptr_t y, uintptr_t workspace, int64_t workspace_bytes,
           const std::pair<int, uintptr_t>& place) const {
    im::CudaArgs args = with_rows(args_, x, layout, dtype, y, 1, "int8_linear: dtype");
    pc::check(args.k == args_.k, "int8_linear: x has K=", args.k, " but weight has K=", args_.k);
    args.workspace = pointer<void>(workspace);
    args.workspace_bytes = workspace_bytes;
    py::gil_scoped_release release;
    im::run_cuda(args, to_place(place));
  }

 private:
  im::CudaArgs args_;
};

// ---- sparse_linear -----------------------------------------------------------------------------------------------

// A layer's arguments but for x and y, as addresses that the caller keeps alive; 0 for what there is not. tiles: the
// 2:4 form computes, else the bitmap.
class SparsePlan {
 public:
  SparsePlan(int weight_type, int64_t n, int64_t k, uintptr_t weight_scale, uintptr_t bias, int bias_dtype,
             int activation, uintptr_t bits, uintptr_t values, int64_t nnz, uintptr_t row_start, uintptr_t metadata,
             uintptr_t tiles) {
    const auto type = to_enum<sl::WeightType>(weight_type, 4, "sparse_linear: weight type");
    bitmap_ = {
        type, n, k, nnz, pointer<const uint8_t>(bits), pointer<const void>(values), pointer<const int64_t>(row_start)};
    two_to_four_ = {type, n, k, pointer<const uint32_t>(metadata), pointer<const void>(tiles)};
    args_.activation = to_enum<pc::Activation>(activation, 5, "sparse_linear: activation");
    args_.weight_scale = pointer<const float>(weight_scale);
    args_.bias = pointer<const void>(bias);
    args_.bias_dtype = to_enum<pc::Dtype>(bias_dtype, 3, "sparse_linear: bias dtype");
    args_.n = args_.ldy = n;
  }

  int64_t workspace_bytes(uintptr_t x, const RowLayout& layout, int dtype) const {
    const sl::CudaArgs args = with_rows(args_, x, layout, dtype, 0, 1, "sparse_linear: dtype");
    return two_to_four_.tiles == nullptr ? sl::workspace_bytes(args, bitmap_) : sl::workspace_bytes(args, two_to_four_);
  }

  // y: contiguous [M,N]
  void run(uintptr_t x, const RowLayout& layout, int dtype, uintptr_t y, uintptr_t workspace, int64_t workspace_bytes,
           const std::pair<int, uintptr_t>& place) const {
    sl::CudaArgs args = with_rows(args_, x, layout, dtype, y, 1, "sparse_linear: dtype");
    args.workspace = pointer<void>(workspace);
    args.workspace_bytes = workspace_bytes;
    py::gil_scoped_release release;
    if (two_to_four_.tiles == nullptr) {
      sl::run_bitmap_cuda(args, bitmap_, to_place(place));
    } else {
      sl::run_2to4_cuda(args, two_to_four_, to_place(place));
    }
  }

 private:
  sl::CudaArgs args_;
  sl::CudaBitmap bitmap_;
  sl::Cuda2to4 two_to_four_;
};

// ---- distill_loss ------------------------------------------------------------------------------------------------

// address, dtype code, then a RowLayout
using DistillRows = std::tuple<uintptr_t, int, RowLayout>;

dl::Rows to_rows(const DistillRows& rows) {
  const RowLayout& r = std::get<2>(rows);
  return {pointer<const void>(std::get<0>(rows)),
          to_enum<pc::Dtype>(std::get<1>(rows), 3, "distill_loss: dtype"),
          r[0],
          r[1],
          r[2],
          r[3],
          r[4],
          r[5]};
}

void distill_loss(const DistillRows& student, const DistillRows& teacher, uintptr_t labels, uintptr_t token_weight,
                  int64_t label_classes, int divergence, int reduction, double temperature, double alpha, double beta,
                  double label_smoothing, int64_t ignore_index, uintptr_t num_items, double given_items,
                  const std::array<uintptr_t, 3>& values, uintptr_t grad, bool normalize_grad, double grad_factor,
                  uintptr_t grad_scale, uintptr_t workspace, const std::pair<int, uintptr_t>& place) {
  dl::CudaArgs a;
  a.student = to_rows(student);
  a.teacher = to_rows(teacher);
  a.labels = pointer<const int64_t>(labels);
  a.token_weight = pointer<const float>(token_weight);
  a.label_classes = label_classes;
  a.divergence = to_enum<dl::Divergence>(divergence, 3, "distill_loss: divergence");
  a.reduction = to_enum<dl::Reduction>(reduction, 3, "distill_loss: reduction");
  a.temperature = temperature;
  a.alpha = alpha;
  a.beta = beta;
  a.label_smoothing = label_smoothing;
  a.ignore_index = ignore_index;
  a.num_items = pointer<const double>(num_items);
  a.given_items = given_items;
  a.loss = pointer<float>(values[0]);
  a.hard = pointer<float>(values[1]);
  a.soft = pointer<float>(values[2]);
  a.grad = pointer<void>(grad);
  a.normalize_grad = normalize_grad;
  a.grad_factor = grad_factor;
  a.grad_scale = pointer<float>(grad_scale);
  a.workspace = pointer<void>(workspace);
  py::gil_scoped_release release;
  dl::run_cuda(a, to_place(place));
}

void distill_scale(uintptr_t grad, int dtype, int64_t rows, int64_t cols, uintptr_t factor, int factor_stride,
                   const std::pair<int, uintptr_t>& place) {
  dl::scale_cuda(pointer<void>(grad), to_enum<pc::Dtype>(dtype, 3, "distill_loss: dtype"), rows, cols,
                 pointer<const float>(factor), factor_stride, to_place(place));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "pycompress CUDA kernels; call them through pycompress.ops";
  m.attr("DEVICE_TYPE") = PYCOMPRESS_CUDA_DEVICE_TYPE;      // whose pointers it takes: "cuda", or "cpu" where emulated
  m.attr("ARCHITECTURES") = PYCOMPRESS_CUDA_ARCHITECTURES;  // what it was compiled for, e.g. "80;90a"
  m.attr("CUDA_VERSION") = CUDART_VERSION;                  // e.g. 13000

  // ---- int8_matmul
  py::class_<Int8Plan>(m, "Int8Plan")
      .def(py::init<uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, int, uintptr_t, uintptr_t, int, int>())
      .def("workspace_bytes", &Int8Plan::workspace_bytes)
      .def("run", &Int8Plan::run);
  m.attr("INT8_MAX_TOKENS") = im::kMaxTokens;  // of weight_only

  // ---- sparse_linear
  py::class_<SparsePlan>(m, "SparsePlan")
      .def(py::init<int, int64_t, int64_t, uintptr_t, uintptr_t, int, int, uintptr_t, uintptr_t, int64_t, uintptr_t,
                    uintptr_t, uintptr_t>())
      .def("workspace_bytes", &SparsePlan::workspace_bytes)
      .def("run", &SparsePlan::run);

  // ---- distill_loss
  m.def("distill_workspace_bytes", &dl::most_workspace_bytes, py::arg("rows"), py::arg("device"));
  m.def("distill_loss", &distill_loss, py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("labels"),
        py::arg("token_weight"), py::arg("label_classes"), py::arg("divergence"), py::arg("reduction"),
        py::arg("temperature"), py::arg("alpha"), py::arg("beta"), py::arg("label_smoothing"), py::arg("ignore_index"),
        py::arg("num_items"), py::arg("given_items"), py::arg("values"), py::arg("grad"), py::arg("normalize_grad"),
        py::arg("grad_factor"), py::arg("grad_scale"), py::arg("workspace"), py::arg("place"));
  m.def("distill_scale", &distill_scale, py::kw_only(), py::arg("grad"), py::arg("dtype"), py::arg("rows"),
        py::arg("cols"), py::arg("factor"), py::arg("factor_stride"), py::arg("place"));
}
