#include "int8_matmul/cuda.h"
#include "sparse_linear/check_args.h"
#include "sparse_linear/cuda_launch.h"

namespace pycompress::sparse_linear {

void check_cuda_args(const CudaArgs& a, WeightType type, int64_t n, int64_t k, int64_t workspace_bytes) {
  check_args(a, type, n, k);
  check(a.m < int64_t(1) << 31, "sparse_linear: M=", a.m, " is more rows than one launch can count");
  check(k <= kMaxCudaK, "sparse_linear: K=", k, " is more than the CUDA kernels take, ", kMaxCudaK);
  check(a.workspace_bytes >= workspace_bytes && (workspace_bytes == 0 || a.workspace != nullptr),
        "sparse_linear: the workspace has ", a.workspace_bytes, " bytes, expected ", workspace_bytes);
  check_aligned(a.workspace, 16, "workspace");
}

void check_aligned(const void* pointer, int alignment, const char* what) {
  check(reinterpret_cast<uintptr_t>(pointer) % uintptr_t(alignment) == 0, "sparse_linear: ", what,
        " does not begin at a multiple of ", alignment, " bytes; pass a clone of it");
}

namespace {

int64_t q_bytes(const LinearArgs& a) { return (a.m * int8_matmul::padded_k(a.k) + 15) / 16 * 16; }

}  // namespace

int64_t quantized_bytes(const LinearArgs& a) { return a.m == 0 ? 0 : q_bytes(a) + a.m * int64_t(sizeof(float)); }

Quantized quantize(const CudaArgs& a, const cuda::Place& place) {
  auto* q = static_cast<int8_t*>(a.workspace);
  auto* scale = reinterpret_cast<float*>(q + q_bytes(a));
  int8_matmul::launch_quantize_rows("sparse_linear", a, nullptr, nullptr, q, scale, place);
  return {q, scale, int8_matmul::padded_k(a.k)};
}

}  // namespace pycompress::sparse_linear
