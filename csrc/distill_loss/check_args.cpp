#include "distill_loss/check_args.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/check.h"

namespace pycompress::distill_loss {
namespace {

void check_rows(const char* name, const Rows& r) {
  check(r.rows >= 0 && r.inner_rows >= 1, "distill_loss: ", name, " has ", r.rows, " rows in groups of ", r.inner_rows);
  check(r.cols >= 1, "distill_loss: ", name, " has V=", r.cols, ", expected at least 1");
  check(r.rows == 0 || r.data != nullptr, "distill_loss: ", name, " is missing");
}

bool within(double value, double low, double high) { return value >= low && value <= high; }

void check_options(const Args& a) {
  check(within(a.temperature, 1e-30, 1e30), "distill_loss: temperature=", a.temperature,
        ", expected a positive finite number, 1e-30 to 1e30");
  check(within(a.alpha, 0, 1), "distill_loss: alpha=", a.alpha, ", expected 0 to 1");
  check(within(a.beta, 0, 1), "distill_loss: beta=", a.beta, ", expected 0 to 1");
  check(within(a.label_smoothing, 0, 1), "distill_loss: label_smoothing=", a.label_smoothing, ", expected 0 to 1");
  check(a.threads >= 1, "distill_loss: threads=", a.threads, ", expected at least 1");
  check(a.alpha == 0 || a.labels != nullptr || a.student.rows == 0, "distill_loss: alpha=", a.alpha, " needs labels");
  const bool no_outputs = a.reduction == Reduction::none && a.student.rows == 0;
  check(no_outputs || a.loss != nullptr, "distill_loss: loss is missing");
  check(a.topk_indices != nullptr || a.topk_logsumexp == nullptr, "distill_loss: logsumexp belongs to a top-k teacher");
  check(a.topk_indices == nullptr || a.topk_logsumexp != nullptr || a.divergence != Divergence::reverse_kl ||
            a.alpha == 1,
        "distill_loss: reverse_kl with a top-k teacher needs logsumexp: without it the teacher has no mass outside the "
        "k classes, and the divergence is infinite");
}

// Valid tokens' weights, summed; every label and weight looked at.
double check_tokens(const Args& a) {
  double items = 0;
  for (int64_t t = 0; t < a.student.rows; ++t) {
    double weight = 1;
    if (a.token_weight != nullptr) {
      weight = a.token_weight[t];
      check(weight >= 0 && std::isfinite(weight), "distill_loss: token_weight ", weight, " at token ", t,
            ", expected a finite number of at least 0");
    }
    if (a.labels != nullptr) {
      const int64_t label = a.labels[t];
      if (label == a.ignore_index) continue;
      check(label >= 0 && label < a.student.cols, "distill_loss: label ", label, " at token ", t,
            " is out of range for V=", a.student.cols, " (ignore_index=", a.ignore_index, ")");
    }
    items += weight;
  }
  return items;
}

void check_indices(const Args& a) {
  const int64_t k = a.teacher.cols, vocab = a.student.cols;
  std::vector<int64_t> seen(static_cast<size_t>(vocab), -1);  // the last token that named the class
  for (int64_t t = 0; t < a.student.rows; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t v = a.topk_indices[t * k + i];
      check(v >= 0 && v < vocab, "distill_loss: top-k index ", v, " at token ", t, " is out of range for V=", vocab);
      check(seen[size_t(v)] != t, "distill_loss: top-k index ", v, " at token ", t,
            " is repeated; expected k different classes");
      seen[size_t(v)] = t;
    }
  }
}

}  // namespace

double check_args(const Args& a) {
  check_rows("student", a.student);
  check_rows("teacher", a.teacher);
  check(a.student.rows == a.teacher.rows, "distill_loss: student has T=", a.student.rows,
        " but teacher has T=", a.teacher.rows);
  check_options(a);
  if (a.topk_indices != nullptr) {
    check(a.teacher.cols <= a.student.cols, "distill_loss: top-k has k=", a.teacher.cols,
          " classes but student has V=", a.student.cols);
    check_indices(a);
  }
  const double counted = check_tokens(a);
  if (a.reduction != Reduction::mean) return 1;
  if (a.num_items < 0) return counted;
  check(std::isfinite(a.num_items), "distill_loss: num_items=", a.num_items, ", expected a finite number");
  check(a.num_items > 0 || counted == 0, "distill_loss: num_items=0 but some tokens are valid");
  return a.num_items;
}

}  // namespace pycompress::distill_loss
