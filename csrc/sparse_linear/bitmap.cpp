#include "sparse_linear/bitmap.h"

#include <algorithm>

#include <cstring>

#include "common/memory.h"
#include "common/parallel.h"
#include "sparse_linear/check_args.h"

namespace pycompress::sparse_linear {
namespace {

struct File {  // the kernels of one instruction set
  const BitmapKernel* kernels;
  int count;
};

// Best first; the one place that decides.
const File kFiles[] = {
#ifdef PYCOMPRESS_HAVE_AVX512VBMI2
    {kBitmapAvx512Vbmi2, 2},
#endif
#ifdef PYCOMPRESS_HAVE_AVX512VNNI
    {kBitmapAvx512Vnni, 1},
#endif
#ifdef PYCOMPRESS_HAVE_AVXVNNI
    {kBitmapAvxVnni, 1},
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    {kBitmapAvx512, 3},
#endif
#ifdef PYCOMPRESS_HAVE_AVX2
    {kBitmapAvx2, 3},
#endif
    {kBitmapScalar, 3},
};

const BitmapKernel& best_kernel(WeightType type) {
  for (const File& file : kFiles) {
    for (const BitmapKernel* kernel = file.kernels; kernel < file.kernels + file.count; ++kernel) {
      if (kernel->type == type && isa_usable(kernel->isa) && (!kernel->vbmi2 || cpu_has_vbmi2())) return *kernel;
    }
  }
  return kBitmapScalar[int(type)];
}

// Nanoseconds one thread needs for all outputs. Measured on a Zen 5 server; only the ratios matter.
double cost(const Args& a, const Bitmap& w) {
  const double dense = double(w.n) * double(w.k), kept = double(w.row_start[w.n]);
  const double bytes = dense / 8 + kept * weight_size(w.type);
  const double rate = bytes < (1 << 20) ? 60 : bytes < (16 << 20) ? 40 : 20;  // bytes a ns: from L2, L3, memory
  const double columns = w.type == WeightType::s8 ? 80 : 25;                  // expanded a ns
  const double groups = double((a.m + kBitmapTokens - 1) / kBitmapTokens);
  return groups * std::max(bytes / rate, dense / columns) + double(a.m) * dense / 200 + double(a.m * w.n) / 20;
}

int thread_count(const Args& a, const Bitmap& w) {
  constexpr double kForkCost = 3000;  // nanoseconds to wake a team and to wait for it
  const int threads = int(std::min<int64_t>(a.threads, (w.n + kBitmapUnit - 1) / kBitmapUnit));
  const double alone = cost(a, w);
  return alone / threads + kForkCost < alone ? threads : 1;
}

}  // namespace

int64_t scan_bitmap(const uint8_t* bits, int64_t n, int64_t k, int64_t* row_start) {
  const int64_t row_bytes = (k + 7) / 8;
  const unsigned behind = k % 8 == 0 ? 0u : 0xffu << (k % 8) & 0xffu;  // bits of the last byte
  row_start[0] = 0;
  for (int64_t row = 0; row < n; ++row, bits += row_bytes) {
    check(behind == 0 || (bits[row_bytes - 1] & behind) == 0, "sparse_linear: weight_bitmap has a bit set behind K=", k,
          " in row ", row, "; bits behind K must be 0");
    int64_t count = 0, i = 0;
    for (; i + 8 <= row_bytes; i += 8) {
      uint64_t word;
      std::memcpy(&word, bits + i, sizeof word);
      count += __builtin_popcountll(word);
    }
    for (; i < row_bytes; ++i) count += __builtin_popcount(bits[i]);
    row_start[row + 1] = row_start[row] + count;
  }
  return row_start[n];
}

void run_bitmap(const Args& a, const Bitmap& w) {
  check_args(a, w.type, w.n, w.k);
  if (a.m == 0 || a.n == 0) return;
  check(w.row_start != nullptr, "sparse_linear: row_start is missing");
  check(w.k == 0 || w.bits != nullptr, "sparse_linear: weight_bitmap is missing");
  check(w.row_start[w.n] == 0 || w.values != nullptr, "sparse_linear: weight_values is missing");

  // One reservation by the calling thread, so that nothing inside the team can fail.
  const BitmapKernel& kernel = best_kernel(w.type);
  const int threads = thread_count(a, w);
  const int64_t units = (a.n + kBitmapUnit - 1) / kBitmapUnit, padded = units * kBitmapUnit;
  const int64_t columns = align(padded * 4), share = align(kernel.scratch_bytes(a.m, a.k));
  char* scratch = thread_scratch().reserve(size_t(2 * columns + threads * share));
  auto* copy = reinterpret_cast<float*>(scratch);
  const float* bias = padded_floats(a.bias, a.bias_dtype, a.n, padded, reinterpret_cast<float*>(scratch + columns));
  const float* scale = copy;
  if (w.type == WeightType::s8) {
    scale = padded_floats(a.weight_scale, Dtype::f32, a.n, padded, copy);
  } else {
    std::fill(copy, copy + padded, 1.0f);
  }
  parallel(threads, [&](int i) {
    const Range part = split(units, threads, i);
    kernel.run({&a,
                &w,
                bias,
                scale,
                {part.begin * kBitmapUnit, std::min(part.end * kBitmapUnit, a.n)},
                scratch + 2 * columns + i * share});
  });
}

const char* bitmap_kernel_name(WeightType type) { return best_kernel(type).name; }

}  // namespace pycompress::sparse_linear
