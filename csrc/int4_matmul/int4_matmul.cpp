#include "int4_matmul/int4_matmul.h"

#include <algorithm>

#include "common/check.h"
#include "common/kernel_table.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace pycompress::int4_matmul {
namespace {

// Best first; the one place that decides.
constexpr const Kernel* kKernels[] = {
#ifdef PYCOMPRESS_HAVE_AVX512
    &kAvx512,
#endif
#ifdef PYCOMPRESS_HAVE_AVX2
    &kAvx2,
#endif
    &kScalar,
};

void check_args(const Args& a, const Shape& w) {
  check(a.m >= 0 && a.threads >= 1, "int4_matmul: M=", a.m, ", threads=", a.threads);
  check(a.k == w.k, "int4_matmul: x has K=", a.k, " but weight has K=", w.k);
  check(a.n == w.n, "int4_matmul: y has N=", a.n, " but weight has N=", w.n);
  check(a.inner_rows >= 1, "int4_matmul: inner_rows=", a.inner_rows, ", expected at least 1");
  check(a.m * a.n == 0 || a.y != nullptr, "int4_matmul: y is missing");
  check(a.m * a.k == 0 || a.x != nullptr, "int4_matmul: x is missing");
  check(a.ldy >= a.n, "int4_matmul: ldy=", a.ldy, " is less than N=", a.n);
  check(a.weight_scale == nullptr, "int4_matmul: the packed weight holds the scales; weight_scale must be null");
}

constexpr int64_t kMaxLanes = 16;  // the widest register, in floats

struct Grid {
  int rows, panels;  // threads along M and along N
};

// Nanoseconds one thread needs for its share. Measured on a Zen 5 server; only the ratios matter.
double share_cost(double rows, double outputs, double k) {
  const double bytes = outputs * k * 0.53;
  const double rate = bytes < (16 << 20) ? 50 : 30;  // bytes a ns: as fast as they are decoded, from memory
  const double multiply = std::max(rows * outputs * k / 60, bytes / rate);  // products a ns
  return multiply + rows * k / 10 + rows * outputs / 20;                    // every thread prepares its rows itself
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
  check_args(a, weight.shape);
  if (a.m == 0 || a.n == 0) return;

  const Grid grid = choose_grid(a, *weight.layout);
  const int threads = grid.rows * grid.panels;

  // One reservation by the calling thread, so that nothing inside the team can fail.
  const int64_t padded = (a.n + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  const int64_t columns = align(padded * 4), share = align(kernel.scratch_bytes(a.m, weight.shape));
  char* scratch = thread_scratch().reserve(size_t(columns + threads * share));
  auto* const bias = reinterpret_cast<float*>(scratch);
  for (int64_t n = 0; n < padded; ++n) {
    bias[n] = a.bias != nullptr && n < a.n ? load_float(a.bias, n, a.bias_dtype) : 0.0f;
  }
  const int64_t panels = panel_count(*weight.layout, a.n);
  parallel(threads, [&](int i) {
    kernel.run({&a, weight, bias, split(a.m, grid.rows, i / grid.panels), split(panels, grid.panels, i % grid.panels),
                scratch + columns + i * share});
  });
}

}  // namespace pycompress::int4_matmul
