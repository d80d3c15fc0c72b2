#include "distill_loss/distill_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/check.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/range.h"
#include "distill_loss/check_args.h"
#include "distill_loss/problem.h"

namespace pycompress::distill_loss {
namespace {

// Best first; the one place that decides.
constexpr const Kernel* kKernels[] = {
#ifdef PYCOMPRESS_HAVE_AVX512BF16
    &kAvx512Bf16,
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    &kAvx512,
#endif
#ifdef PYCOMPRESS_HAVE_AVX2
    &kAvx2,
#endif
    &kScalar,
};

bool usable(const Kernel& kernel) {
#ifdef PYCOMPRESS_HAVE_AVX512BF16
  if (&kernel == &kAvx512Bf16 && !cpu_has_bf16()) return false;
#endif
  return isa_usable(kernel.isa);
}

const Kernel& best_kernel() {
  for (const Kernel* kernel : kKernels) {
    if (usable(*kernel)) return *kernel;
  }
  return kScalar;
}

// A gradient of this size leaves the cache before its reader comes: it is stored past it, which saves reading the lines
// first. Measured at 33 MB: 0.66 of the read bandwidth instead of 0.53. Rows of 1000 classes lose, by 20 %: each begins
// and ends inside a line.
constexpr int64_t kStreamBytes = int64_t(16) << 20;
constexpr int64_t kStreamVocab = kChunk;
constexpr int64_t kClassesAThread = 16384;  // about 5 us of work, twice what waking a thread costs
constexpr int64_t kSegment = 64;            // a row is split between threads at multiples of this

}  // namespace

// One token, its row split between `parts` threads; works: one each.
void Problem::run_token(int64_t token, int parts, Work* works, Totals& totals) const {
  if (skipped(token)) return skip(token);
  const auto part = [&](int i) {
    const Range units = split((vocab_ + kSegment - 1) / kSegment, parts, i);
    return Range{units.begin * kSegment, std::min(units.end * kSegment, vocab_)};
  };
  RowState row;
  parallel(parts, [&](int i) { works[i].sums = sum(token, part(i), works[i]); });
  row.sums = works[0].sums;
  for (int i = 1; i < parts; ++i) {
    merge(sweep_, row.sums.common, works[i].sums.common);
    merge(rest_sweep_, row.sums.rest, works[i].sums.rest);
  }
  finish(token, row, works[0]);
  if (two_sweeps_) {
    parallel(parts, [&](int i) { works[i].moments = moment(token, part(i), row.result.common, works[i]); });
    Moments total;
    for (int i = 0; i < parts; ++i) {
      total.p += works[i].moments.p;
      total.q += works[i].moments.q;
    }
    finish_jsd(formula_, row.sums.common, total, gain(token), row.result);
  }
  output(token, row.result.hard, row.result.soft, totals);
  if (a_.grad == nullptr) return;
  if (formula_.hard) row.label_value = label_gradient(token, row.result);
  parallel(parts, [&](int i) { gradient(token, part(i), row.result, works[i]); });
  corrections(token, row, works[0]);
}

// Rows from `token` on that one call of short_rows takes, at most `most`; returns how many.
int64_t Problem::run_lanes(int64_t token, int64_t most, Totals& totals) const {
  alignas(64) float hard_gain[16] = {}, soft_gain[16] = {}, hard[16], divergence[16];
  int64_t label[16];
  const Rows &s = a_.student, &t = a_.teacher;
  // Rows that follow each other at one stride: up to the end of a group of either operand.
  const auto in_group = [&](const Rows& rows) { return rows.inner_rows - token % rows.inner_rows; };
  most = std::min({most, int64_t(kernel_.lanes), in_group(s), dense_teacher_ ? in_group(t) : most});
  const int n = int(most);
  for (int i = 0; i < n; ++i) {
    if (skipped(token + i)) {
      label[i] = 0;
      hard_gain[i] = soft_gain[i] = 0;
      continue;
    }
    const double g = gain(token + i);
    hard_gain[i] = float(a_.alpha * g);
    soft_gain[i] = float((1 - a_.alpha) * a_.temperature * g);
    label[i] = formula_.hard ? a_.labels[token + i] : 0;
  }
  const auto at = [&](const Rows& rows) {
    return static_cast<const char*>(rows.data) + rows.offset(token) * dtype_size(rows.dtype);
  };
  kernel_.short_rows(sweep_,
                     {n, vocab_, at(s), dense_teacher_ ? at(t) : nullptr, s.row_stride, t.row_stride, label, hard_gain,
                      soft_gain, hard, divergence, a_.grad == nullptr ? nullptr : grad_at(token, 0)});
  for (int i = 0; i < n; ++i) {
    if (skipped(token + i)) {
      skip(token + i);
      continue;
    }
    const double of_label = formula_.hard ? hard[i] : 0;
    const double of_teacher = formula_.soft ? a_.temperature * a_.temperature * divergence[i] : 0;
    output(token + i, of_label, of_teacher, totals);
    if (a_.grad != nullptr && std::isnan(of_label + of_teacher)) nan_gradient(token + i, {0, vocab_});
  }
  return n;
}

void Problem::run_short(Range tokens, Totals& totals) const {
  for (int64_t token = tokens.begin; token < tokens.end;) token += run_lanes(token, tokens.end - token, totals);
}

void Problem::run() {
  const int64_t tokens = a_.student.rows;
  const int64_t most = std::max<int64_t>(1, tokens * vocab_ / kClassesAThread);
  const int threads = int(std::min<int64_t>(a_.threads, most));
  // Tokens are shared out; a few long rows are split instead.
  const bool by_token = tokens >= 2 * threads || vocab_ < 2 * kClassesAThread;
  const int64_t bytes = tokens * vocab_ * dtype_size(a_.student.dtype);
  const bool in_place = a_.grad == a_.student.data;
  stream_ = bytes >= kStreamBytes && vocab_ >= kStreamVocab && !in_place;
  if (a_.grad != nullptr && !in_place) advise_huge_pages(a_.grad, size_t(bytes));

  // One reservation by the calling thread, so that nothing inside the team can fail.
  const bool converts = a_.student.col_stride != 1 || a_.student.dtype != sweep_.dtype ||
                        (dense_teacher_ && (a_.teacher.col_stride != 1 || a_.teacher.dtype != sweep_.dtype));
  const int64_t chunk_bytes = converts || top_k_ ? kChunk * int64_t(sizeof(float)) : 0;
  const int64_t k = top_k_ ? a_.teacher.cols : 0, k_bytes = k * int64_t(sizeof(double));
  const int64_t share = (3 * chunk_bytes + 4 * k_bytes + kAlignment - 1) / kAlignment * kAlignment;
  char* scratch = thread_scratch().reserve(size_t(threads * share));
  std::vector<Work> works(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) {
    char* p = scratch + i * share;
    double* of_k = reinterpret_cast<double*>(p + 3 * chunk_bytes);
    float* of_chunk = reinterpret_cast<float*>(p);
    const int64_t step = chunk_bytes / int64_t(sizeof(float));
    works[i].s = of_chunk;
    works[i].t = of_chunk + step;
    works[i].grad = of_chunk + 2 * step;
    works[i].top = {k, vocab_, &a_.teacher, nullptr, nullptr, of_k, of_k + k, of_k + 2 * k, of_k + 3 * k};
  }
  const bool lanes = kernel_.short_rows != nullptr && vocab_ <= kShortVocab && common_ == vocab_ && !top_k_ &&
                     !sweep_.smoothing && !converts;
  if (by_token) {
    parallel(threads, [&](int i) {
      const Range mine = split(tokens, threads, i);
      Totals totals;
      if (lanes) {
        run_short(mine, totals);
      } else {
        for (int64_t token = mine.begin; token < mine.end; ++token) run_token(token, 1, &works[i], totals);
      }
      works[i].totals = totals;
    });
  } else {
    for (int64_t token = 0; token < tokens; ++token) run_token(token, threads, works.data(), works[0].totals);
  }
  if (a_.reduction == Reduction::none) return;
  Totals totals;
  for (const Work& work : works) {
    totals.loss += work.totals.loss;
    totals.hard += work.totals.hard;
    totals.soft += work.totals.soft;
  }
  const double share_of_mean = items_ > 0 ? 1 / items_ : 0;  // nothing is valid where items is 0
  store(0, totals.loss * share_of_mean, totals.hard * share_of_mean, totals.soft * share_of_mean);
}

double run(const Args& args) {
  const double items = check_args(args);
  Problem(args, best_kernel(), items).run();
  return items;
}

const char* kernel_name() { return best_kernel().name; }

}  // namespace pycompress::distill_loss
