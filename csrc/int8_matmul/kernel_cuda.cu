// What comes before and after the products: x quantised by rows, and the sums of a split K added up. See cuda.h.
#include <algorithm>

#include "int8_matmul/cuda.h"
#include "int8_matmul/cuda_finish.cuh"

namespace pycompress::int8_matmul {
namespace {

// ---- quantize_rows: a block a row ---------------------------------------------------------------------------------

constexpr int kHeldUnits = 4;  // of a thread in registers
constexpr int kMaxWarps = 16;  // so K up to 16384 is read once; 32 warps would leave a thread too few registers for it

struct QuantizeParams {
  Rows rows;
  Quantization how;
  Global<int8_t> q;  // [m, padded_k]
  int64_t padded_k;
  Global<float> x_scale;
};

// One block a multiprocessor: without that ptxas stops at 64 registers and spills.
template <Dtype D>
__global__ void __launch_bounds__(kMaxWarps* cuda::kWarp, 1) quantize_rows(QuantizeParams p) {
  const auto m = static_cast<int>(blockIdx.x);
  const int64_t begin = row_begin(p.rows, m);
  const int64_t stride = int64_t(blockDim.x) * kUnit, first = int64_t(threadIdx.x) * kUnit;
  float held[kHeldUnits][kUnit];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeldUnits; ++i) {
    load_unit<D>(p.rows, begin, first + i * stride, held[i]);
    largest = max(largest, largest_magnitude(held[i]));
  }
  for (int64_t k = first + kHeldUnits * stride; k < p.rows.k; k += stride) {
    float unit[kUnit];
    load_unit<D>(p.rows, begin, k, unit);
    largest = max(largest, largest_magnitude(unit));
  }
  largest = cuda::block_reduce(
      largest, 0u, [](uint32_t a, uint32_t b) { return max(a, b); },
      reinterpret_cast<uint32_t*>(cuda::dynamic_shared()));

  const RowScale row = row_scale(p.how, largest);
  const Grid grid = grid_of(p.how);
  if (threadIdx.x == 0) p.x_scale.store(m, row.scale);
  const Global<int8_t> q = p.q + m * p.padded_k;
#pragma unroll
  for (int i = 0; i < kHeldUnits; ++i) {
    const int64_t k = first + i * stride;
    if (k < p.padded_k) q.store_as<uint2>(k, quantize_unit(grid, row.inverse, held[i], p.rows.k - k));
  }
  for (int64_t k = first + kHeldUnits * stride; k < p.padded_k; k += stride) {
    float unit[kUnit];
    load_unit<D>(p.rows, begin, k, unit);
    q.store_as<uint2>(k, quantize_unit(grid, row.inverse, unit, p.rows.k - k));
  }
}

// ---- add_splits: a thread 4 columns -------------------------------------------------------------------------------

struct AddParams {
  Finish finish;
  Global<const char> partials;  // [splits, m, columns], s32 or f32
  int splits;
  int64_t columns;
  Global<const float> x_scale;  // null: the sums are float
};

constexpr int kAddThreads = 128;

template <Dtype D>
__device__ inline void finish_columns(const AddParams& p, int64_t m, int64_t n, float (&v)[4]) {
  const float x_scale = p.x_scale.is_null() ? 1.0f : p.x_scale.load(m);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i < p.finish.n) v[i] = scaled(v[i], p.finish.weight_scale.load(n + i), x_scale, load_bias(p.finish, n + i));
  }
  activate(v, p.finish.activation);
  store_columns<D>(p.finish, m, n, v);
}

__global__ void __launch_bounds__(kAddThreads) add_splits(AddParams p) {
  const int64_t fours = p.columns / 4, index = int64_t(blockIdx.x) * kAddThreads + threadIdx.x;
  const int64_t m = index / fours, n = index % fours * 4;
  if (m >= p.finish.m) return;
  float v[4] = {0, 0, 0, 0};
  if (p.x_scale.is_null()) {
    for (int split = 0; split < p.splits; ++split) {
      const float4 part = p.partials.load_as<float4>(((split * p.finish.m + m) * p.columns + n) * 4);
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
  } else {
    int64_t sum[4] = {0, 0, 0, 0};
    for (int split = 0; split < p.splits; ++split) {
      const int4 part = p.partials.load_as<int4>(((split * p.finish.m + m) * p.columns + n) * 4);
      sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
    }
    for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(sum[i]);
  }
  switch (p.finish.dtype) {
    case Dtype::f32: finish_columns<Dtype::f32>(p, m, n, v); return;
    case Dtype::bf16: finish_columns<Dtype::bf16>(p, m, n, v); return;
    default: finish_columns<Dtype::f16>(p, m, n, v); return;
  }
}

using QuantizeKernel = void (*)(QuantizeParams);

QuantizeKernel quantize_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return quantize_rows<Dtype::f32>;
    case Dtype::bf16: return quantize_rows<Dtype::bf16>;
    default: return quantize_rows<Dtype::f16>;
  }
}

}  // namespace

void launch_quantize_rows(const char* op, const LinearArgs& x, const float* input_scale,
                          const int32_t* input_zero_point, int8_t* q, float* x_scale, const cuda::Place& place) {
  const QuantizeParams params{rows_of(x), {input_scale, input_zero_point}, q, padded_k(x.k), x_scale};
  const int64_t threads = std::max<int64_t>(cuda::ceil_div(x.k, kUnit * kHeldUnits), 1);
  const auto warps = static_cast<unsigned>(std::min<int64_t>(cuda::ceil_div(threads, cuda::kWarp), kMaxWarps));
  const cuda::Shape shape{dim3(static_cast<unsigned>(x.m)), dim3(warps * cuda::kWarp), 4 * kMaxWarps};
  cuda::launch(op, "quantize_rows", quantize_kernel(x.dtype), place, shape, params);
}

void launch_add_splits(const CudaArgs& args, const Plan& plan, const Workspace& workspace, const cuda::Place& place) {
  const AddParams params{finish_of(args), static_cast<const char*>(workspace.partials), static_cast<int>(plan.splits),
                         partial_columns(args.n), workspace.x_scale};
  const int64_t blocks = cuda::ceil_div(args.m * (partial_columns(args.n) / 4), kAddThreads);
  const cuda::Shape shape{dim3(static_cast<unsigned>(blocks)), dim3(kAddThreads)};
  cuda::launch("int8_linear", "add_splits", add_splits, place, shape, params);
}

}  // namespace pycompress::int8_matmul
