// A call of int8_matmul drawn at random, in buffers of exactly the size that the contract asks for, and what it must give:
// the formula of int8_matmul.h in float64. Shares no code with the kernels but the element conversions of dtype.h.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "common/memory.h"
#include "int8_matmul/int8_matmul.h"

namespace pc = pycompress;
namespace im = pycompress::int8_matmul;
using im::Activation;
using im::Mode;
using pc::Dtype;

namespace {

std::mt19937 generator(1);

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
  Exact(const T* values, int64_t count) : Exact(count) { std::copy_n(values, count, data_); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { std::free(data_); }
  T* data() { return data_; }
  const T* data() const { return data_; }
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

inline Problem::Problem(const Case& wanted)
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

inline im::Args Problem::args(void* y, int64_t ldy) {
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

}  // namespace
