// One call: what is wanted, what that means for the sweeps, and the steps from a row to its loss and gradient.
// problem.cpp has the steps, distill_loss.cpp shares the rows out, row.cpp has the arithmetic between the sweeps.
#pragma once

#include <cstdint>

#include "common/range.h"
#include "distill_loss/distill_loss.h"
#include "distill_loss/row.h"

namespace pycompress::distill_loss {

struct Totals {
  double loss = 0, hard = 0, soft = 0;
};

// A thread's own: a chunk of each operand where it has to be converted, a top-k teacher's classes, its part of a row.
struct Work {
  float *s, *t, *grad;
  TopK top;
  RowSums sums;
  Moments moments;
  Totals totals;
};

struct RowState {
  RowSums sums;
  RowResult result;
  float label_value = 0;
};

class Problem {
 public:
  Problem(const Args& args, const Kernel& kernel, double items);
  void run();

 private:
  // ---- sharing out: distill_loss.cpp
  void run_token(int64_t token, int parts, Work* works, Totals& totals) const;
  void run_short(Range tokens, Totals& totals) const;
  int64_t run_lanes(int64_t token, int64_t most, Totals& totals) const;

  // ---- one row, or the part `classes` of it: problem.cpp
  void skip(int64_t token) const;
  void nan_gradient(int64_t token, Range classes) const;
  bool skipped(int64_t token) const;
  double gain(int64_t token) const;  // of the gradient
  RowSums sum(int64_t token, Range classes, Work& work) const;
  Moments moment(int64_t token, Range classes, const Terms& terms, Work& work) const;
  Sums sum_of_rest(int64_t token, Work& work) const;
  void finish(int64_t token, RowState& row, Work& work) const;
  float label_gradient(int64_t token, const RowResult& row) const;
  void gradient(int64_t token, Range classes, const RowResult& row, Work& work) const;
  void corrections(int64_t token, const RowState& row, const Work& work) const;
  void store(int64_t at, double loss, double hard, double soft) const;
  void output(int64_t token, double hard, double soft, Totals& totals) const;

  const void* chunk(const Rows& rows, int64_t token, int64_t begin, int64_t n, float* copy) const;
  void store_chunk(const Sweep& sweep, int64_t token, int64_t begin, int64_t n, const Terms& terms, Work& work,
                   bool has_teacher) const;
  char* grad_at(int64_t token, int64_t v) const {
    return static_cast<char*>(a_.grad) + (token * vocab_ + v) * dtype_size(a_.student.dtype);
  }
  int64_t label(int64_t token) const { return a_.labels == nullptr ? -1 : a_.labels[token]; }

  const Args& a_;
  const Kernel& kernel_;
  Formula formula_;
  Sweep sweep_, rest_sweep_;  // over the classes of both, and over the student's classes beyond them
  int64_t vocab_, common_;
  bool top_k_, dense_teacher_, two_sweeps_, stream_ = false;
  double items_, grad_items_;
};

}  // namespace pycompress::distill_loss
