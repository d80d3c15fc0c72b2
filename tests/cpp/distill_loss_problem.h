// A call of the distillation loss and its solution, the formula of distill_loss.h in double; for the tests of the CPU
// kernels and of the CUDA kernels. What may not be read inside a buffer (gaps between strided rows and columns) is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "distill_loss/distill_loss.h"

namespace distill_loss_problem {

namespace pc = pycompress;
namespace dl = pycompress::distill_loss;
using dl::Divergence;
using dl::Reduction;
using pc::Dtype;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline std::mt19937 generator(1);

inline double normal(double scale) { return std::normal_distribution<double>(0, scale)(generator); }
inline int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

struct Case {
  int64_t rows, vocab, teacher_vocab;
  Dtype dtype = Dtype::f32, teacher_dtype = Dtype::f32;
  Divergence divergence = Divergence::forward_kl;
  Reduction reduction = Reduction::mean;
  double temperature = 1, alpha = 0.5, beta = 0.5, smoothing = 0;
  int view = 0, threads = 1;
  bool masked = false, weighted = false;
};

// Logits of exactly the extent that the strides span; everything between them is NaN.
struct Logits {
  std::unique_ptr<char[]> memory;
  int64_t extent = 0;  // in elements
  dl::Rows view;

  Logits(int64_t rows, int64_t cols, Dtype dtype, int kind) {
    view.dtype = dtype;
    view.rows = rows;
    view.cols = cols;
    view.inner_rows = std::max<int64_t>(rows, 1);
    view.row_stride = cols;
    if (kind == 1) view.row_stride = cols + 3;
    if (kind == 2) view.row_stride = 2 * cols + 1, view.col_stride = 2;
    if (kind == 3) view.row_stride = 1, view.col_stride = std::max<int64_t>(rows, 1);
    if (kind == 4) view.inner_rows = 2, view.outer_stride = 3 * cols + 5, view.row_stride = cols + 1;
    for (int64_t t = 0; t < rows; ++t) extent = std::max(extent, view.offset(t) + (cols - 1) * view.col_stride + 1);
    memory.reset(new char[size_t(extent * pc::dtype_size(dtype))]);
    view.data = memory.get();
    for (int64_t i = 0; i < extent; ++i) pc::store_float(memory.get(), i, dtype, NAN);
  }
  int64_t index(int64_t t, int64_t v) const { return view.offset(t) + v * view.col_stride; }
  double at(int64_t t, int64_t v) const { return pc::load_float(memory.get(), index(t, v), view.dtype); }
  void set(int64_t t, int64_t v, double x) { pc::store_float(memory.get(), index(t, v), view.dtype, float(x)); }
};

// log softmax of the first `cols` logits, in double.
inline std::vector<double> log_softmax(const Logits& x, int64_t t, int64_t cols, double temperature) {
  std::vector<double> log(static_cast<size_t>(cols));
  double largest = -kInfinity, sum = 0;
  for (int64_t v = 0; v < cols; ++v) largest = std::max(largest, x.at(t, v) / temperature);
  for (int64_t v = 0; v < cols; ++v) sum += std::exp(x.at(t, v) / temperature - largest);
  for (int64_t v = 0; v < cols; ++v) log[size_t(v)] = x.at(t, v) / temperature - largest - std::log(sum);
  return log;
}

inline double term(double p, double log_p, double log_q) {
  if (log_p == -kInfinity) return 0;
  return log_q == -kInfinity ? kInfinity : p * (log_p - log_q);
}

struct Problem {
  Case c;
  Logits student, teacher;
  std::vector<int64_t> labels;
  std::vector<float> weights;
  std::vector<double> hard, soft, loss, grad, size;  // size: the magnitudes that met in an element of the gradient
  double items = 0;

  explicit Problem(const Case& wanted)
      : c(wanted),
        student(c.rows, c.vocab, c.dtype, c.view),
        teacher(c.rows, c.teacher_vocab, c.teacher_dtype, c.view) {
    for (int64_t t = 0; t < c.rows; ++t) {
      for (int64_t v = 0; v < c.vocab; ++v) student.set(t, v, normal(2));
      for (int64_t v = 0; v < c.teacher_vocab; ++v) teacher.set(t, v, normal(2));
      for (int64_t v = 1; c.masked && v < std::min(c.vocab, c.teacher_vocab); v += 3) {
        student.set(t, v, -kInfinity);
        teacher.set(t, v, -kInfinity);
        if (v + 1 < c.vocab && t % 3 == 1) student.set(t, v + 1, -kInfinity);
        if (v + 1 < c.teacher_vocab && t % 3 == 2) teacher.set(t, v + 1, -kInfinity);
      }
      labels.push_back(t % 5 == 3 ? -100 : (c.masked ? 0 : draw(0, c.vocab - 1)));
      if (t % 5 == 3) student.set(t, c.vocab - 1, NAN);  // ignored, so nobody may notice
      weights.push_back(c.weighted ? float(draw(0, 8)) / 4 : 1.0f);
    }
    solve();
  }

  void solve();
  void solve_soft(int64_t t, double gain);

  // What the calls of all devices have in common.
  template <class Args>
  Args args(float* loss_out, float* hard_out, float* soft_out, void* grad_out) const;
};

inline void Problem::solve() {
  hard.assign(size_t(c.rows), 0.0);
  soft = loss = hard;
  grad.assign(size_t(c.rows * c.vocab), 0.0);
  size = grad;
  for (int64_t t = 0; t < c.rows; ++t) items += labels[size_t(t)] != -100 ? weights[size_t(t)] : 0;
  if (c.reduction != Reduction::mean) items = 1;
  for (int64_t t = 0; t < c.rows; ++t) {
    const double weight = weights[size_t(t)];
    if (labels[size_t(t)] == -100 || weight == 0) continue;
    const double gain = weight / items;
    if (c.alpha > 0) {
      const std::vector<double> log = log_softmax(student, t, c.vocab, 1);
      int64_t count = 0;
      double mean = 0;
      for (double x : log) count += x != -kInfinity, mean -= x != -kInfinity ? x : 0;
      const auto label = size_t(labels[size_t(t)]);
      hard[size_t(t)] = gain * ((1 - c.smoothing) * -log[label] + c.smoothing * mean / double(count));
      for (size_t v = 0; v < log.size(); ++v) {
        const double target = (v == label ? 1 - c.smoothing : 0) + (log[v] != -kInfinity ? c.smoothing / count : 0);
        grad[size_t(t * c.vocab) + v] += gain * c.alpha * (std::exp(log[v]) - target);
        size[size_t(t * c.vocab) + v] += gain * c.alpha * (std::exp(log[v]) + target);
      }
    }
    if (c.alpha < 1) solve_soft(t, gain);
    loss[size_t(t)] = c.alpha * hard[size_t(t)] + (1 - c.alpha) * soft[size_t(t)];
  }
}

inline void Problem::solve_soft(int64_t t, double gain) {
  const int64_t both = std::min(c.vocab, c.teacher_vocab);
  const std::vector<double> lp = log_softmax(teacher, t, both, c.temperature);
  const std::vector<double> lq = log_softmax(student, t, both, c.temperature);
  const auto n = size_t(both);
  std::vector<double> ratio(n);
  double value = 0, mean = 0;
  for (size_t v = 0; v < n; ++v) {
    const double p = std::exp(lp[v]), q = std::exp(lq[v]);
    if (c.divergence == Divergence::forward_kl) {
      value += term(p, lp[v], lq[v]);
      continue;
    }
    const bool one = lp[v] == -kInfinity || lq[v] == -kInfinity;
    if (c.divergence == Divergence::reverse_kl) {
      value += term(q, lq[v], lp[v]);
      ratio[v] = one ? 0 : lq[v] - lp[v];
    } else {
      const double log_m = std::log(c.beta * p + (1 - c.beta) * q);
      value += c.beta * term(p, lp[v], log_m) + (1 - c.beta) * term(q, lq[v], log_m);
      ratio[v] = q == 0 ? 0 : (1 - c.beta) * (lq[v] - log_m);
    }
    mean += q * ratio[v];
  }
  soft[size_t(t)] = gain * c.temperature * c.temperature * value;
  const double scale = gain * (1 - c.alpha) * c.temperature;
  for (size_t v = 0; v < n; ++v) {
    const double p = std::exp(lp[v]), q = std::exp(lq[v]);
    const bool forward = c.divergence == Divergence::forward_kl;
    grad[size_t(t * c.vocab) + v] += scale * (forward ? q - p : q * (ratio[v] - mean));
    size[size_t(t * c.vocab) + v] += scale * (p + q) * (2 + std::fabs(ratio[v]) + std::fabs(mean)) * 8;
  }
}

template <class Args>
Args Problem::args(float* loss_out, float* hard_out, float* soft_out, void* grad_out) const {
  Args a;
  a.student = student.view;
  a.teacher = teacher.view;
  a.labels = labels.data();
  a.token_weight = c.weighted ? weights.data() : nullptr;
  a.divergence = c.divergence;
  a.reduction = c.reduction;
  a.temperature = c.temperature;
  a.alpha = c.alpha;
  a.beta = c.beta;
  a.label_smoothing = c.smoothing;
  a.loss = loss_out;
  a.hard = hard_out;
  a.soft = soft_out;
  a.grad = grad_out;
  return a;
}

// ---- what is wrong with a result, or nothing -----------------------------------------------------------------------

inline std::string name_of(const Case& c) {
  const auto number = [](double x) { return std::to_string(x).substr(0, 4); };
  return "T=" + std::to_string(c.rows) + " V=" + std::to_string(c.vocab) + "," + std::to_string(c.teacher_vocab) +
         " dtype=" + std::to_string(int(c.dtype)) + "," + std::to_string(int(c.teacher_dtype)) +
         " divergence=" + std::to_string(int(c.divergence)) + " reduction=" + std::to_string(int(c.reduction)) +
         " tau=" + number(c.temperature) + " alpha=" + number(c.alpha) + " smoothing=" + number(c.smoothing) +
         " view=" + std::to_string(c.view) + " masked=" + std::to_string(int(c.masked));
}

inline std::string wrong_values(const Problem& p, const char* what, const float* got,
                                const std::vector<double>& tokens) {
  const Case& c = p.c;
  std::vector<double> want = tokens;
  if (c.reduction != Reduction::none) {
    want.assign(1, 0.0);
    for (double x : tokens) want[0] += x;
  }
  for (size_t i = 0; i < want.size(); ++i) {
    const double scale = c.temperature * c.temperature * (c.reduction == Reduction::sum ? double(c.rows) : 1.0);
    const double allowed = 0x1p-20 * (std::fabs(want[i]) + 8 * scale);
    if (double(got[i]) == want[i] || std::fabs(double(got[i]) - want[i]) <= allowed) continue;
    return std::string(what) + "[" + std::to_string(i) + "] = " + std::to_string(got[i]) + ", expected " +
           std::to_string(want[i]);
  }
  return "";
}

// factor: what the gradient was multiplied by
inline std::string wrong_gradient(const Problem& p, const void* grad, double factor = 1) {
  const Case& c = p.c;
  const double roundoff = c.dtype == Dtype::f32 ? 0 : (c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11);
  for (int64_t i = 0; i < c.rows * c.vocab; ++i) {
    const double got = double(pc::load_float(grad, i, c.dtype)), want = factor * p.grad[size_t(i)];
    const double allowed = 0x1p-20 * std::fabs(factor) * p.size[size_t(i)] + roundoff * std::fabs(want) + 0x1p-25;
    if (std::fabs(got - want) <= allowed) continue;
    return "grad[" + std::to_string(i / c.vocab) + "," + std::to_string(i % c.vocab) + "] = " + std::to_string(got) +
           ", expected " + std::to_string(want);
  }
  return "";
}

}  // namespace distill_loss_problem
