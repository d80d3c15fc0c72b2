// pybind11: m.def lines and the conversions they need. Every call that computes releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "bindings.h"
#include "common/check.h"
#include "common/dlpack.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/pool.h"
#include "distill_loss/distill_loss.h"
#include "int8_matmul/int8_matmul.h"
#include "peaks/peaks.h"
#include "sparse_linear/index_pack.h"

namespace py = pybind11;
namespace pc = pycompress;
namespace dl = pycompress::distill_loss;
namespace im = pycompress::int8_matmul;
namespace sl = pycompress::sparse_linear;

namespace {

using pc::bindings::pointer;
using pc::bindings::to_enum;
using pc::bindings::with_rows;

// A layer's arguments but for x and y, as addresses that the caller keeps alive. A call then passes five integers,
// which is what a small product can afford.
class Int8Plan {
 public:
  Int8Plan(uintptr_t weight, int64_t weight_bytes, uintptr_t weight_scale, int64_t n, uintptr_t bias, int bias_dtype,
           uintptr_t input_scale, uintptr_t input_zero_point, int mode, int activation)
      : prepared_(im::prepare(pointer<const void>(weight), weight_bytes)) {
    args_.mode = to_enum<im::Mode>(mode, 3, "int8_matmul: mode");
    args_.activation = to_enum<im::Activation>(activation, 5, "int8_matmul: activation");
    args_.weight_scale = pointer<const float>(weight_scale);
    args_.bias = pointer<const void>(bias);
    args_.bias_dtype = to_enum<pc::Dtype>(bias_dtype, 3, "int8_matmul: bias dtype");
    args_.input_scale = pointer<const float>(input_scale);
    args_.input_zero_point = pointer<const int32_t>(input_zero_point);
    args_.n = args_.ldy = n;
  }

  // x: contiguous [M,K]
  void run(uintptr_t x, int64_t m, int64_t k, int dtype, uintptr_t y, int threads) const {
    run_strided(x, {m, k, m > 0 ? m : 1, 0, k, 1}, dtype, y, threads);
  }

  void run_strided(uintptr_t x, const pc::bindings::RowLayout& layout, int dtype, uintptr_t y, int threads) const {
    const im::Args args = with_rows(args_, x, layout, dtype, y, threads, "int8_matmul: dtype");
    py::gil_scoped_release release;
    im::run(args, prepared_);
  }

 private:
  im::Args args_;
  im::Prepared prepared_;
};

sl::Bitmap to_bitmap(uintptr_t bits, uintptr_t values, uintptr_t row_start, int64_t n, int64_t k, int weight_type) {
  return {to_enum<sl::WeightType>(weight_type, 3, "sparse_linear: weight type"),
          n,
          k,
          pointer<const uint8_t>(bits),
          pointer<const void>(values),
          pointer<const int64_t>(row_start)};
}

// As Int8Plan, for both forms of a pruned weight; index_bytes 0: there is no index form.
class SparsePlan {
 public:
  SparsePlan(int weight_type, int64_t n, int64_t k, uintptr_t weight_scale, uintptr_t bias, int bias_dtype,
             int activation, uintptr_t bits, uintptr_t values, uintptr_t row_start, uintptr_t index,
             int64_t index_bytes)
      : bitmap_(to_bitmap(bits, values, row_start, n, k, weight_type)) {
    if (index != 0) {
      index_ = sl::open_index(pointer<const void>(index), index_bytes);
      pc::check(
          index_.layout->type == bitmap_.type && index_.n == n && index_.k == k && index_.nnz == bitmap_.row_start[n],
          "sparse_linear: the index form is of another weight: N=", index_.n, ", K=", index_.k, ", ", index_.nnz,
          " kept, expected N=", n, ", K=", k, ", ", bitmap_.row_start[n], " kept; pack it again with pack_index");
      kernel_ = &sl::index_kernel_for(index_);
    }
    args_.activation = to_enum<pc::Activation>(activation, 5, "sparse_linear: activation");
    args_.weight_scale = pointer<const float>(weight_scale);
    args_.bias = pointer<const void>(bias);
    args_.bias_dtype = to_enum<pc::Dtype>(bias_dtype, 3, "sparse_linear: bias dtype");
    args_.n = args_.ldy = n;
  }

  // x: contiguous [M,K]
  void run_bitmap(uintptr_t x, int64_t m, int64_t k, int dtype, uintptr_t y, int threads) const {
    run_bitmap_strided(x, {m, k, m > 0 ? m : 1, 0, k, 1}, dtype, y, threads);
  }
  void run_index(uintptr_t x, int64_t m, int64_t k, int dtype, uintptr_t y, int threads) const {
    run_index_strided(x, {m, k, m > 0 ? m : 1, 0, k, 1}, dtype, y, threads);
  }
  void run_bitmap_strided(uintptr_t x, const pc::bindings::RowLayout& layout, int dtype, uintptr_t y,
                          int threads) const {
    const sl::Args args = with_rows(args_, x, layout, dtype, y, threads, "sparse_linear: dtype");
    py::gil_scoped_release release;
    sl::run_bitmap(args, bitmap_);
  }
  void run_index_strided(uintptr_t x, const pc::bindings::RowLayout& layout, int dtype, uintptr_t y,
                         int threads) const {
    pc::check(kernel_ != nullptr, "sparse_linear: this weight has no index form; pack it with pack_index");
    const sl::Args args = with_rows(args_, x, layout, dtype, y, threads, "sparse_linear: dtype");
    py::gil_scoped_release release;
    sl::run_index(args, index_, *kernel_);
  }

 private:
  sl::Args args_;
  sl::Bitmap bitmap_;
  sl::IndexWeight index_{};
  const sl::IndexKernel* kernel_ = nullptr;
};

// The index form, which the caller keeps 64-byte aligned; empty where there is none.
py::bytes pack_index(uintptr_t bits, uintptr_t values, uintptr_t row_start, int64_t n, int64_t k, int weight_type) {
  const sl::Bitmap weight = to_bitmap(bits, values, row_start, n, k, weight_type);
  std::vector<char> packed;
  {
    py::gil_scoped_release release;
    packed = sl::pack_index(sl::best_index_kernel(weight.type).layout, weight);
  }
  return py::bytes(packed.data(), packed.size());
}

py::dict index_info(uintptr_t index, int64_t bytes) {
  const sl::IndexWeight weight = sl::open_index(pointer<const void>(index), bytes);
  py::dict out;
  const sl::IndexKernel* kernel = sl::find_index_kernel(*weight.layout);
  out["kernel"] = kernel == nullptr ? "" : kernel->name;  // packed for another instruction set
  out["n"] = weight.n;
  out["k"] = weight.k;
  out["nnz"] = weight.nnz;
  out["layout"] = weight.layout->id;
  out["gather"] = weight.gather;
  return out;
}

// address, dtype, rows, cols, inner_rows, outer_stride, row_stride, col_stride
using RowsTuple = std::array<int64_t, 8>;

dl::Rows to_rows(const RowsTuple& t) {
  return {pointer<const void>(uintptr_t(t[0])),
          to_enum<pc::Dtype>(int(t[1]), 3, "distill_loss: dtype"),
          t[2],
          t[3],
          t[4],
          t[5],
          t[6],
          t[7]};
}

double distill_loss(const RowsTuple& student, const RowsTuple& teacher, uintptr_t topk_indices,
                    uintptr_t topk_logsumexp, uintptr_t labels, uintptr_t token_weight, int divergence, int reduction,
                    double temperature, double alpha, double beta, double label_smoothing, int64_t ignore_index,
                    double num_items, uintptr_t loss, uintptr_t hard, uintptr_t soft, uintptr_t grad,
                    bool normalize_grad, int threads) {
  dl::Args a;
  a.student = to_rows(student);
  a.teacher = to_rows(teacher);
  a.topk_indices = pointer<const int64_t>(topk_indices);
  a.topk_logsumexp = pointer<const float>(topk_logsumexp);
  a.labels = pointer<const int64_t>(labels);
  a.token_weight = pointer<const float>(token_weight);
  a.divergence = to_enum<dl::Divergence>(divergence, 3, "distill_loss: divergence");
  a.reduction = to_enum<dl::Reduction>(reduction, 3, "distill_loss: reduction");
  a.temperature = temperature;
  a.alpha = alpha;
  a.beta = beta;
  a.label_smoothing = label_smoothing;
  a.ignore_index = ignore_index;
  a.num_items = num_items;
  a.loss = pointer<float>(loss);
  a.hard = pointer<float>(hard);
  a.soft = pointer<float>(soft);
  a.grad = pointer<void>(grad);
  a.normalize_grad = normalize_grad;
  a.threads = threads;
  py::gil_scoped_release release;
  return dl::run(a);
}

struct Pooled {
  pc::dlpack::ManagedTensor managed;
  std::vector<int64_t> shape;
};

void give_back(pc::dlpack::ManagedTensor* managed) {
  Pooled* const pooled = static_cast<Pooled*>(managed->manager);
  pc::pool::give_back(managed->tensor.data);
  delete pooled;
}

// A contiguous tensor of undefined contents in memory of the pool, as a DLPack capsule.
py::capsule pooled_empty(std::vector<int64_t> shape, int dtype) {
  const pc::Dtype type = to_enum<pc::Dtype>(dtype, 3, "empty: dtype");
  size_t bytes = size_t(pc::dtype_size(type));
  for (int64_t size : shape) {
    pc::check(size >= 0, "empty: size ", size, ", expected at least 0");
    pc::check(!__builtin_mul_overflow(bytes, size_t(size), &bytes), "empty: the shape is too large");
  }
  auto pooled = std::make_unique<Pooled>();
  pooled->shape = std::move(shape);
  const auto code = type == pc::Dtype::bf16 ? pc::dlpack::Code::bfloat : pc::dlpack::Code::floating;
  pooled->managed.tensor = {pc::pool::take(bytes),
                            {},
                            int32_t(pooled->shape.size()),
                            {uint8_t(code), uint8_t(8 * pc::dtype_size(type)), 1},
                            pooled->shape.data(),
                            nullptr,
                            0};
  pooled->managed.manager = pooled.get();
  pooled->managed.deleter = give_back;
  // Whoever takes the tensor out renames the capsule, and calls the deleter in the end.
  return py::capsule(&pooled.release()->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    give_back(static_cast<pc::dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
  });
}

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
  out["exp_g"] = rates.exp_g;
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

  py::class_<SparsePlan>(m, "SparsePlan")
      .def(py::init<int, int64_t, int64_t, uintptr_t, uintptr_t, int, int, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                    int64_t>())
      .def("run_bitmap", &SparsePlan::run_bitmap)
      .def("run_index", &SparsePlan::run_index)
      .def("run_bitmap_strided", &SparsePlan::run_bitmap_strided)
      .def("run_index_strided", &SparsePlan::run_index_strided);
  m.def("sparse_scan", [](uintptr_t bits, int64_t n, int64_t k, uintptr_t row_start) {
    return sl::scan_bitmap(pointer<const uint8_t>(bits), n, k, pointer<int64_t>(row_start));
  });
  m.def("sparse_pack_index", &pack_index);
  m.def("sparse_index_info", &index_info);
  m.def("sparse_bitmap_kernel_name", [](int type) {
    return std::string(sl::bitmap_kernel_name(to_enum<sl::WeightType>(type, 3, "sparse_linear: weight type")));
  });

  m.def("pooled_empty", &pooled_empty);
  m.def("pool_kept_bytes", &pc::pool::kept_bytes);
  m.attr("POOL_SMALLEST") = pc::pool::kSmallest;
  m.def("advise_huge_pages",
        [](uintptr_t address, size_t bytes) { pc::advise_huge_pages(pointer<void>(address), bytes); });
  m.def("distill_kernel_name", &dl::kernel_name);
  m.def("distill_loss", &distill_loss, py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("topk_indices"),
        py::arg("topk_logsumexp"), py::arg("labels"), py::arg("token_weight"), py::arg("divergence"),
        py::arg("reduction"), py::arg("temperature"), py::arg("alpha"), py::arg("beta"), py::arg("label_smoothing"),
        py::arg("ignore_index"), py::arg("num_items"), py::arg("loss"), py::arg("hard"), py::arg("soft"),
        py::arg("grad"), py::arg("normalize_grad"), py::arg("threads"));

  pc::bindings::bind_conv(m);
  pc::bindings::bind_embedding(m);
  pc::bindings::bind_int4(m);
}
