// Every kernel that this CPU has, against the formula of int8_matmul.h in float64. `make cpp-test` runs it under the
// address and undefined-behaviour sanitizers, and so every buffer has exactly the size that the contract asks for: one
// element read or written beyond it stops the test. What may not be read inside a buffer (gaps between strided rows) is
// NaN, and what may not be written keeps a mark.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "common/check.h"
#include "int8_matmul_problem.h"

namespace {

int failures = 0;

void fail(const Problem& p, const char* isa, const char* what, const std::string& detail) {
  const Case& c = p.c;
  std::printf("FAILED %s, %s: M=%lld N=%lld K=%lld mode=%d dtype=%d activation=%d bias=%d view=%s threads=%d: %s\n",
              isa, what, (long long)c.m, (long long)c.n, (long long)c.k, int(c.mode), int(c.dtype), int(c.activation),
              c.bias, p.view.name, c.threads, detail.c_str());
  ++failures;
}

// The bound of tests/oracle.py: the roundings of a float32 epilogue (and sum, for weight_only) and of y's dtype.
double allowed_error(const Problem& p, size_t at) {
  const double expected = std::fabs(p.expected[at]);
  const double terms = p.c.mode == Mode::weight_only ? double(p.c.k) : 0;
  const double roundoff = p.c.dtype == Dtype::f32 ? 0 : (p.c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11);
  return 0x1p-24 * (8 + 2 * std::sqrt(terms)) * (p.magnitude[at] + expected) + 2 * roundoff * expected + 0x1p-24;
}

constexpr float kMark = 12345.0f;  // exact in float32, and what it rounds to in the others is as good

void compare(const Problem& p, const char* isa, const char* what, Exact<char>& y, int64_t ldy) {
  const float mark = [&] {
    char bytes[4];
    pc::store_float(bytes, 0, p.c.dtype, kMark);
    return pc::load_float(bytes, 0, p.c.dtype);
  }();
  for (int64_t m = 0; m < p.c.m && p.c.n > 0; ++m) {
    for (int64_t n = 0; n < ldy && m * ldy + n < (p.c.m - 1) * ldy + p.c.n; ++n) {
      const float got = pc::load_float(y.data(), m * ldy + n, p.c.dtype);
      if (n >= p.c.n) {
        if (got != mark) return fail(p, isa, what, "wrote between the rows of y");
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

void mark_all(Exact<char>& y, Dtype dtype) {
  for (int64_t i = 0; i < y.count() / pc::dtype_size(dtype); ++i) pc::store_float(y.data(), i, dtype, kMark);
}

int64_t y_elements(const Case& c, int64_t ldy) { return c.m * c.n == 0 ? 0 : (c.m - 1) * ldy + c.n; }

// run() takes its scratch from a buffer rounded up to pages, where the sanitizer sees no overrun: this is the same with
// one thread and every array of exactly the size that Block promises.
void run_exact(const im::Args& a, const im::Prepared& prepared) {
  const im::Kernel& kernel = *prepared.kernel;
  const int64_t padded = im::padded_n(kernel.layout, a.n);
  Exact<float> scale(padded), bias(padded);
  for (int64_t n = 0; n < padded; ++n) {
    scale[n] = n < a.n ? a.weight_scale[n] : 0.0f;
    bias[n] = n < a.n && a.bias != nullptr ? pc::load_float(a.bias, n, a.bias_dtype) : 0.0f;
  }
  Exact<char> scratch(kernel.scratch_bytes(a.mode, a.k));
  const bool is_static = a.mode == Mode::static_;
  kernel.run({&a,
              prepared.weight,
              bias.data(),
              scale.data(),
              is_static ? *a.input_scale : 0.0f,
              is_static ? *a.input_zero_point - 128 : 0,
              {0, a.m},
              {0, im::panel_count(kernel.layout, a.n)},
              scratch.data()});
}

void test_case(const Case& c, const std::vector<std::string>& isas) {
  Problem p(c);
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    const im::Layout& layout = im::best_kernel().layout;
    Exact<char> packed(im::packed_bytes(layout, c.n, c.k));
    im::pack(layout, p.weight.data(), c.n, c.k, c.k, packed.data());
    Exact<int8_t> back(c.n * c.k);
    im::unpack(im::open_packed(packed.data(), packed.count()), back.data(), c.k);
    if (c.n * c.k > 0 && std::memcmp(back.data(), p.weight.data(), size_t(c.n * c.k)) != 0) {
      fail(p, isa.c_str(), "unpack", "is not what was packed");
    }
    const im::Prepared prepared = im::prepare(packed.data(), packed.count());
    for (const int64_t gap : {0, 3}) {
      const int64_t ldy = c.n + gap;
      Exact<char> y(y_elements(c, ldy) * pc::dtype_size(c.dtype));
      mark_all(y, c.dtype);
      im::run(p.args(y.data(), ldy), prepared);
      compare(p, isa.c_str(), "run", y, ldy);
      if (c.m * c.n == 0 || gap != 0) continue;
      mark_all(y, c.dtype);
      run_exact(p.args(y.data(), ldy), prepared);
      compare(p, isa.c_str(), "kernel", y, ldy);
    }
  }
}

// ---- cases -----------------------------------------------------------------------------------------------------

// Options are dealt in turn, each with a period of its own, so that a few hundred shapes meet every pair of them.
Case deal(int64_t m, int64_t n, int64_t k, int64_t turn) {
  Case c{m, n, k};
  c.mode = Mode(turn % 3);
  c.dtype = Dtype(turn / 3 % 3);
  c.activation = Activation(turn % 5);
  c.bias = int(turn % 4) - 1;
  c.view = int(turn % 7 == 6 ? 0 : turn % 8);
  return c;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  int64_t turn = 0;
  for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 11, 13}) {
    for (int64_t n : {1, 7, 8, 9, 15, 16, 17, 31, 33, 47, 49, 63, 64, 65, 130}) {
      for (int64_t k : {1, 2, 3, 4, 5, 63, 64, 65, 131}) cases.push_back(deal(m, n, k, turn++));
    }
  }
  for (int mode = 0; mode < 3; ++mode) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (int activation = 0; activation < 5; ++activation) {
        for (int bias = -1; bias < 3; ++bias) {
          cases.push_back({7, 83, 75, Mode(mode), Dtype(dtype), Activation(activation), bias});
        }
      }
      for (int view = 0; view < 8; ++view) {
        cases.push_back({9, 40, 133, Mode(mode), Dtype(dtype), Activation::none, 0, view});
      }
      cases.push_back({400, 20, 700, Mode(mode), Dtype(dtype)});  // more rows than one pass prepares
    }
    for (int64_t zero = 0; zero < 3; ++zero) {
      cases.push_back({zero == 0 ? 0 : 5, zero == 1 ? 0 : 20, zero == 2 ? 0 : 30, Mode(mode)});
    }
    for (int threads : {2, 3, 5}) {
      for (const auto& shape : {std::array<int64_t, 3>{1, 900, 400}, {150, 100, 200}, {33, 300, 300}, {3, 65, 2000}}) {
        Case c{shape[0], shape[1], shape[2], Mode(mode)};
        c.threads = threads;
        cases.push_back(c);
      }
    }
    Case large{14, 2100, 4096, Mode(mode)};  // above kStreamBytes: the next panel is fetched ahead
    large.threads = 2;
    cases.push_back(large);
    for (int64_t k : {im::kMaxChunkK - 1, im::kMaxChunkK, im::kMaxChunkK + 1, 2 * im::kMaxChunkK + 5}) {
      Case c{7, 18, k, Mode(mode)};
      cases.push_back(c);
      c.extreme = mode != int(Mode::weight_only);
      c.m = 1;
      cases.push_back(c);
    }
  }
  return cases;
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

void test_packed_errors() {
  Problem p({2, 20, 30});
  const im::Layout& layout = im::best_kernel().layout;
  const int64_t bytes = im::packed_bytes(layout, 20, 30);
  Exact<char> packed(bytes);
  im::pack(layout, p.weight.data(), 20, 30, 30, packed.data());
  for (int64_t i = 0; i < int64_t(sizeof(im::PackedHeader)); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      packed[i] = char(packed[i] ^ (1 << bit));
      expect_error("header bit", "pack it again", [&] { im::prepare(packed.data(), bytes); });
      packed[i] = char(packed[i] ^ (1 << bit));
    }
  }
  for (int64_t size : {int64_t(0), int64_t(63), int64_t(64), bytes - 1}) {
    Exact<char> part(size);
    std::memcpy(part.data(), packed.data(), size_t(size));
    expect_error("truncated", "pack it again", [&] { im::prepare(part.data(), size); });
  }
  Exact<char> shifted(bytes + 1);
  std::memcpy(shifted.data() + 1, packed.data(), size_t(bytes));
  expect_error("misaligned", "64-byte aligned", [&] { im::open_packed(shifted.data() + 1, bytes); });
  expect_error("K too large", "out of range", [&] { im::packed_bytes(layout, 1, im::kMaxK + 1); });
  expect_error("negative N", "out of range", [&] { im::packed_bytes(layout, -1, 1); });
}

void test_argument_errors() {
  Problem p({2, 20, 30});
  Exact<char> packed(im::packed_bytes(im::best_kernel().layout, 20, 30)), y(2 * 20 * 4);
  im::pack(im::best_kernel().layout, p.weight.data(), 20, 30, 30, packed.data());
  const im::Prepared prepared = im::prepare(packed.data(), packed.count());
  const im::Args good = p.args(y.data(), 20);
  static const float bad_scales[] = {0.0f, -1.0f, NAN, INFINITY, 1e-40f};
  static const float one = 1.0f;
  static const int32_t bad_zero_points[] = {-1, 256}, zero = 0;
  const std::pair<const char*, std::function<void(im::Args&)>> changes[] = {
      {"M=-1", [](im::Args& a) { a.m = -1; }},
      {"threads=0", [](im::Args& a) { a.threads = 0; }},
      {"x has K=31 but weight has K=30", [](im::Args& a) { a.k = 31; }},
      {"N=21 but weight has N=20", [](im::Args& a) { a.n = a.ldy = 21; }},
      {"inner_rows=0", [](im::Args& a) { a.inner_rows = 0; }},
      {"ldy=19 is less", [](im::Args& a) { a.ldy = 19; }},
      {"x is missing", [](im::Args& a) { a.x = nullptr; }},
      {"y or weight_scale is missing", [](im::Args& a) { a.y = nullptr; }},
      {"y or weight_scale is missing", [](im::Args& a) { a.weight_scale = nullptr; }},
      {"belong to static mode", [](im::Args& a) { a.input_scale = &one; }},
      {"needs input_scale", [](im::Args& a) { a.mode = Mode::static_; }},
  };
  for (const auto& [message, change] : changes) {
    im::Args a = good;
    change(a);
    expect_error(message, message, [&] { im::run(a, prepared); });
  }
  for (int i = 0; i < 7; ++i) {
    im::Args a = good;
    a.mode = Mode::static_;
    a.input_scale = i < 5 ? &bad_scales[i] : &one;
    a.input_zero_point = i < 5 ? &zero : &bad_zero_points[i - 5];
    expect_error("static", i < 5 ? "a positive normal number" : "expected 0 to 255", [&] { im::run(a, prepared); });
  }
  setenv("PYCOMPRESS_ISA", "avx1024", 1);
  expect_error("unknown ISA", "unknown instruction set", [] { im::best_kernel(); });
  unsetenv("PYCOMPRESS_ISA");
}

// ---- NaN and Inf, callers in parallel --------------------------------------------------------------------------

void test_bad_rows(const char* isa) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY}) {
    for (int turn = 0; turn < 6; ++turn) {  // dynamic and static, each dtype
      Problem p({8, 70, 100, Mode(turn % 2), Dtype(turn / 2), Activation::relu});
      pc::store_float(p.x_memory.data(), p.index(3, turn == 0 ? 0 : 99), p.c.dtype, bad);
      Exact<char> packed(im::packed_bytes(im::best_kernel().layout, 70, 100));
      im::pack(im::best_kernel().layout, p.weight.data(), 70, 100, 100, packed.data());
      Exact<char> y(8 * 70 * pc::dtype_size(p.c.dtype));
      im::run(p.args(y.data(), 70), im::prepare(packed.data(), packed.count()));
      for (int64_t i = 0; i < 8 * 70; ++i) {
        const float got = pc::load_float(y.data(), i, p.c.dtype);
        const bool right =
            i / 70 == 3 ? std::isnan(got) : std::fabs(got - p.expected[size_t(i)]) <= allowed_error(p, i);
        if (!right) {
          fail(p, isa, "bad row", "y[" + std::to_string(i) + "] = " + std::to_string(got));
          break;
        }
      }
    }
  }
}

void test_callers_in_parallel(const char* isa) {
  Case c{60, 200, 300};
  c.threads = 2;
  Problem p(c);
  Exact<char> packed(im::packed_bytes(im::best_kernel().layout, c.n, c.k));
  im::pack(im::best_kernel().layout, p.weight.data(), c.n, c.k, c.k, packed.data());
  const im::Prepared prepared = im::prepare(packed.data(), packed.count());
  Exact<char> y0(c.m * c.n * 4), y1(c.m * c.n * 4), y2(c.m * c.n * 4);
  Exact<char>* const results[] = {&y0, &y1, &y2};
  std::vector<std::thread> callers;
  for (Exact<char>* y : results) {
    callers.emplace_back([&, y] {
      for (int i = 0; i < 20; ++i) im::run(p.args(y->data(), c.n), prepared);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (Exact<char>* y : results) compare(p, isa, "callers in parallel", *y, c.n);
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
    test_packed_errors();
    test_bad_rows(isa.c_str());
    test_callers_in_parallel(isa.c_str());
    std::printf("%-11s %-28s %zu cases\n", isa.c_str(), im::best_kernel().name, cases.size());
  }
  unsetenv("PYCOMPRESS_ISA");
  test_argument_errors();
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
