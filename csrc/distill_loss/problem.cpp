#include "distill_loss/problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace pycompress::distill_loss {
Problem::Problem(const Args& args, const Kernel& kernel, double items) : a_(args), kernel_(kernel), items_(items) {
  // jsd is 0 at both ends of beta.
  const bool no_jsd = a_.divergence == Divergence::jsd && (a_.beta == 0 || a_.beta == 1);
  formula_ = {a_.divergence, a_.temperature,         a_.alpha, a_.beta, a_.label_smoothing,
              a_.alpha > 0,  a_.alpha < 1 && !no_jsd};
  top_k_ = a_.topk_indices != nullptr && formula_.soft;
  dense_teacher_ = formula_.soft && !top_k_;
  two_sweeps_ = dense_teacher_ && a_.divergence == Divergence::jsd;
  vocab_ = a_.student.cols;
  common_ = dense_teacher_ ? std::min(vocab_, a_.teacher.cols) : vocab_;
  grad_items_ = a_.normalize_grad ? items_ : 1;

  const double tau = formula_.soft ? a_.temperature : 1;
  const int squarings = tau == 1 ? 0 : tau == 2 ? 1 : tau == 4 ? 2 : -1;
  sweep_.soft = dense_teacher_ ? static_cast<Soft>(a_.divergence) : Soft::student_only;
  sweep_.smoothing = formula_.hard && a_.label_smoothing > 0;
  sweep_.hard = !formula_.hard ? Hard::none : sweep_.smoothing || squarings < 0 ? Hard::own : Hard::power;
  sweep_.squarings = std::max(squarings, 0);
  sweep_.scale = float(1.44269504088896341 / tau);
  sweep_.beta = float(a_.beta);
  // Read in place where one dtype serves both operands, else widened to f32 chunk by chunk.
  const bool one_dtype = !dense_teacher_ || a_.student.dtype == a_.teacher.dtype;
  const bool dense = a_.student.col_stride == 1 && (!dense_teacher_ || a_.teacher.col_stride == 1);
  sweep_.dtype = one_dtype && dense ? a_.student.dtype : Dtype::f32;
  rest_sweep_ = sweep_;
  rest_sweep_.soft = Soft::student_only;
  rest_sweep_.hard = Hard::own;
}

bool Problem::skipped(int64_t token) const {
  return !(formula_.hard || formula_.soft) || (a_.labels != nullptr && a_.labels[token] == a_.ignore_index) ||
         (a_.token_weight != nullptr && a_.token_weight[token] == 0);
}

double Problem::gain(int64_t token) const {
  return (a_.token_weight == nullptr ? 1.0 : double(a_.token_weight[token])) / grad_items_;
}

const void* Problem::chunk(const Rows& rows, int64_t token, int64_t begin, int64_t n, float* copy) const {
  const int64_t first = rows.offset(token) + begin * rows.col_stride;
  const char* data = static_cast<const char*>(rows.data) + first * dtype_size(rows.dtype);
  if (rows.col_stride == 1 && rows.dtype == sweep_.dtype) return data;
  if (rows.col_stride == 1) {
    kernel_.widen(data, rows.dtype, n, copy);
  } else {
    for (int64_t i = 0; i < n; ++i) copy[i] = load_float(rows.data, first + i * rows.col_stride, rows.dtype);
  }
  return copy;
}

RowSums Problem::sum(int64_t token, Range classes, Work& work) const {
  RowSums row;
  const int64_t end = std::min(classes.end, common_);
  for (int64_t v = classes.begin; v < end; v += kChunk) {
    const int64_t n = std::min(kChunk, end - v);
    const void* s = chunk(a_.student, token, v, n, work.s);
    const void* t = dense_teacher_ ? chunk(a_.teacher, token, v, n, work.t) : nullptr;
    Sums part;
    kernel_.sums(sweep_, s, t, n, row.common.s_max, row.common.t_max, part);
    merge(sweep_, row.common, part);
  }
  row.has_rest = common_ < vocab_ && formula_.hard;
  if (!row.has_rest) return row;
  for (int64_t v = std::max(classes.begin, common_); v < classes.end; v += kChunk) {
    const int64_t n = std::min(kChunk, classes.end - v);
    Sums part;
    kernel_.sums(rest_sweep_, chunk(a_.student, token, v, n, work.s), nullptr, n, row.rest.s_max, 0, part);
    merge(rest_sweep_, row.rest, part);
  }
  return row;
}

Moments Problem::moment(int64_t token, Range classes, const Terms& terms, Work& work) const {
  Moments total;
  const int64_t end = std::min(classes.end, common_);
  for (int64_t v = classes.begin; v < end; v += kChunk) {
    const int64_t n = std::min(kChunk, end - v);
    Moments part;
    kernel_.moments(sweep_, chunk(a_.student, token, v, n, work.s), chunk(a_.teacher, token, v, n, work.t), n, terms,
                    part);
    total.p += part.p;
    total.q += part.q;
  }
  return total;
}

// Sums over all classes but a top-k teacher's.
Sums Problem::sum_of_rest(int64_t token, Work& work) const {
  Sweep sweep = sweep_;
  sweep.dtype = Dtype::f32;
  Sums total;
  for (int64_t v = 0; v < vocab_; v += kChunk) {
    const int64_t n = std::min(kChunk, vocab_ - v);
    const Rows& s = a_.student;
    const int64_t first = s.offset(token) + v * s.col_stride;
    for (int64_t i = 0; i < n; ++i) work.s[i] = load_float(s.data, first + i * s.col_stride, s.dtype);
    for (int64_t i = 0; i < work.top.k; ++i) {
      const int64_t at = work.top.indices[i] - v;
      if (at >= 0 && at < n) work.s[at] = -std::numeric_limits<float>::infinity();
    }
    Sums part;
    kernel_.sums(sweep, work.s, nullptr, n, total.s_max, 0, part);
    merge(sweep, total, part);
  }
  return total;
}

// From the sums to the loss and the constants of the gradient; for jsd, up to the second sweep.
void Problem::finish(int64_t token, RowState& row, Work& work) const {
  const double g = gain(token);
  const int64_t y = label(token);
  const Rows& s = a_.student;
  const double logit = formula_.hard ? load_float(s.data, s.offset(token) + y * s.col_stride, s.dtype) : 0;
  finish_hard(formula_, row.sums, logit, g, row.result);
  if (dense_teacher_) finish_soft(formula_, row.sums.common, g, row.result);
  if (top_k_) {
    work.top.indices = a_.topk_indices + token * work.top.k;
    work.top.logsumexp = a_.topk_logsumexp == nullptr ? nullptr : a_.topk_logsumexp + token;
    const auto rest = [&] { return sum_of_rest(token, work); };
    finish_top_k(formula_, work.top, s, token, row.sums.common, g, rest, row.result);
  }
}

// The label's class is computed once more in f32: next to probability 1 a rounded gradient would have lost p - 1.
float Problem::label_gradient(int64_t token, const RowResult& row) const {
  const int64_t y = label(token);
  const float s = load_float(a_.student.data, a_.student.offset(token) + y * a_.student.col_stride, a_.student.dtype);
  const bool rest = y >= common_;
  Sweep sweep = rest ? rest_sweep_ : sweep_;
  sweep.dtype = Dtype::f32;
  float t = 0, g;
  if (dense_teacher_ && !rest) {
    t = load_float(a_.teacher.data, a_.teacher.offset(token) + y * a_.teacher.col_stride, a_.teacher.dtype);
  }
  kernel_.gradient(sweep, &s, &t, 1, rest ? row.rest : row.common, &g, false);
  return g - float(row.label_gain);  // both f32: exactly 0 where the label is the only class
}

void Problem::store_chunk(const Sweep& sweep, int64_t token, int64_t begin, int64_t n, const Terms& terms, Work& work,
                          bool has_teacher) const {
  const void* s = chunk(a_.student, token, begin, n, work.s);
  const void* t = has_teacher ? chunk(a_.teacher, token, begin, n, work.t) : nullptr;
  if (sweep.dtype == a_.student.dtype) {
    kernel_.gradient(sweep, s, t, n, terms, grad_at(token, begin), stream_);
  } else {
    kernel_.gradient(sweep, s, t, n, terms, work.grad, false);
    kernel_.narrow(work.grad, n, a_.student.dtype, grad_at(token, begin));
  }
}

void Problem::skip(int64_t token) const {
  if (a_.grad != nullptr) std::memset(grad_at(token, 0), 0, size_t(vocab_) * dtype_size(a_.student.dtype));
  if (a_.reduction == Reduction::none) store(token, 0, 0, 0);
}

void Problem::nan_gradient(int64_t token, Range classes) const {
  for (int64_t v = classes.begin; v < classes.end; ++v) {
    store_float(grad_at(token, 0), v, a_.student.dtype, std::numeric_limits<float>::quiet_NaN());
  }
}

void Problem::gradient(int64_t token, Range classes, const RowResult& row, Work& work) const {
  if (!row.valid()) return nan_gradient(token, classes);
  // Last chunk first: of a row longer than the cache, what was summed last is still there.
  const int64_t end = std::min(classes.end, common_), chunks = (end - classes.begin + kChunk - 1) / kChunk;
  for (int64_t i = chunks - 1; i >= 0; --i) {
    const int64_t v = classes.begin + i * kChunk;
    store_chunk(sweep_, token, v, std::min(kChunk, end - v), row.common, work, dense_teacher_);
  }
  const int64_t begin = std::max(classes.begin, common_);
  if (begin >= classes.end) return;
  if (!formula_.hard) {
    std::memset(grad_at(token, begin), 0, size_t(classes.end - begin) * dtype_size(a_.student.dtype));
    return;
  }
  for (int64_t v = begin; v < classes.end; v += kChunk) {
    store_chunk(rest_sweep_, token, v, std::min(kChunk, classes.end - v), row.rest, work, false);
  }
}

// The classes that the sweep over all does not know of: the label's, and the k of a top-k teacher.
void Problem::corrections(int64_t token, const RowState& row, const Work& work) const {
  const RowResult& r = row.result;
  if (!r.valid()) return;
  const Dtype dtype = a_.student.dtype;
  const int64_t y = label(token);
  if (formula_.hard) store_float(grad_at(token, 0), y, dtype, row.label_value);
  for (int64_t i = 0; top_k_ && i < work.top.k; ++i) {
    const int64_t v = work.top.indices[i];
    const double g = work.top.grad[i] - (formula_.hard && v == y ? r.label_gain : 0);
    store_float(grad_at(token, 0), v, dtype, float(g));
  }
}

void Problem::store(int64_t at, double loss, double hard, double soft) const {
  a_.loss[at] = float(loss);
  if (a_.hard != nullptr) a_.hard[at] = float(hard);
  if (a_.soft != nullptr) a_.soft[at] = float(soft);
}

void Problem::output(int64_t token, double hard, double soft, Totals& totals) const {
  const double weight = a_.token_weight == nullptr ? 1.0 : double(a_.token_weight[token]);
  hard *= weight;
  soft *= weight;
  // A part whose weight is 0 is 0, so that no 0 * infinity arises.
  const double loss = (formula_.hard ? a_.alpha * hard : 0) + (formula_.soft ? (1 - a_.alpha) * soft : 0);
  if (a_.reduction == Reduction::none) {
    store(token, loss, hard, soft);
  } else {
    totals.loss += loss;
    totals.hard += hard;
    totals.soft += soft;
  }
}

}  // namespace pycompress::distill_loss
