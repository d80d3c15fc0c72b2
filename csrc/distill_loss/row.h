// The arithmetic of one row that is not a sweep: sums of chunks put together, the loss, the constants of the gradient.
// All in double; baseline instructions.
#pragma once

#include <functional>

#include "distill_loss/distill_loss.h"

namespace pycompress::distill_loss {

// What powers are relative to: Sums::s_max or t_max, and 0 where there is nothing but -infinity.
inline double base_of(float max) { return max == -__builtin_inff() ? 0 : double(max); }

// What the rows of a call have in common.
struct Formula {
  Divergence divergence;
  double temperature, alpha, beta, smoothing;
  bool hard, soft;       // which parts are computed
  double scale() const;  // log2(e) / temperature
};

// b into a, relative to the larger of the maxima. sweep says what was summed.
void merge(const Sweep& sweep, Sums& a, const Sums& b);

struct RowSums {
  Sums common;  // classes that both vocabularies have
  Sums rest;    // the student's classes beyond them, for the hard term
  bool has_rest = false;
};

struct RowResult {
  double hard = 0, soft = 0;  // NaN where the logits leave no distribution
  bool valid() const { return hard == hard && soft == soft; }
  Terms common, rest;
  double label_gain = 0;  // to subtract from the gradient of the label's class
};

// Everything but the soft term. gain: w / items.
void finish_hard(const Formula& formula, const RowSums& sums, double label_logit, double gain, RowResult& row);

// The soft term of a dense teacher; for jsd the constants that the second sweep needs, and finish_jsd after it.
void finish_soft(const Formula& formula, const Sums& sums, double gain, RowResult& row);
void finish_jsd(const Formula& formula, const Sums& sums, const Moments& moments, double gain, RowResult& row);

// ---- top-k teacher: the k classes, and all others as one; top_k.cpp ------------------------------------------------

// The teacher's k logits are `values`. p, q, s, grad: [k] to work in. On return grad holds the gradient at the k classes
// (but for the label's share), and row.common the constants for the others, relative to a maximum of their own where
// the k classes have nearly all the mass.
struct TopK {
  int64_t k, vocab;
  const Rows* values;
  const int64_t* indices;  // of this row
  const float* logsumexp;  // of this row, or null
  double *p, *q, *s, *grad;
};

// After finish_hard. sum_of_rest: the sums over the other classes, for where they are too little to be zs less the k.
void finish_top_k(const Formula& formula, const TopK& top, const Rows& student, int64_t token, const Sums& sums,
                  double gain, const std::function<Sums()>& sum_of_rest, RowResult& row);

}  // namespace pycompress::distill_loss
