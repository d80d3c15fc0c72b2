#include "sparse_linear/index.h"

#include <algorithm>
#include <cmath>

#include "common/memory.h"
#include "common/parallel.h"
#include "sparse_linear/check_args.h"

namespace pycompress::sparse_linear {
namespace {

struct File {  // the kernels of one instruction set
  const IndexKernel* kernels;
  int count;
};

// Best first; the one place that decides.
const File kFiles[] = {
#ifdef PYCOMPRESS_HAVE_AVX512VNNI
    {kIndexAvx512Vnni, 1},
#endif
#ifdef PYCOMPRESS_HAVE_AVXVNNI
    {kIndexAvxVnni, 1},
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    {kIndexAvx512, 3},
#endif
#ifdef PYCOMPRESS_HAVE_AVX2
    {kIndexAvx2, 3},
#endif
    {kIndexScalar, 3},
};

template <class Wanted>
const IndexKernel* find_kernel(const Wanted& wanted) {
  for (const File& file : kFiles) {
    for (int i = 0; i < file.count; ++i) {
      if (wanted(file.kernels[i]) && isa_usable(file.kernels[i].isa)) return file.kernels + i;
    }
  }
  return nullptr;
}

// ---- sharing the work out --------------------------------------------------------------------------------------

int64_t strip_count(int64_t n) { return (n + kStrip - 1) / kStrip; }

struct Grid {
  int tokens, strips;  // threads along M and along N
};

// Nanoseconds one thread needs for its share. Measured on a Zen 5 server; only the ratios matter.
double share_cost(const Args& a, const IndexWeight& w, double registers, double part, int lanes) {
  const bool integer = w.layout->type == WeightType::s8;
  const double panels = std::ceil(registers / 4);
  const double fill = registers * lanes * double(a.k) * (integer ? 0.06 : 0.12);
  // A value is broadcast once a panel, and then meets each of its registers: a narrow panel is the dearer one.
  const double a_value = integer ? 0.2 * panels + 0.1 * registers : 0.1 * panels + 0.28 * registers;
  const double walk = double(w.strips[strip_count(w.n)].value) * part * a_value;
  const double finish = registers * lanes * double(a.n) * part * 0.08;
  return fill + walk + finish;
}

Grid choose_grid(const Args& a, const IndexWeight& w, int lanes) {
  constexpr double kForkCost = 3000;  // nanoseconds to wake a team and to wait for it
  const int64_t registers = (a.m + lanes - 1) / lanes, strips = strip_count(w.n);
  Grid best{1, 1};
  double best_cost = share_cost(a, w, double(registers), 1, lanes);
  for (int tokens = 1; tokens <= a.threads && tokens <= registers; ++tokens) {
    const int across = int(std::min<int64_t>(a.threads / tokens, strips));
    if (tokens * across <= 1) continue;
    const double share = double((registers + tokens - 1) / tokens);
    const double cost = kForkCost + share_cost(a, w, share, 1.0 / across, lanes);
    if (cost < best_cost) {
      best = {tokens, across};
      best_cost = cost;
    }
  }
  return best;
}

// Part `i` of `parts` of the strips, with equally many values in each.
Range split_strips(const IndexWeight& w, int parts, int i) {
  const int64_t strips = strip_count(w.n);
  const auto boundary = [&](int j) {
    if (j == 0) return int64_t(0);
    if (j == parts) return strips;
    // Finishing a strip takes as long as some values: without it, empty strips would all go to one thread.
    constexpr int64_t kFinish = 256;
    const int64_t goal = (w.strips[strips].value + kFinish * strips) / parts * j;
    int64_t low = 0, high = strips;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (w.strips[middle].value + kFinish * middle < goal) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  return {boundary(i), boundary(i + 1)};
}

}  // namespace

const IndexKernel& best_index_kernel(WeightType type) {
  return *find_kernel([&](const IndexKernel& kernel) { return kernel.layout.type == type; });
}

const IndexKernel* find_index_kernel(const IndexLayout& layout) {
  return find_kernel([&](const IndexKernel& candidate) { return candidate.layout.id == layout.id; });
}

const IndexKernel& index_kernel_for(const IndexWeight& weight) {
  const IndexKernel* kernel = find_index_kernel(*weight.layout);
  check(kernel != nullptr, "sparse_linear: the index form was packed for another instruction set than ",
        isa_name(selected_isa()), "; pack it again from the bitmap");
  return *kernel;
}

void run_index(const Args& a, const IndexWeight& weight, const IndexKernel& kernel) {
  check_args(a, weight.layout->type, weight.n, weight.k);
  if (a.m == 0 || a.n == 0) return;
  const Grid grid = choose_grid(a, weight, kernel.lanes);
  const int threads = grid.tokens * grid.strips;

  // One reservation by the calling thread, so that nothing inside the team can fail.
  const int64_t padded = strip_count(a.n) * kStrip;
  const int64_t columns = align(padded * 4), share = align(kernel.scratch_bytes(a, weight));
  char* scratch = thread_scratch().reserve(size_t(2 * columns + threads * share));
  const float* scale = padded_floats(a.weight_scale, Dtype::f32, a.n, padded, reinterpret_cast<float*>(scratch));
  const float* bias = padded_floats(a.bias, a.bias_dtype, a.n, padded, reinterpret_cast<float*>(scratch + columns));
  const int64_t registers = (a.m + kernel.lanes - 1) / kernel.lanes;
  parallel(threads, [&](int i) {
    const Range part = split(registers, grid.tokens, i / grid.strips);
    const Range tokens{part.begin * kernel.lanes, std::min(part.end * kernel.lanes, a.m)};
    kernel.run({&a, &weight, bias, scale, tokens, split_strips(weight, grid.strips, i % grid.strips),
                scratch + 2 * columns + i * share});
  });
}

}  // namespace pycompress::sparse_linear
