// A call of sparse_linear drawn at random, in buffers of exactly the size that the contract asks for, and what it must
// give: the formula of sparse_linear.h in float64. Shares no code with the kernels but the conversions of dtype.h.
#pragma once

#include "int8_matmul_problem.h"
#include "sparse_linear/bitmap.h"

namespace sl = pycompress::sparse_linear;
using sl::WeightType;

namespace {

struct SparseCase {
  int64_t m, n, k;
  WeightType type = WeightType::f32;
  double kept = 0.5;  // of the weights
  bool holes = true;  // some rows without weights, some without zeros
  Dtype dtype = Dtype::f32;
  Activation activation = Activation::none;
  int bias = 0;  // -1: none, else its Dtype
  int view = 0;  // index into views()
  int threads = 1;
  bool extreme = false;                   // s8: +-127 throughout and scales of 1, for sums at the edge of the integers
  int block_rows = 1, block_columns = 1;  // that are kept, or not, together
  bool two_of_four = false;               // at most two of columns 4 i to 4 i + 3 are kept
};

Dtype float_dtype(WeightType type) {
  return type == WeightType::f32 ? Dtype::f32 : type == WeightType::f16 ? Dtype::f16 : Dtype::bf16;
}

struct SparseProblem {
  SparseCase c;
  View view;
  int64_t x_offset = 0;  // of x[0,0] in x_memory
  Exact<char> x_memory;
  Exact<uint8_t> bits;
  Exact<int64_t> row_start;
  int64_t nnz;
  Exact<char> values;
  Exact<float> weight_scale;
  Exact<char> bias_memory;
  std::vector<double> expected, magnitude;  // [M,N]; magnitude: of the terms that met in the sum

  int64_t index(int64_t m, int64_t k) const {
    return x_offset + m / view.inner_rows * view.outer_stride + m % view.inner_rows * view.row_stride +
           k * view.col_stride;
  }
  float x(int64_t m, int64_t k) { return pc::load_float(x_memory.data(), index(m, k), c.dtype); }
  float bias(int64_t n) { return c.bias < 0 ? 0.0f : pc::load_float(bias_memory.data(), n, Dtype(c.bias)); }
  bool keeps(int64_t n, int64_t k) { return (bits[n * ((c.k + 7) / 8) + k / 8] >> (k % 8)) & 1; }
  double value(int64_t i) {
    if (c.type == WeightType::s8) return reinterpret_cast<int8_t*>(values.data())[i];
    return pc::load_float(values.data(), i, float_dtype(c.type));
  }

  explicit SparseProblem(const SparseCase& wanted);
  int64_t draw_bits();  // returns how many are set
  void solve();
  sl::Args args(void* y, int64_t ldy);
  sl::Bitmap bitmap() { return {c.type, c.n, c.k, bits.data(), values.data(), row_start.data()}; }
};

std::pair<int64_t, int64_t> extent(const SparseCase& c, const View& view) { return extent(Case{c.m, c.n, c.k}, view); }

SparseProblem::SparseProblem(const SparseCase& wanted)
    : c(wanted),
      view(views(c.m, c.k)[size_t(c.view)]),
      x_memory(extent(c, view).first * pc::dtype_size(c.dtype)),
      bits(c.n * ((c.k + 7) / 8)),
      row_start(c.n + 1),
      nnz(draw_bits()),
      values(nnz * sl::weight_size(c.type)),
      weight_scale(c.type == WeightType::s8 ? c.n : 0),
      bias_memory(c.bias < 0 ? 0 : c.n * pc::dtype_size(Dtype(c.bias))) {
  x_offset = extent(c, view).second;
  const int64_t elements = extent(c, view).first;
  for (int64_t i = 0; i < elements; ++i) pc::store_float(x_memory.data(), i, c.dtype, NAN);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t k = 0; k < c.k; ++k) {
      pc::store_float(x_memory.data(), index(m, k), c.dtype, c.extreme ? 127.0f : float(uniform(-3, 3)));
    }
  }
  for (int64_t i = 0; i < nnz; ++i) {
    if (c.type == WeightType::s8) {
      reinterpret_cast<int8_t*>(values.data())[i] = int8_t(c.extreme ? 127 : draw(-127, 127));
    } else {
      pc::store_float(values.data(), i, float_dtype(c.type), float(uniform(-2, 2)));
    }
  }
  for (int64_t n = 0; n < c.n; ++n) {
    if (c.type == WeightType::s8) weight_scale[n] = c.extreme ? 1.0f : float(uniform(0.001, 0.01));
    if (c.bias >= 0) pc::store_float(bias_memory.data(), n, Dtype(c.bias), float(uniform(-2, 2)));
  }
  solve();
}

int64_t SparseProblem::draw_bits() {
  const int64_t row_bytes = (c.k + 7) / 8;
  int64_t count = 0;
  int kind = 0;
  for (int64_t n = 0; n < c.n; ++n) {
    const int64_t block_row = n - n % c.block_rows;
    if (n == block_row) kind = c.holes ? int(draw(0, 9)) : 2;
    const double kept = kind == 0 ? 0.0 : kind == 1 ? 1.0 : c.kept;
    int of_four = 0;
    row_start[n] = count;
    std::fill(bits.data() + n * row_bytes, bits.data() + (n + 1) * row_bytes, uint8_t(0));
    for (int64_t k = 0; k < c.k; ++k) {
      const int64_t block_column = k - k % c.block_columns;
      const bool first = n == block_row && k == block_column;
      if (k % 4 == 0) of_four = 0;
      if (!(first ? uniform(0, 1) < kept : keeps(block_row, block_column))) continue;
      if (c.two_of_four && ++of_four > 2) continue;
      bits[n * row_bytes + k / 8] = uint8_t(bits[n * row_bytes + k / 8] | 1 << (k % 8));
      ++count;
    }
  }
  row_start[c.n] = count;
  return count;
}

// sparse_linear.h, line by line: float32 where it rounds to an integer, float64 elsewhere.
void SparseProblem::solve() {
  const bool integer = c.type == WeightType::s8;
  expected.assign(size_t(c.m * c.n), 0.0);
  magnitude.assign(size_t(c.m * c.n), 0.0);
  std::vector<double> row(static_cast<size_t>(c.k));
  for (int64_t m = 0; m < c.m; ++m) {
    float largest = 0;
    for (int64_t k = 0; k < c.k; ++k) largest = std::max(largest, std::fabs(x(m, k)));
    const float x_scale = integer ? std::max(largest / 127.0f, FLT_MIN) : 1.0f;
    const float inverse = 1.0f / x_scale;
    for (int64_t k = 0; k < c.k; ++k) row[size_t(k)] = integer ? std::nearbyint(x(m, k) * inverse) : x(m, k);
    int64_t i = 0;
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0, terms = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        if (!keeps(n, k)) continue;
        const double term = row[size_t(k)] * value(i++);
        sum += term;
        terms += std::fabs(term);
      }
      const double scale = integer ? double(x_scale) * weight_scale[n] : 1.0;
      const auto at = size_t(m * c.n + n);
      expected[at] = activate(sum * scale + bias(n), c.activation);
      // An integer sum is exact, whatever cancelled in it.
      magnitude[at] = (integer ? std::fabs(sum) : terms) * scale + std::fabs(bias(n));
    }
  }
}

inline sl::Args SparseProblem::args(void* y, int64_t ldy) {
  sl::Args a;
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
  a.weight_scale = c.type == WeightType::s8 ? weight_scale.data() : nullptr;
  a.bias = c.bias < 0 ? nullptr : bias_memory.data();
  a.bias_dtype = c.bias < 0 ? Dtype::f32 : Dtype(c.bias);
  a.y = y;
  a.n = c.n;
  a.ldy = ldy;
  return a;
}

}  // namespace
