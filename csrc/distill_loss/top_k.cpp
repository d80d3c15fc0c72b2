// A top-k teacher: the k classes, and all others as one more.
#include <algorithm>
#include <cmath>
#include <limits>

#include "distill_loss/row.h"

namespace pycompress::distill_loss {
namespace {

constexpr double kLn2 = 0.693147180559945309;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The least that the classes outside the k are given: a tail that f32 does not resolve is not a masked one.
constexpr double kTailFloor = 0x1p-24;
// Below this 1 - sum q is mostly the rounding of the sums, and the other classes are summed by themselves.
constexpr double kTailDirect = 0x1p-10;

// A probability: 0 as a weight where it is less than 2^-126 of the largest, as a power of the vector kernels is, but
// with its logarithm, which is -infinity only where the class is masked.
struct Probability {
  double p, log;
};

Probability weighed(double log, double log_of_largest) {
  return {log - log_of_largest < -126 * kLn2 ? 0 : std::exp(log), log};
}

// One class of both distributions: what it adds to D, and q h.
struct Class {
  double d = 0, qh = 0;
};

Class divergence_of(const Formula& f, Probability p, Probability q) {
  Class c;
  switch (f.divergence) {
    case Divergence::forward_kl:
      if (p.p > 0) c.d = p.p * (p.log - q.log);
      c.qh = -p.p;
      break;
    case Divergence::reverse_kl:
      if (q.p == 0) break;
      if (p.log == -kInfinity) {
        c.d = kInfinity;
      } else {
        c.d = c.qh = q.p * (q.log - p.log);
      }
      break;
    case Divergence::jsd: {
      const double log_m = std::log(f.beta * p.p + (1 - f.beta) * q.p);
      if (q.p > 0) c.qh = (1 - f.beta) * q.p * (q.log - log_m);
      c.d = c.qh + (p.p > 0 ? f.beta * p.p * (p.log - log_m) : 0);
      break;
    }
  }
  return c;
}

struct Teacher {
  double sum = 0, largest = -kInfinity;  // of the k probabilities, and the largest of their logarithms
};

// Fills top.p with the logarithms of the teacher's probabilities. sum is NaN where the row is.
Teacher teacher_logs(const Formula& f, const TopK& top, int64_t token) {
  const Rows& values = *top.values;
  const int64_t row = values.offset(token);
  const double lse = top.logsumexp == nullptr ? 0 : double(*top.logsumexp);
  Teacher t;
  for (int64_t i = 0; i < top.k; ++i) {
    top.p[i] = load_float(values.data, row + i * values.col_stride, values.dtype) / f.temperature - lse;
    t.largest = std::max(t.largest, top.p[i]);
  }
  for (int64_t i = 0; i < top.k; ++i) t.sum += std::exp(top.p[i] - t.largest);
  // Rounded logits and a rounded logsumexp may exceed 1 a little: the k classes then hold everything.
  double excess = t.largest + std::log(t.sum);
  if (top.logsumexp != nullptr && excess < 0) excess = 0;
  for (int64_t i = 0; i < top.k; ++i) top.p[i] -= excess;
  t.largest -= excess;
  t.sum *= std::exp(t.largest);
  if (!std::isfinite(lse)) t.sum = kNaN;
  return t;
}

}  // namespace

void finish_top_k(const Formula& f, const TopK& top, const Rows& student, int64_t token, const Sums& a, double gain,
                  const std::function<Sums()>& sum_of_rest, RowResult& row) {
  const Teacher teacher = teacher_logs(f, top, token);
  const double s_max = base_of(a.s_max), log_zs = std::log(a.zs), g = (1 - f.alpha) * f.temperature * gain;
  const double largest = (base_of(a.s_top) - s_max) / f.temperature - log_zs;
  const int64_t base = student.offset(token);
  double q_sum = 0, divergence = 0, h_mean = 0;
  for (int64_t i = 0; i < top.k; ++i) {
    top.s[i] = load_float(student.data, base + top.indices[i] * student.col_stride, student.dtype);
    const Probability q = weighed((top.s[i] - s_max) / f.temperature - log_zs, largest);
    const Class c = divergence_of(f, weighed(top.p[i], teacher.largest), q);
    q_sum += top.q[i] = q.p;
    divergence += c.d;
    h_mean += top.grad[i] = c.qh;
  }
  Class rest;
  Probability q_rest{0, -kInfinity};
  Sums others = a;  // what the powers of the other classes are relative to, and their sum
  if (top.k < top.vocab) {
    q_rest = {1 - q_sum, std::log(1 - q_sum)};
    others.zs = a.zs * q_rest.p;
    if (!(q_rest.p >= kTailDirect)) {
      others = sum_of_rest();
      const double log = (base_of(others.s_max) - s_max) / f.temperature + std::log(others.zs) - log_zs;
      q_rest = others.zs > 0 ? Probability{std::exp(log), log} : Probability{kTailFloor, std::log(kTailFloor)};
    }
    const double p = top.logsumexp != nullptr ? std::max(1 - teacher.sum, kTailFloor) : 0;
    rest = divergence_of(f, {p, std::log(p)}, q_rest);
    divergence += rest.d;
    h_mean += rest.qh;
  }
  for (int64_t i = 0; i < top.k; ++i) {
    top.grad[i] = g * (top.grad[i] - top.q[i] * h_mean);
    if (!f.hard) continue;
    top.grad[i] += row.common.hard * std::exp(top.s[i] - s_max) - (std::isinf(top.s[i]) ? 0 : row.common.smooth);
  }
  const bool valid = a.zs > 0 && a.zs < kInfinity && std::isfinite(teacher.sum);
  row.soft = valid ? f.temperature * f.temperature * (divergence < 0 ? 0 : divergence) : kNaN;
  // Of the gradient of the others together each takes its share, 2^s' / zs of the others.
  if (!(others.zs > 0)) {
    row.common.student = 0;  // they are masked
    return;
  }
  row.common.student = float(g * (rest.qh - q_rest.p * h_mean) / others.zs);
  row.common.hard = float(row.common.hard * std::exp(base_of(others.s_max) - s_max));
  row.common.s_max = float(base_of(others.s_max));
}

}  // namespace pycompress::distill_loss
