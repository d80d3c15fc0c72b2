// What the tests of both forms of sparse_linear need: results compared with what they must be, the dealing of cases, and
// the errors that both must raise.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>

#include "common/check.h"
#include "sparse_linear_problem.h"

namespace {

int failures = 0;

void fail(const SparseProblem& p, const char* isa, const char* what, const std::string& detail) {
  const SparseCase& c = p.c;
  std::printf(
      "FAILED %s, %s: M=%lld N=%lld K=%lld type=%d kept=%g blocks=%dx%d dtype=%d activation=%d bias=%d view=%s "
      "threads=%d: %s\n",
      isa, what, (long long)c.m, (long long)c.n, (long long)c.k, int(c.type), c.kept, c.block_rows, c.block_columns,
      int(c.dtype), int(c.activation), c.bias, p.view.name, c.threads, detail.c_str());
  ++failures;
}

// The roundings of a float32 epilogue, and sum for float weights, and of y's dtype.
double allowed_error(const SparseProblem& p, size_t at) {
  const double expected = std::fabs(p.expected[at]);
  const double terms = p.c.type == WeightType::s8 ? 0 : double(p.c.k);
  const double roundoff = p.c.dtype == Dtype::f32 ? 0 : (p.c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11);
  return 0x1p-24 * (8 + 2 * std::sqrt(terms)) * (p.magnitude[at] + expected) + 2 * roundoff * expected + 0x1p-24;
}

constexpr float kMark = 12345.0f;  // exact in float32, and what it rounds to in the others is as good

float rounded_mark(Dtype dtype) {
  char bytes[4];
  pc::store_float(bytes, 0, dtype, kMark);
  return pc::load_float(bytes, 0, dtype);
}

inline void compare(const SparseProblem& p, const char* isa, const char* what, Exact<char>& y, int64_t ldy) {
  for (int64_t m = 0; m < p.c.m && p.c.n > 0; ++m) {
    for (int64_t n = 0; n < ldy && m * ldy + n < (p.c.m - 1) * ldy + p.c.n; ++n) {
      const float got = pc::load_float(y.data(), m * ldy + n, p.c.dtype);
      if (n >= p.c.n) {
        if (got != rounded_mark(p.c.dtype)) return fail(p, isa, what, "wrote between the rows of y");
        continue;
      }
      const auto at = size_t(m * p.c.n + n);
      if (!(std::fabs(got - p.expected[at]) <= allowed_error(p, at))) {
        return fail(p, isa, what,
                    "y[" + std::to_string(m) + "," + std::to_string(n) + "] = " + std::to_string(got) + ", expected " +
                        std::to_string(p.expected[at]));
      }
    }
  }
}

inline void mark_all(Exact<char>& y, Dtype dtype) {
  for (int64_t i = 0; i < y.count() / pc::dtype_size(dtype); ++i) pc::store_float(y.data(), i, dtype, kMark);
}

inline int64_t y_bytes(const SparseCase& c, int64_t ldy) {
  return c.m * c.n == 0 ? 0 : ((c.m - 1) * ldy + c.n) * pc::dtype_size(c.dtype);
}

// ---- cases -----------------------------------------------------------------------------------------------------

// Options are dealt in turn, each with a period of its own, so that a few hundred shapes meet every pair of them.
inline SparseCase deal(int64_t m, int64_t n, int64_t k, int64_t turn) {
  constexpr double kKept[] = {0.5, 0.2, 0.02, 1.0, 0.0, 0.9, 0.05};
  SparseCase c{m, n, k};
  c.type = WeightType(turn % 3);
  c.kept = kKept[turn % 7];
  c.holes = turn % 11 != 0;
  c.dtype = Dtype(turn / 3 % 3);
  c.activation = Activation(turn % 5);
  c.bias = int(turn % 4) - 1;
  c.view = int(turn % 8);
  return c;
}

// ---- errors ----------------------------------------------------------------------------------------------------

template <class Call>
void expect_error(const char* name, const std::string& message, const Call& call) {
  try {
    call();
  } catch (const pc::ArgumentError& error) {
    if (std::string(error.what()).find(message) != std::string::npos) return;
    std::printf("FAILED %s: '%s' does not say '%s'\n", name, error.what(), message.c_str());
    ++failures;
    return;
  }
  std::printf("FAILED %s: no error\n", name);
  ++failures;
}

using ArgsChange = std::pair<const char*, std::function<void(sl::Args&)>>;

// What the arguments of an s8 problem with N=20 and K=30 may get wrong, and what the message must say.
const ArgsChange kArgsChanges[] = {
    {"M=-1", [](sl::Args& a) { a.m = -1; }},
    {"threads=0", [](sl::Args& a) { a.threads = 0; }},
    {"x has K=31 but weight has K=30", [](sl::Args& a) { a.k = 31; }},
    {"N=21 but weight has N=20", [](sl::Args& a) { a.n = a.ldy = 21; }},
    {"inner_rows=0", [](sl::Args& a) { a.inner_rows = 0; }},
    {"ldy=19 is less", [](sl::Args& a) { a.ldy = 19; }},
    {"x is missing", [](sl::Args& a) { a.x = nullptr; }},
    {"y is missing", [](sl::Args& a) { a.y = nullptr; }},
    {"weight_scale is missing", [](sl::Args& a) { a.weight_scale = nullptr; }},
};

// call(args) must raise each of them.
template <class Call>
void expect_argument_errors(const sl::Args& good, const Call& call) {
  for (const auto& [message, change] : kArgsChanges) {
    sl::Args a = good;
    change(a);
    expect_error(message, message, [&] { call(a); });
  }
}

}  // namespace
