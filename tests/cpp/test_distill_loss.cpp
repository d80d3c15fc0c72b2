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
#include "distill_loss_problem.h"

namespace {

using namespace distill_loss_problem;

int failures = 0;

dl::Args args_of(const Problem& p, float* loss, float* hard, float* soft, void* grad) {
  dl::Args a = p.args<dl::Args>(loss, hard, soft, grad);
  a.threads = p.c.threads;
  return a;
}

void expect_none(const Case& c, const std::string& isa, const std::string& wrong) {
  if (wrong.empty()) return;
  std::printf("FAILED %s: %s threads=%d: %s\n", isa.c_str(), name_of(c).c_str(), c.threads, wrong.c_str());
  ++failures;
}

void test_case(const Case& c, const std::vector<std::string>& isas) {
  Problem p(c);
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    const size_t values = c.reduction == Reduction::none ? size_t(c.rows) : 1;
    std::vector<float> loss(values, NAN), hard(values, NAN), soft(values, NAN);
    const int64_t elements = c.rows * c.vocab;
    std::unique_ptr<char[]> grad(new char[size_t(elements * pc::dtype_size(c.dtype))]);
    for (int with_grad = 0; with_grad < 2; ++with_grad) {
      dl::run(args_of(p, loss.data(), hard.data(), soft.data(), with_grad ? grad.get() : nullptr));
      expect_none(c, isa, wrong_values(p, "loss", loss.data(), p.loss));
      expect_none(c, isa, wrong_values(p, "hard", hard.data(), p.hard));
      expect_none(c, isa, wrong_values(p, "soft", soft.data(), p.soft));
    }
    expect_none(c, isa, wrong_gradient(p, grad.get()));
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
  dl::Args a = args_of(p, &loss, &hard, &soft, nullptr);
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
