#include "int8_matmul/int8_matmul.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "common/kernel_table.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace pycompress::int8_matmul {
namespace {

// Best first; the one place that decides.
constexpr const Kernel* kKernels[] = {
#ifdef PYCOMPRESS_HAVE_AVX512VNNI
    &kAvx512Vnni,
#endif
#ifdef PYCOMPRESS_HAVE_AVXVNNI
    &kAvxVnni,
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    &kAvx512,
#endif
#ifdef PYCOMPRESS_HAVE_AVX2
    &kAvx2,
#endif
    &kScalar,
};

void check_args(const Args& a, const PackedWeight& w) {
  check(a.m >= 0 && a.threads >= 1, "int8_matmul: M=", a.m, ", threads=", a.threads);
  check(a.k == w.k, "int8_matmul: x has K=", a.k, " but weight has K=", w.k);
  check(a.n == w.n, "int8_matmul: y has N=", a.n, " but weight has N=", w.n);
  check(a.inner_rows >= 1, "int8_matmul: inner_rows=", a.inner_rows, ", expected at least 1");
  check(a.m * a.n == 0 || (a.y != nullptr && a.weight_scale != nullptr), "int8_matmul: y or weight_scale is missing");
  check(a.m * a.k == 0 || a.x != nullptr, "int8_matmul: x is missing");
  check(a.ldy >= a.n, "int8_matmul: ldy=", a.ldy, " is less than N=", a.n);
  if (a.mode == Mode::static_) {
    check(a.input_scale != nullptr && a.input_zero_point != nullptr,
          "int8_matmul: static mode needs input_scale and input_zero_point");
    const float scale = *a.input_scale;
    check(std::isnormal(scale) && scale > 0, "int8_matmul: input_scale=", scale, ", expected a positive normal number");
    const int32_t zero_point = *a.input_zero_point;
    check(zero_point >= 0 && zero_point <= 255, "int8_matmul: input_zero_point=", zero_point, ", expected 0 to 255");
  } else {
    check(a.input_scale == nullptr && a.input_zero_point == nullptr,
          "int8_matmul: input_scale and input_zero_point belong to static mode");
  }
}

constexpr int64_t kMaxLanes = 16;  // the widest register, in floats

struct Grid {
  int rows, panels;  // threads along M and along N
};

// Nanoseconds one thread needs for its share. Measured on a Zen 5 server; only the ratios matter.
double share_cost(double rows, double outputs, double k) {
  const double bytes = outputs * k;
  const double rate = bytes < (1 << 20) ? 150 : bytes < (16 << 20) ? 90 : 30;  // bytes a ns: from L2, L3, memory
  const double multiply = rows * outputs * k / 300;                            // products a ns
  const double prepare = rows * k / 10;                                        // every thread prepares its rows itself
  return std::max(multiply, bytes / rate) + prepare + rows * outputs / 20;
}

Grid choose_grid(const Args& a, const Layout& layout) {
  constexpr double kForkCost = 3000;  // nanoseconds to wake a team and to wait for it
  const int64_t panels = panel_count(layout, a.n);
  Grid best{1, 1};
  double best_cost = share_cost(double(a.m), double(a.n), double(a.k));
  for (int rows = 1; rows <= a.threads && rows <= a.m; ++rows) {
    const int across = int(std::min<int64_t>(a.threads / rows, panels));
    if (rows * across == 1) continue;
    const double cost = kForkCost + share_cost(double((a.m + rows - 1) / rows),
                                               double((panels + across - 1) / across * layout.nr), double(a.k));
    if (cost < best_cost) {
      best = {rows, across};
      best_cost = cost;
    }
  }
  return best;
}

// `values` where the kernels can load it as it is (f32, whole registers), else a widened copy padded with zeros.
const float* whole_registers(const void* values, Dtype dtype, int64_t n, int64_t padded, float* copy) {
  if (values != nullptr && dtype == Dtype::f32 && n == padded) return static_cast<const float*>(values);
  for (int64_t i = 0; i < n && values != nullptr; ++i) copy[i] = load_float(values, i, dtype);
  std::fill(copy + (values == nullptr ? 0 : n), copy + padded, 0.0f);
  return copy;
}

}  // namespace

const Kernel& best_kernel() { return best_of(kKernels); }
const Kernel& kernel_for(const Layout& layout) { return best_for(kKernels, layout); }

Prepared prepare(const void* packed, int64_t bytes) {
  const PackedWeight weight = open_packed(packed, bytes);
  return {weight, &kernel_for(*weight.layout)};
}

void run(const Args& a, const Prepared& prepared) {
  const PackedWeight& weight = prepared.weight;
  const Kernel& kernel = *prepared.kernel;
  check_args(a, weight);
  if (a.m == 0 || a.n == 0) return;

  const Grid grid = choose_grid(a, *weight.layout);
  const int threads = grid.rows * grid.panels;

  // One reservation by the calling thread, so that nothing inside the team can fail.
  const int64_t padded = (a.n + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  const int64_t columns = align(padded * 4), share = align(kernel.scratch_bytes(a.mode, a.k));
  char* scratch = thread_scratch().reserve(size_t(2 * columns + threads * share));
  const float* scale = whole_registers(a.weight_scale, Dtype::f32, a.n, padded, reinterpret_cast<float*>(scratch));
  const float* bias = whole_registers(a.bias, a.bias_dtype, a.n, padded, reinterpret_cast<float*>(scratch + columns));

  const bool is_static = a.mode == Mode::static_;
  const float input_scale = is_static ? *a.input_scale : 0.0f;
  const int32_t zero_point = is_static ? *a.input_zero_point - 128 : 0;
  const int64_t panels = panel_count(*weight.layout, a.n);
  parallel(threads, [&](int i) {
    kernel.run({&a, weight, bias, scale, input_scale, zero_point, split(a.m, grid.rows, i / grid.panels),
                split(panels, grid.panels, i % grid.panels), scratch + 2 * columns + i * share});
  });
}

}  // namespace pycompress::int8_matmul
