// pybind11 for the int8 embedding.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "int8_embedding/int8_embedding.h"

namespace py = pybind11;
namespace pc = pycompress;
namespace ie = pycompress::int8_embedding;

namespace {

using pc::bindings::pointer;
using pc::bindings::to_enum;

// A table, as addresses that the caller keeps alive.
class EmbeddingPlan {
 public:
  EmbeddingPlan(uintptr_t rows, int64_t v, int64_t d, uintptr_t scale) {
    args_.table = {pointer<const int8_t>(rows), pointer<const float>(scale), v, d};
  }

  void run_rows(uintptr_t index, bool wide, int64_t count, int dtype, uintptr_t y, int threads) const {
    ie::Args args = with_index(index, wide, count, dtype, y, threads);
    args.outputs = count;
    py::gil_scoped_release release;
    ie::run(args);
  }

  void run_bags(uintptr_t index, bool wide, int64_t count, uintptr_t offset, int64_t bags, int reduce, int64_t padding,
                uintptr_t weight, int dtype, uintptr_t y, int threads) const {
    ie::Args args = with_index(index, wide, count, dtype, y, threads);
    args.reduce = to_enum<ie::Reduce>(reduce, 4, "int8_embedding_bag: mode");
    args.offset = pointer<const void>(offset);
    args.bag_size = bags > 0 ? count / bags : 0;
    args.outputs = bags;
    args.padding = padding;
    args.weight = pointer<const float>(weight);
    py::gil_scoped_release release;
    ie::run(args);
  }

 private:
  ie::Args with_index(uintptr_t index, bool wide, int64_t count, int dtype, uintptr_t y, int threads) const {
    ie::Args args = args_;
    args.index = pointer<const void>(index);
    args.wide = wide;
    args.count = count;
    args.y = pointer<void>(y);
    args.dtype = to_enum<pc::Dtype>(dtype, 3, "int8_embedding: dtype");
    args.threads = threads;
    return args;
  }

  ie::Args args_;
};

}  // namespace

void pc::bindings::bind_embedding(py::module_& m) {
  py::class_<EmbeddingPlan>(m, "EmbeddingPlan")
      .def(py::init<uintptr_t, int64_t, int64_t, uintptr_t>())
      .def("run_rows", &EmbeddingPlan::run_rows)
      .def("run_bags", &EmbeddingPlan::run_bags);
  m.def("embedding_kernel_name", [] { return std::string(ie::best_kernel().name); });
}
