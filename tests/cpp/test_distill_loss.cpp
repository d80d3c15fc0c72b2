// Every kernel that this CPU has, against the formula of distill_loss.h in double. `make cpp-test` runs it under the
// address and undefined-behaviour sanitizers, and so every buffer has exactly the size that the contract asks for. What
// may not be read inside a buffer (gaps between strided rows and columns) is NaN.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/isa.h"
#include "distill_loss/distill_loss.h"

namespace {

namespace pc = pycompress;
namespace dl = pycompress::distill_loss;
using dl::Divergence;
using dl::Reduction;
using pc::Dtype;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
int failures = 0;
std::mt19937 generator(1);

double normal(double scale) { return std::normal_distribution<double>(0, scale)(generator); }
int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

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
    int64_t extent = 0;
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
std::vector<double> log_softmax(const Logits& x, int64_t t, int64_t cols, double temperature) {
  std::vector<double> log(static_cast<size_t>(cols));
  double largest = -kInfinity, sum = 0;
  for (int64_t v = 0; v < cols; ++v) largest = std::max(largest, x.at(t, v) / temperature);
  for (int64_t v = 0; v < cols; ++v) sum += std::exp(x.at(t, v) / temperature - largest);
  for (int64_t v = 0; v < cols; ++v) log[size_t(v)] = x.at(t, v) / temperature - largest - std::log(sum);
  return log;
}

double term(double p, double log_p, double log_q) {
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
  dl::Args args(float* loss, float* hard_out, float* soft_out, void* grad_out);
};

void Problem::solve() {
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

void Problem::solve_soft(int64_t t, double gain) {
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

dl::Args Problem::args(float* loss_out, float* hard_out, float* soft_out, void* grad_out) {
  dl::Args a;
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
  a.threads = c.threads;
  a.loss = loss_out;
  a.hard = hard_out;
  a.soft = soft_out;
  a.grad = grad_out;
  return a;
}

void fail(const Case& c, const char* isa, const std::string& detail) {
  std::printf("FAILED %s: T=%lld V=%lld,%lld dtype=%d,%d divergence=%d reduction=%d view=%d masked=%d threads=%d: %s\n",
              isa, (long long)c.rows, (long long)c.vocab, (long long)c.teacher_vocab, int(c.dtype),
              int(c.teacher_dtype), int(c.divergence), int(c.reduction), c.view, int(c.masked), c.threads,
              detail.c_str());
  ++failures;
}

void compare(const Case& c, const char* isa, const char* what, const std::vector<float>& got,
             const std::vector<double>& tokens) {
  std::vector<double> want = tokens;
  if (c.reduction != Reduction::none) {
    want.assign(1, 0.0);
    for (double x : tokens) want[0] += x;
  }
  for (size_t i = 0; i < want.size(); ++i) {
    const double scale = c.temperature * c.temperature * (c.reduction == Reduction::sum ? double(c.rows) : 1.0);
    const double allowed = 0x1p-20 * (std::fabs(want[i]) + 8 * scale);
    if (got[i] == want[i] || std::fabs(got[i] - want[i]) <= allowed) continue;
    return fail(c, isa,
                std::string(what) + "[" + std::to_string(i) + "] = " + std::to_string(got[i]) + ", expected " +
                    std::to_string(want[i]));
  }
}

void test_case(const Case& c, const std::vector<std::string>& isas) {
  Problem p(c);
  const double roundoff = c.dtype == Dtype::f32 ? 0 : (c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11);
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    const size_t values = c.reduction == Reduction::none ? size_t(c.rows) : 1;
    std::vector<float> loss(values, NAN), hard(values, NAN), soft(values, NAN);
    const int64_t elements = c.rows * c.vocab;
    std::unique_ptr<char[]> grad(new char[size_t(elements * pc::dtype_size(c.dtype))]);
    for (int with_grad = 0; with_grad < 2; ++with_grad) {
      dl::run(p.args(loss.data(), hard.data(), soft.data(), with_grad ? grad.get() : nullptr));
      compare(c, isa.c_str(), "loss", loss, p.loss);
      compare(c, isa.c_str(), "hard", hard, p.hard);
      compare(c, isa.c_str(), "soft", soft, p.soft);
    }
    for (int64_t i = 0; i < elements; ++i) {
      const double got = pc::load_float(grad.get(), i, c.dtype), want = p.grad[size_t(i)];
      const double allowed = 0x1p-20 * p.size[size_t(i)] + roundoff * std::fabs(want) + 0x1p-25;
      if (std::fabs(got - want) <= allowed) continue;
      fail(c, isa.c_str(),
           "grad[" + std::to_string(i / c.vocab) + "," + std::to_string(i % c.vocab) + "] = " + std::to_string(got) +
               ", expected " + std::to_string(want));
      break;
    }
  }
}

// Options are dealt in turn, each with a period of its own, so that a few hundred shapes meet every pair of them.
std::vector<Case> all_cases() {
  std::vector<Case> cases;
  int64_t turn = 0;
  const auto deal = [&](int64_t rows, int64_t vocab, int64_t teacher_vocab, int threads) {
    Case c{rows, vocab, teacher_vocab};
    c.dtype = Dtype(turn % 3);
    c.teacher_dtype = turn % 7 == 0 ? Dtype(turn / 3 % 3) : c.dtype;
    c.divergence = Divergence(turn / 2 % 3);
    c.reduction = Reduction(turn / 5 % 3);
    c.temperature = std::vector<double>{1, 2, 4, 0.7, 3}[size_t(turn % 5)];
    c.alpha = std::vector<double>{0.5, 0, 1, 0.3}[size_t(turn % 4)];
    c.beta = turn % 2 == 0 ? 0.5 : 0.1;
    c.smoothing = turn % 11 == 0 ? 0.1 : 0;
    c.view = int(turn / 4 % 5);
    c.masked = turn % 6 == 5;
    c.weighted = turn % 8 == 7;
    c.threads = threads;
    cases.push_back(c);
    ++turn;
  };
  for (int64_t rows : {1, 2, 7, 8, 9, 15, 16, 17, 33}) {
    for (int64_t vocab : {1, 2, 7, 8, 9, 10, 15, 16, 17, 31, 33, 63, 64, 65, 130}) deal(rows, vocab, vocab, 1);
  }
  for (int64_t vocab : {1000, 4095, 4096, 4097, 8193, 12345}) {
    for (int64_t rows : {1, 2, 3}) {
      for (int threads : {1, 2, 3}) deal(rows, vocab, vocab, threads);
    }
    deal(2, vocab, vocab + 17, 1);
    deal(2, vocab + 17, vocab, 2);
    deal(0, vocab, vocab, 1);
  }
  for (int64_t other : {1, 10, 50, 64, 70}) deal(5, 60, other, 1), deal(17, other, 60, 2);
  return cases;
}

// 2^y over its whole range: with these constants the gradient of a sweep is nothing else.
void test_exponential(const dl::Kernel& kernel) {
  constexpr int64_t kCount = 4096;
  std::vector<float> y(kCount), power(kCount);
  dl::Sweep sweep;
  dl::Terms terms;
  terms.student = 1;
  double worst = 0;
  for (int64_t part = 0; part < 64; ++part) {
    for (int64_t i = 0; i < kCount; ++i) y[size_t(i)] = float(-126.0 * double(part * kCount + i) / (64 * kCount));
    kernel.gradient(sweep, y.data(), y.data(), kCount, terms, power.data(), false);
    for (size_t i = 0; i < kCount; ++i) worst = std::max(worst, std::fabs(power[i] / std::exp2(double(y[i])) - 1));
  }
  if (!(worst <= 2e-7)) std::printf("FAILED %s: error of 2^y %.3g, expected 2e-7\n", kernel.name, worst), ++failures;
  const float ends[] = {0.0f, -126.5f, -1e4f, -INFINITY}, expected[] = {1, 0, 0, 0};
  kernel.gradient(sweep, ends, ends, 4, terms, power.data(), false);
  for (size_t i = 0; i < 4; ++i) {
    if (power[i] == expected[i]) continue;
    std::printf("FAILED %s: 2^%g = %g\n", kernel.name, double(ends[i]), double(power[i]));
    ++failures;
  }
  std::printf("%-20s error of 2^y %.3g\n", kernel.name, worst);
}

void expect_error(const char* message, const std::function<void(dl::Args&)>& change) {
  Case c{4, 10, 10};
  Problem p(c);
  float loss, hard, soft;
  dl::Args a = p.args(&loss, &hard, &soft, nullptr);
  change(a);
  try {
    dl::run(a);
  } catch (const pc::ArgumentError& error) {
    if (std::string(error.what()).find(message) != std::string::npos) return;
    std::printf("FAILED: '%s' does not say '%s'\n", error.what(), message);
    ++failures;
    return;
  }
  std::printf("FAILED %s: no error\n", message);
  ++failures;
}

void test_argument_errors() {
  static const int64_t bad_labels[] = {0, 1, 10, 2}, repeated[] = {0, 1, 2, 2, 4, 5, 6, 7}, high[] = {0, 1, 2, 10};
  static const float bad_weights[] = {1, 1, NAN, 1};
  expect_error("temperature=0", [](dl::Args& a) { a.temperature = 0; });
  expect_error("alpha=2", [](dl::Args& a) { a.alpha = 2; });
  expect_error("beta=-1", [](dl::Args& a) { a.beta = -1; });
  expect_error("label_smoothing=1.5", [](dl::Args& a) { a.label_smoothing = 1.5; });
  expect_error("threads=0", [](dl::Args& a) { a.threads = 0; });
  expect_error("needs labels", [](dl::Args& a) { a.labels = nullptr; });
  expect_error("label 10 at token 2", [](dl::Args& a) { a.labels = bad_labels; });
  expect_error("at token 2", [](dl::Args& a) { a.token_weight = bad_weights; });
  expect_error("num_items=0", [](dl::Args& a) { a.num_items = 0; });
  expect_error("student has T=4 but teacher has T=3", [](dl::Args& a) { a.teacher.rows = 3; });
  expect_error("student is missing", [](dl::Args& a) { a.student.data = nullptr; });
  expect_error("loss is missing", [](dl::Args& a) { a.loss = nullptr; });
  expect_error("index 2 at token 1 is repeated", [](dl::Args& a) { a.topk_indices = repeated, a.teacher.cols = 2; });
  expect_error("index 10 at token 1", [](dl::Args& a) { a.topk_indices = high, a.teacher.cols = 2; });
}

}  // namespace

int main() {
  std::vector<std::string> isas;
  unsetenv("PYCOMPRESS_ISA");
  for (pc::Isa isa : pc::available_isas()) isas.emplace_back(pc::isa_name(isa));
  const std::vector<Case> cases = all_cases();
  for (const Case& c : cases) test_case(c, isas);
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    std::printf("%-11s %-28s %zu cases\n", isa.c_str(), dl::kernel_name(), cases.size());
  }
  unsetenv("PYCOMPRESS_ISA");
  test_exponential(dl::kScalar);
#ifdef PYCOMPRESS_HAVE_AVX2
  if (pc::isa_usable(pc::Isa::avx2)) test_exponential(dl::kAvx2);
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
  if (pc::isa_usable(pc::Isa::avx512)) test_exponential(dl::kAvx512);
#endif
  test_argument_errors();
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
