// A call of int4_matmul drawn at random, in buffers of exactly the size that the contract asks for, and what it must
// give: the formula of int4_matmul.h in float64. Shares no code with the kernels but the conversions of dtype.h.
#pragma once

#include "int4_matmul/int4_matmul.h"
#include "int8_matmul_problem.h"

namespace i4 = pycompress::int4_matmul;

namespace {

enum class Weights { symmetric, asymmetric, nf4 };

struct Int4Case {
  int64_t m, n, k, group_size = 32;
  Weights weights = Weights::symmetric;
  Dtype dtype = Dtype::f32;
  Activation activation = Activation::none;
  int bias = 0;  // -1: none, else its Dtype
  int view = 0;  // index into views()
  int threads = 1;
  bool skewed = false;  // x has a mean, and nearly all weights are exactly 0: what a detour over sums of x would lose
};

struct Int4Problem {
  Int4Case c;
  int64_t groups;
  View view;
  int64_t x_offset = 0;  // of x[0,0] in x_memory
  Exact<char> x_memory;
  Exact<uint8_t> q;
  Exact<float> scale;
  Exact<uint8_t> zero_point;  // none unless asymmetric
  Exact<char> bias_memory;
  std::vector<double> expected, magnitude;  // [M,N]; magnitude: of the terms that met in the sum

  int64_t index(int64_t m, int64_t k) const {
    return x_offset + m / view.inner_rows * view.outer_stride + m % view.inner_rows * view.row_stride +
           k * view.col_stride;
  }
  float x(int64_t m, int64_t k) { return pc::load_float(x_memory.data(), index(m, k), c.dtype); }
  float bias(int64_t n) { return c.bias < 0 ? 0.0f : pc::load_float(bias_memory.data(), n, Dtype(c.bias)); }
  double weight(int64_t n, int64_t k) {
    const int64_t g = n * groups + k / c.group_size;
    const int value = q[n * ((c.k + 1) / 2) + k / 2] >> (k % 2 * 4) & 15;
    if (c.weights == Weights::nf4) return double(i4::kNf4[value]) * scale[g];
    return double(value - (c.weights == Weights::asymmetric ? int(zero_point[g]) : 8)) * scale[g];
  }
  i4::Shape shape() const {
    return {c.n, c.k, c.group_size, c.weights == Weights::nf4 ? i4::Format::nf4 : i4::Format::int4,
            c.weights == Weights::asymmetric};
  }
  i4::PlainWeight plain() const {
    return {q.data(), scale.data(), c.weights == Weights::asymmetric ? zero_point.data() : nullptr};
  }

  explicit Int4Problem(const Int4Case& wanted);
  void draw_weights();
  void solve();
  i4::Args args(void* y, int64_t ldy);
};

int64_t group_count(const Int4Case& c) { return (c.k + c.group_size - 1) / c.group_size; }

inline Int4Problem::Int4Problem(const Int4Case& wanted)
    : c(wanted),
      groups(group_count(c)),
      view(views(c.m, c.k)[size_t(c.view)]),
      x_memory(extent({c.m, c.n, c.k}, view).first * pc::dtype_size(c.dtype)),
      q(c.n * ((c.k + 1) / 2)),
      scale(c.n * groups),
      zero_point(c.weights == Weights::asymmetric ? c.n * groups : 0),
      bias_memory(c.bias < 0 ? 0 : c.n * pc::dtype_size(Dtype(c.bias))) {
  const auto [elements, offset] = extent({c.m, c.n, c.k}, view);
  x_offset = offset;
  for (int64_t i = 0; i < elements; ++i) pc::store_float(x_memory.data(), i, c.dtype, NAN);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t k = 0; k < c.k; ++k) {
      pc::store_float(x_memory.data(), index(m, k), c.dtype, float(uniform(-3, 3) + (c.skewed ? 1000 : 0)));
    }
  }
  for (int64_t n = 0; n < c.n && c.bias >= 0; ++n) {
    pc::store_float(bias_memory.data(), n, Dtype(c.bias), c.skewed ? 0.0f : float(uniform(-2, 2)));
  }
  draw_weights();
  solve();
}

inline void Int4Problem::draw_weights() {
  for (int64_t i = 0; i < scale.count(); ++i) scale[i] = float(uniform(0.01, 0.1));
  for (int64_t i = 0; i < zero_point.count(); ++i) zero_point[i] = uint8_t(draw(0, 15));
  for (int64_t i = 0; i < q.count(); ++i) q[i] = 0;
  for (int64_t n = 0; n < c.n; ++n) {
    for (int64_t k = 0; k < c.k; ++k) {
      const int zero = c.weights == Weights::asymmetric ? zero_point[n * groups + k / c.group_size]
                                                        : (c.weights == Weights::nf4 ? 7 : 8);
      const int value = c.skewed && k % c.group_size != 0 ? zero : int(draw(0, 15));
      uint8_t& byte = q[n * ((c.k + 1) / 2) + k / 2];
      byte = uint8_t(byte | value << (k % 2 * 4));
    }
  }
}

inline void Int4Problem::solve() {
  expected.assign(size_t(c.m * c.n), 0.0);
  magnitude.assign(size_t(c.m * c.n), 0.0);
  for (int64_t n = 0; n < c.n; ++n) {
    std::vector<double> row(static_cast<size_t>(c.k));
    for (int64_t k = 0; k < c.k; ++k) row[size_t(k)] = weight(n, k);
    for (int64_t m = 0; m < c.m; ++m) {
      double sum = 0, terms = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        sum += x(m, k) * row[size_t(k)];
        terms += std::fabs(x(m, k) * row[size_t(k)]);
      }
      expected[size_t(m * c.n + n)] = activate(sum + bias(n), c.activation);
      magnitude[size_t(m * c.n + n)] = terms + std::fabs(bias(n));
    }
  }
}

inline i4::Args Int4Problem::args(void* y, int64_t ldy) {
  i4::Args a;
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
  a.bias = c.bias < 0 ? nullptr : bias_memory.data();
  a.bias_dtype = c.bias < 0 ? Dtype::f32 : Dtype(c.bias);
  a.y = y;
  a.n = c.n;
  a.ldy = ldy;
  return a;
}

}  // namespace
