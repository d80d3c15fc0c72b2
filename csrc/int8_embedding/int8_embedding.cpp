#include "int8_embedding/int8_embedding.h"

#include <algorithm>

#include "common/check.h"
#include "common/kernel_table.h"
#include "common/parallel.h"

namespace pycompress::int8_embedding {
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

void check_args(const Args& a) {
  check(a.table.v >= 0 && a.table.d >= 0, "int8_embedding: the table is [V=", a.table.v, ", D=", a.table.d, "]");
  check(a.count >= 0 && a.outputs >= 0 && a.threads >= 1, "int8_embedding: ", a.count, " indices, ", a.outputs,
        " outputs, threads=", a.threads);
  check(a.count == 0 || a.index != nullptr, "int8_embedding: the indices are missing");
  check(a.table.v * a.table.d == 0 || (a.table.rows != nullptr && a.table.scale != nullptr),
        "int8_embedding: the table or its scales are missing");
  check(a.outputs * a.table.d == 0 || a.y != nullptr, "int8_embedding: y is missing");
  check(a.weight == nullptr || a.reduce == Reduce::sum, "int8_embedding: weights belong to sum");
  if (a.reduce == Reduce::rows) {
    check(a.outputs == a.count && a.offset == nullptr, "int8_embedding: rows gives a row an index, ", a.outputs,
          " rows for ", a.count, " indices");
  } else if (a.offset == nullptr) {
    check(a.bag_size >= 0 && a.bag_size * a.outputs == a.count, "int8_embedding: ", a.outputs, " bags of ", a.bag_size,
          " are not ", a.count, " indices");
  }
}

void check_indices(const Args& a) {
  // One comparison an index: a negative one is a large unsigned one. The second loop only says which.
  bool inside = true;
  const auto v = uint64_t(a.table.v);
  if (a.wide) {
    const auto* const index = static_cast<const int64_t*>(a.index);
    for (int64_t i = 0; i < a.count; ++i) inside &= uint64_t(index[i]) < v;
  } else {
    const auto* const index = static_cast<const int32_t*>(a.index);
    for (int64_t i = 0; i < a.count; ++i) inside &= uint64_t(int64_t(index[i])) < v;
  }
  for (int64_t i = 0; !inside; ++i) {
    const int64_t value = whole(a.index, a.wide, i);
    if (uint64_t(value) < v) continue;
    throw IndexError("int8_embedding: index " + std::to_string(value) + " (at position " + std::to_string(i) +
                     ") is out of range for a table of V=" + std::to_string(v) + " rows, expected 0 to V-1");
  }
}

void check_offsets(const Args& a) {
  if (a.offset == nullptr) return;
  int64_t before = 0;
  for (int64_t b = 0; b < a.outputs; ++b) {
    const int64_t at = whole(a.offset, a.wide, b);
    check(b > 0 || at == 0, "int8_embedding_bag: offsets[0]=", at, ", expected 0, where the first bag starts");
    check(at >= before, "int8_embedding_bag: offsets[", b, "]=", at, " is less than the one before it, ", before,
          "; offsets must not fall");
    check(at <= a.count, "int8_embedding_bag: offsets[", b, "]=", at, " is beyond the ", a.count, " indices");
    before = at;
  }
}

// The first bag of share i: bags are divided so that the shares have nearly as many indices each.
int64_t first_output(const Args& a, int parts, int i) {
  if (a.offset == nullptr || i == 0 || i == parts) return split(a.outputs, parts, i).begin;
  const int64_t wanted = split(a.count, parts, i).begin;
  int64_t low = 0, high = a.outputs;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (bag_begin(a, middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Bytes read and written for which a thread is worth waking: about 3 us of work at the rate of one thread.
constexpr int64_t kBytesAThread = 64 << 10;

int choose_threads(const Args& a) {
  const int64_t bytes = a.table.d * (a.count + a.outputs * dtype_size(a.dtype));
  return int(
      std::clamp<int64_t>(bytes / kBytesAThread, 1, std::min<int64_t>(a.threads, std::max<int64_t>(a.outputs, 1))));
}

}  // namespace

const Kernel& best_kernel() { return best_of(kKernels); }

void run(const Args& a) {
  check_args(a);
  check_offsets(a);
  check_indices(a);
  if (a.outputs == 0 || a.table.d == 0) return;
  const Kernel& kernel = best_kernel();
  const int threads = choose_threads(a);
  parallel(threads, [&](int i) { kernel.run(a, {first_output(a, threads, i), first_output(a, threads, i + 1)}); });
}

}  // namespace pycompress::int8_embedding
