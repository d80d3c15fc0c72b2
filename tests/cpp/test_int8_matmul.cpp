// Every kernel that this CPU has, against the formula of int8_matmul.h in float64. `make cpp-test` runs it under the
// address and undefined-behaviour sanitizers, and so every buffer has exactly the size that the contract asks for: one
// element read or written beyond it stops the test. What may not be read inside a buffer (gaps between strided rows) is
// NaN, and what may not be written keeps a mark.
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/check.h"
#include "common/memory.h"
#include "int8_matmul/int8_matmul.h"

namespace pc = pycompress;
namespace im = pycompress::int8_matmul;
using im::Activation;
using im::Mode;
using pc::Dtype;

namespace {

std::mt19937 generator(1);
int failures = 0;

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Exactly `count` elements, aligned like a packed weight. std::vector would round the allocation up.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t count) : count_(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, pc::kAlignment, size_t(count) * sizeof(T)) != 0) std::abort();
    data_ = static_cast<T*>(memory);
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { std::free(data_); }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t count() const { return count_; }

 private:
  T* data_;
  int64_t count_;
};

// Strides of x in elements; the smallest of the addresses is the start of the buffer.
struct View {
  const char* name;
  int64_t inner_rows, outer_stride, row_stride, col_stride;
};

std::vector<View> views(int64_t m, int64_t k) {
  return {{"contiguous", m > 0 ? m : 1, 0, k, 1},
          {"rows apart", m > 0 ? m : 1, 0, k + 3, 1},
          {"columns apart", m > 0 ? m : 1, 0, 2 * k + 1, 2},
          {"transposed", m > 0 ? m : 1, 0, 1, m},
          {"two levels", 2, 3 * k + 5, k + 1, 1},
          {"one row for all", m > 0 ? m : 1, 0, 0, 1},
          {"one column for all", m > 0 ? m : 1, 0, 1, 0},
          {"backwards", m > 0 ? m : 1, 0, -(k + 2), -1}};
}

struct Case {
  int64_t m, n, k;
  Mode mode = Mode::dynamic_;
  Dtype dtype = Dtype::f32;
  Activation activation = Activation::none;
  int bias = 0;  // -1: none, else its Dtype
  int view = 0;  // index into views()
  int threads = 1;
  bool extreme = false;  // +-127 throughout and scales of 1: sums at the edge of the integers
};

constexpr float kInputScale = 0.03f;

// Everything that a call reads, and the result that it must give.
struct Problem {
  Case c;
  View view;
  int64_t x_offset = 0;  // of x[0,0] in x_memory
  Exact<char> x_memory;
  Exact<int8_t> weight;
  Exact<float> weight_scale;
  Exact<char> bias_memory;
  float input_scale;
  int32_t input_zero_point = 0;
  std::vector<double> expected, magnitude;  // [M,N]; magnitude: of the terms that met in the sum

  int64_t index(int64_t m, int64_t k) const {
    return x_offset + m / view.inner_rows * view.outer_stride + m % view.inner_rows * view.row_stride +
           k * view.col_stride;
  }
  float x(int64_t m, int64_t k) { return pc::load_float(x_memory.data(), index(m, k), c.dtype); }
  float bias(int64_t n) { return c.bias < 0 ? 0.0f : pc::load_float(bias_memory.data(), n, Dtype(c.bias)); }

  explicit Problem(const Case& wanted);
  void solve();
  im::Args args(void* y, int64_t ldy);
};

// Elements between the lowest and the highest address of x; how far below x[0,0] the lowest is.
std::pair<int64_t, int64_t> extent(const Case& c, const View& v) {
  if (c.m == 0 || c.k == 0) return {0, 0};
  int64_t low = 0, high = 0;
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t k : {int64_t(0), c.k - 1}) {
      const int64_t at = m / v.inner_rows * v.outer_stride + m % v.inner_rows * v.row_stride + k * v.col_stride;
      low = std::min(low, at);
      high = std::max(high, at);
    }
  }
  return {high - low + 1, -low};
}

Problem::Problem(const Case& wanted)
    : c(wanted),
      view(views(c.m, c.k)[size_t(c.view)]),
      x_memory(extent(c, view).first * pc::dtype_size(c.dtype)),
      weight(c.n * c.k),
      weight_scale(c.n),
      bias_memory(c.bias < 0 ? 0 : c.n * pc::dtype_size(Dtype(c.bias))),
      input_scale(c.extreme ? 1.0f : kInputScale) {
  x_offset = extent(c, view).second;
  const int64_t elements = extent(c, view).first;
  for (int64_t i = 0; i < elements; ++i) pc::store_float(x_memory.data(), i, c.dtype, NAN);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t k = 0; k < c.k; ++k) {
      const double value = c.extreme ? 127.0 : uniform(-3, 3);
      pc::store_float(x_memory.data(), index(m, k), c.dtype, float(value));
    }
  }
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    weight[i] = int8_t(c.extreme ? (i / c.k % 2 == 0 ? 127 : -128) : draw(-128, 127));
  }
  for (int64_t n = 0; n < c.n; ++n) {
    weight_scale[n] = c.extreme ? 1.0f : float(uniform(0.001, 0.01));
    if (c.bias >= 0) pc::store_float(bias_memory.data(), n, Dtype(c.bias), float(uniform(-2, 2)));
  }
  if (c.mode == Mode::static_) input_zero_point = c.extreme ? 0 : int32_t(draw(0, 255));
  solve();
}

double activate(double v, Activation activation) {
  switch (activation) {
    case Activation::relu: return v < 0 ? 0 : v;
    case Activation::gelu: return 0.5 * v * (1 + std::erf(v * std::sqrt(0.5)));
    case Activation::gelu_tanh:
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    case Activation::silu: return v / (1 + std::exp(-v));
    default: return v;
  }
}

// int8_matmul.h, line by line: float32 where it rounds to an integer, float64 elsewhere.
void Problem::solve() {
  expected.assign(size_t(c.m * c.n), 0.0);
  magnitude.assign(size_t(c.m * c.n), 0.0);
  std::vector<double> row(static_cast<size_t>(c.k));
  for (int64_t m = 0; m < c.m; ++m) {
    float largest = 0, x_scale = 1;
    for (int64_t k = 0; k < c.k; ++k) largest = std::max(largest, std::fabs(x(m, k)));
    if (c.mode == Mode::dynamic_) x_scale = std::max(largest / 127.0f, FLT_MIN);
    if (c.mode == Mode::static_) x_scale = input_scale;
    const float inverse = 1.0f / x_scale;
    for (int64_t k = 0; k < c.k; ++k) {
      double q = x(m, k);
      if (c.mode != Mode::weight_only) q = std::nearbyint(x(m, k) * inverse);
      if (c.mode == Mode::static_) q = std::min(std::max(q + input_zero_point, 0.0), 255.0) - input_zero_point;
      row[size_t(k)] = q;
    }
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0, terms = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        sum += row[size_t(k)] * weight[n * c.k + k];
        terms += std::fabs(row[size_t(k)] * weight[n * c.k + k]);
      }
      const double scale = double(x_scale) * weight_scale[n];
      const auto at = size_t(m * c.n + n);
      expected[at] = activate(sum * scale + bias(n), c.activation);
      // An integer sum is exact, whatever cancelled in it.
      magnitude[at] = (c.mode == Mode::weight_only ? terms : std::fabs(sum)) * scale + std::fabs(bias(n));
    }
  }
}

im::Args Problem::args(void* y, int64_t ldy) {
  im::Args a;
  a.mode = c.mode;
  a.activation = c.activation;
  a.threads = c.threads;
  a.x = x_memory.data() + x_offset * pc::dtype_size(c.dtype);
  a.dtype = c.dtype;
  a.m = c.m;
  a.k = c.k;
  a.inner_rows = view.inner_rows;
  a.outer_stride = view.outer_stride;
  a.row_stride = view.row_stride;
  a.col_stride = view.col_stride;
  a.weight_scale = weight_scale.data();
  a.bias = c.bias < 0 ? nullptr : bias_memory.data();
  a.bias_dtype = c.bias < 0 ? Dtype::f32 : Dtype(c.bias);
  if (c.mode == Mode::static_) {
    a.input_scale = &input_scale;
    a.input_zero_point = &input_zero_point;
  }
  a.y = y;
  a.n = c.n;
  a.ldy = ldy;
  return a;
}

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
