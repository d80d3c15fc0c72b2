// Every kernel that this CPU has, against the formula of int4_matmul.h in float64. As in test_int8_matmul.cpp every
// buffer has exactly the size that the contract asks for, and the sanitizers see what is read or written beyond it.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "common/check.h"
#include "int4_matmul_problem.h"

namespace {

int failures = 0;

void fail(const Int4Problem& p, const char* isa, const char* what, const std::string& detail) {
  const Int4Case& c = p.c;
  std::printf(
      "FAILED %s, %s: M=%lld N=%lld K=%lld group=%lld weights=%d dtype=%d activation=%d bias=%d view=%s threads=%d "
      "skewed=%d: %s\n",
      isa, what, (long long)c.m, (long long)c.n, (long long)c.k, (long long)c.group_size, int(c.weights), int(c.dtype),
      int(c.activation), c.bias, p.view.name, c.threads, int(c.skewed), detail.c_str());
  ++failures;
}

// The bound of tests/oracle.py for a float32 sum, and the rounding of y's dtype.
double allowed_error(const Int4Problem& p, size_t at) {
  const double expected = std::fabs(p.expected[at]);
  const double roundoff = p.c.dtype == Dtype::f32 ? 0 : (p.c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11);
  return 0x1p-24 * (8 + 2 * std::sqrt(double(p.c.k))) * (p.magnitude[at] + expected) + 2 * roundoff * expected +
         0x1p-24;
}

constexpr float kMark = 12345.0f;  // exact in float32, and what it rounds to in the others is as good

void compare(const Int4Problem& p, const char* isa, const char* what, Exact<char>& y, int64_t ldy) {
  char bytes[4];
  pc::store_float(bytes, 0, p.c.dtype, kMark);
  const float mark = pc::load_float(bytes, 0, p.c.dtype);
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

// run() takes its scratch from a buffer rounded up to pages, where the sanitizer sees no overrun: this is the same with
// one thread and every array of exactly the size that Block promises.
void run_exact(const i4::Args& a, const i4::Prepared& prepared) {
  const i4::Kernel& kernel = *prepared.kernel;
  const int64_t padded = i4::padded_n(kernel.layout, a.n);
  Exact<float> bias(padded);
  for (int64_t n = 0; n < padded; ++n) {
    bias[n] = n < a.n && a.bias != nullptr ? pc::load_float(a.bias, n, a.bias_dtype) : 0.0f;
  }
  Exact<char> scratch(kernel.scratch_bytes(a.m, prepared.weight.shape));
  kernel.run({&a, prepared.weight, bias.data(), {0, a.m}, {0, i4::panel_count(kernel.layout, a.n)}, scratch.data()});
}

template <class T>
bool same(const Exact<T>& a, const Exact<T>& b) {
  return a.count() == 0 || std::memcmp(a.data(), b.data(), size_t(a.count()) * sizeof(T)) == 0;
}

void test_unpack(Int4Problem& p, const char* isa, const Exact<char>& packed) {
  const i4::PackedWeight weight = i4::open_packed(packed.data(), packed.count());
  Exact<uint8_t> q(p.q.count()), zero_point(p.zero_point.count());
  Exact<float> scale(p.scale.count());
  i4::unpack(weight, q.data(), scale.data(), zero_point.data());
  const i4::Shape& s = weight.shape;
  if (!same(q, p.q) || !same(scale, p.scale) || !same(zero_point, p.zero_point) || s.n != p.c.n || s.k != p.c.k ||
      s.group_size != p.c.group_size || s.format != p.shape().format || s.has_zero_point != p.shape().has_zero_point) {
    fail(p, isa, "unpack", "is not what was packed");
  }
}

void test_case(const Int4Case& c, const std::vector<std::string>& isas) {
  Int4Problem p(c);
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    const i4::Layout& layout = i4::best_kernel().layout;
    Exact<char> packed(i4::packed_bytes(layout, p.shape()));
    std::memset(packed.data(), 0xff, size_t(packed.count()));  // NaN scales, should one be left there
    i4::pack(layout, p.shape(), p.plain(), packed.data());
    test_unpack(p, isa.c_str(), packed);
    const i4::Prepared prepared = i4::prepare(packed.data(), packed.count());
    Exact<char> first(c.m * c.n * pc::dtype_size(c.dtype));
    for (const int64_t gap : {0, 3}) {
      const int64_t ldy = c.n + gap;
      Exact<char> y((c.m * c.n == 0 ? 0 : (c.m - 1) * ldy + c.n) * pc::dtype_size(c.dtype));
      mark_all(y, c.dtype);
      i4::run(p.args(y.data(), ldy), prepared);
      compare(p, isa.c_str(), "run", y, ldy);
      if (gap == 0) std::memcpy(first.data(), y.data(), size_t(y.count()));
      if (c.m * c.n == 0 || gap != 0) continue;
      mark_all(y, c.dtype);
      run_exact(p.args(y.data(), ldy), prepared);
      compare(p, isa.c_str(), "kernel", y, ldy);
      if (!same(first, y)) fail(p, isa.c_str(), "threads", "one thread gives other bits");
    }
  }
}

// ---- cases -----------------------------------------------------------------------------------------------------

// Options are dealt in turn, each with a period of its own, so that a few hundred shapes meet every pair of them.
Int4Case deal(int64_t m, int64_t n, int64_t k, int64_t turn) {
  constexpr int64_t kGroups[] = {32, 1, 128, 8, 5, 16, 100000, 24, 33, 7, 64};
  Int4Case c{m, n, k, kGroups[turn % 11]};
  c.weights = Weights(turn % 3);
  c.dtype = Dtype(turn / 3 % 3);
  c.activation = Activation(turn % 5);
  c.bias = int(turn % 4) - 1;
  c.view = int(turn % 7 == 6 ? 0 : turn % 8);
  c.skewed = turn % 13 == 5;
  return c;
}

std::vector<Int4Case> all_cases() {
  std::vector<Int4Case> cases;
  int64_t turn = 0;
  for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 12, 13, 17}) {
    for (int64_t n : {1, 7, 8, 9, 16, 17, 31, 33, 49, 63, 64, 65, 130}) {
      for (int64_t k : {1, 2, 3, 7, 8, 9, 65, 131}) cases.push_back(deal(m, n, k, turn++));
    }
  }
  for (int weights = 0; weights < 3; ++weights) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (int activation = 0; activation < 5; ++activation) {
        for (int bias = -1; bias < 3; ++bias) {
          cases.push_back({7, 83, 75, 32, Weights(weights), Dtype(dtype), Activation(activation), bias});
        }
      }
      for (int view = 0; view < 8; ++view) {
        for (int64_t m : {9, 21}) {
          cases.push_back({m, 40, 133, 20, Weights(weights), Dtype(dtype), Activation::none, 0, view});
        }
      }
      cases.push_back({400, 20, 700, 64, Weights(weights), Dtype(dtype)});  // more rows than a pass holds
    }
    for (int64_t zero = 0; zero < 3; ++zero) {
      cases.push_back({zero == 0 ? 0 : 5, zero == 1 ? 0 : 20, zero == 2 ? 0 : 30, 16, Weights(weights)});
    }
    for (int threads : {2, 3, 5}) {
      for (const auto& shape : {std::array<int64_t, 3>{1, 900, 400}, {150, 100, 200}, {33, 300, 300}, {3, 65, 2000}}) {
        Int4Case c{shape[0], shape[1], shape[2], 48, Weights(weights)};
        c.threads = threads;
        cases.push_back(c);
      }
    }
    for (int64_t m : {1, 7, 20}) {
      for (int64_t group : {128, 5000}) {  // 5000: a group of several segments
        Int4Case c{m, 70, 5000, group, Weights(weights)};
        cases.push_back(c);
        c.skewed = true;
        cases.push_back(c);
      }
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
  Int4Problem p({2, 20, 30, 8, Weights::asymmetric});
  const i4::Layout& layout = i4::best_kernel().layout;
  const int64_t bytes = i4::packed_bytes(layout, p.shape());
  Exact<char> packed(bytes);
  i4::pack(layout, p.shape(), p.plain(), packed.data());
  for (int64_t i = 0; i < int64_t(sizeof(i4::PackedHeader)); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      packed[i] = char(packed[i] ^ (1 << bit));
      expect_error("header bit", "pack it again", [&] { i4::prepare(packed.data(), bytes); });
      packed[i] = char(packed[i] ^ (1 << bit));
    }
  }
  for (int64_t size : {int64_t(0), int64_t(63), int64_t(64), bytes - 1}) {
    Exact<char> part(size);
    std::memcpy(part.data(), packed.data(), size_t(size));
    expect_error("truncated", "pack it again", [&] { i4::prepare(part.data(), size); });
  }
  Exact<char> shifted(bytes + 1);
  std::memcpy(shifted.data() + 1, packed.data(), size_t(bytes));
  expect_error("misaligned", "64-byte aligned", [&] { i4::open_packed(shifted.data() + 1, bytes); });
  const auto refuse = [&](const char* message, const i4::Shape& s) {
    expect_error(message, message, [&] { i4::packed_bytes(layout, s); });
  };
  refuse("out of range", {1, i4::kMaxK + 1, 32});
  refuse("out of range", {-1, 1, 32});
  refuse("group_size=0", {1, 1, 0});
  refuse("group_size=-1", {1, 1, -1});
  refuse("belong to the format int4", {1, 1, 1, i4::Format::nf4, true});
  expect_error("no zero points", "zero points are missing",
               [&] { i4::pack(layout, p.shape(), {p.q.data(), p.scale.data(), nullptr}, packed.data()); });
}

void test_argument_errors() {
  Int4Problem p({2, 20, 30});
  const i4::Layout& layout = i4::best_kernel().layout;
  Exact<char> packed(i4::packed_bytes(layout, p.shape())), y(2 * 20 * 4);
  i4::pack(layout, p.shape(), p.plain(), packed.data());
  const i4::Prepared prepared = i4::prepare(packed.data(), packed.count());
  static const float one = 1.0f;
  const std::pair<const char*, std::function<void(i4::Args&)>> changes[] = {
      {"M=-1", [](i4::Args& a) { a.m = -1; }},
      {"threads=0", [](i4::Args& a) { a.threads = 0; }},
      {"x has K=31 but weight has K=30", [](i4::Args& a) { a.k = 31; }},
      {"N=21 but weight has N=20", [](i4::Args& a) { a.n = a.ldy = 21; }},
      {"inner_rows=0", [](i4::Args& a) { a.inner_rows = 0; }},
      {"ldy=19 is less", [](i4::Args& a) { a.ldy = 19; }},
      {"x is missing", [](i4::Args& a) { a.x = nullptr; }},
      {"y is missing", [](i4::Args& a) { a.y = nullptr; }},
      {"weight_scale must be null", [](i4::Args& a) { a.weight_scale = &one; }},
  };
  for (const auto& [message, change] : changes) {
    i4::Args a = p.args(y.data(), 20);
    change(a);
    expect_error(message, message, [&] { i4::run(a, prepared); });
  }
}

// ---- NaN and Inf, layouts of other instruction sets ------------------------------------------------------------

// In their own row only, wherever they are, and there all outputs are NaN or infinite: no weight is 0.
void test_bad_rows(const char* isa) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY}) {
    for (int turn = 0; turn < 36; ++turn) {
      Int4Problem p(
          {turn / 9 % 2 == 0 ? 8 : 20, 70, 101, turn / 18 == 0 ? 32 : 13, Weights(turn % 3), Dtype(turn / 3 % 3)});
      for (int64_t i = 0; i < p.q.count(); ++i) p.q[i] = 0x31;
      for (int64_t i = 0; i < p.zero_point.count(); ++i) p.zero_point[i] = 2;
      p.solve();
      pc::store_float(p.x_memory.data(), p.index(3, turn % 2 == 0 ? 0 : 100), p.c.dtype, bad);
      const i4::Layout& layout = i4::best_kernel().layout;
      Exact<char> packed(i4::packed_bytes(layout, p.shape()));
      i4::pack(layout, p.shape(), p.plain(), packed.data());
      Exact<char> y(p.c.m * 70 * pc::dtype_size(p.c.dtype));
      i4::run(p.args(y.data(), 70), i4::prepare(packed.data(), packed.count()));
      for (int64_t i = 0; i < p.c.m * 70; ++i) {
        const float got = pc::load_float(y.data(), i, p.c.dtype);
        const bool right =
            i / 70 == 3 ? !std::isfinite(got) : std::fabs(got - p.expected[size_t(i)]) <= allowed_error(p, size_t(i));
        if (!right) {
          fail(p, isa, "bad row", "y[" + std::to_string(i) + "] = " + std::to_string(got));
          break;
        }
      }
    }
  }
}

// The scalar kernel reads what any other packed.
void test_foreign_layouts() {
  setenv("PYCOMPRESS_ISA", "scalar", 1);
  for (const i4::Layout& layout : i4::kLayouts) {
    Int4Problem p({5, 70, 90, 20, Weights::asymmetric});
    Exact<char> packed(i4::packed_bytes(layout, p.shape())), y(5 * 70 * 4);
    i4::pack(layout, p.shape(), p.plain(), packed.data());
    test_unpack(p, "scalar", packed);
    i4::run(p.args(y.data(), 70), i4::prepare(packed.data(), packed.count()));
    compare(p, "scalar", "foreign layout", y, 70);
  }
}

}  // namespace

int main() {
  std::vector<std::string> isas;
  unsetenv("PYCOMPRESS_ISA");
  for (pc::Isa isa : pc::available_isas()) isas.emplace_back(pc::isa_name(isa));

  const std::vector<Int4Case> cases = all_cases();
  for (const Int4Case& c : cases) test_case(c, isas);
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    test_packed_errors();
    test_bad_rows(isa.c_str());
    std::printf("%-11s %-28s %zu cases\n", isa.c_str(), i4::best_kernel().name, cases.size());
  }
  test_foreign_layouts();
  unsetenv("PYCOMPRESS_ISA");
  test_argument_errors();
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
