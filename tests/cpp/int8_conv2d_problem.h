// A call of int8_conv2d drawn at random, in buffers of exactly the size that the contract asks for, and what it must give:
// the formula of int8_conv2d.h in float64. Shares no code with the kernels but the element conversions of dtype.h.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "common/memory.h"
#include "int8_conv2d/int8_conv2d.h"

namespace pc = pycompress;
namespace cv = pycompress::int8_conv2d;
using cv::Mode;
using pc::Activation;
using pc::Dtype;

namespace {

std::mt19937 generator(1);

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Exactly `bytes` bytes, aligned like a packed weight.
class Exact {
 public:
  explicit Exact(int64_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, pc::kAlignment, size_t(bytes)) != 0) std::abort();
    data_ = static_cast<char*>(memory);
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { std::free(data_); }
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_;
  int64_t bytes_;
};

struct Case {
  int64_t n, c, h, w, out, kh, kw;
  int64_t stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0, dilation_h = 1,
          dilation_w = 1, groups = 1;
  Mode mode = Mode::dynamic_;
  Dtype dtype = Dtype::f32;
  Activation activation = Activation::none;
  int bias = 0;  // -1: none, else its Dtype
  bool channels_last = false, gaps = false;
  int threads = 1;
  bool extreme = false;  // +-127 throughout and scales of 1: sums at the edge of the integers

  int64_t out_h() const { return (h + pad_top + pad_bottom - dilation_h * (kh - 1) - 1) / stride_h + 1; }
  int64_t out_w() const { return (w + pad_left + pad_right - dilation_w * (kw - 1) - 1) / stride_w + 1; }
  int64_t y_count() const { return n * out * out_h() * out_w(); }
};

int64_t x_count(const Case& c, int64_t gap) {
  const int64_t pixels = c.channels_last ? c.h * (c.w * c.c + gap) : c.c * (c.h * c.w + gap);
  return c.n * c.c * c.h * c.w == 0 ? 0 : c.n * pixels - gap;
}

struct Problem {
  Case c;
  int64_t strides[4];
  Exact x, bias;
  std::vector<int8_t> weight;
  std::vector<float> weight_scale;
  float input_scale;
  int32_t input_zero_point;
  std::vector<double> expected, magnitude;  // [N,O,OH,OW]

  explicit Problem(const Case& wanted)
      : c(wanted),
        x(x_count(c, c.gaps ? 5 : 0) * pc::dtype_size(c.dtype)),
        bias(c.bias < 0 ? 0 : c.out * pc::dtype_size(Dtype(c.bias))),
        weight(size_t(c.out * (c.c / c.groups) * c.kh * c.kw)),
        weight_scale(size_t(c.out)),
        input_scale(c.extreme ? 1.0f : 0.03f),
        input_zero_point(c.extreme ? 0 : int32_t(draw(0, 255))) {
    const int64_t gap = c.gaps ? 5 : 0;
    const int64_t planes[] = {c.c * (c.h * c.w + gap), c.h * c.w + gap, c.w, 1};
    const int64_t last[] = {c.h * (c.w * c.c + gap), 1, c.w * c.c + gap, c.c};
    std::memcpy(strides, c.channels_last ? last : planes, sizeof strides);
    for (int64_t i = 0; i < x.bytes() / pc::dtype_size(c.dtype); ++i) pc::store_float(x.data(), i, c.dtype, NAN);
    for (int64_t n = 0; n < c.n; ++n) {
      for (int64_t i = 0; i < c.c * c.h * c.w; ++i) {
        const double value = c.extreme ? 127.0 : uniform(-3, 3) * double(n + 1);
        pc::store_float(x.data(), at(n, i / (c.h * c.w), i / c.w % c.h, i % c.w), c.dtype, float(value));
      }
    }
    const int64_t row = c.c / c.groups * c.kh * c.kw;
    for (size_t i = 0; i < weight.size(); ++i) {
      weight[i] = int8_t(c.extreme ? (int64_t(i) / row % 2 == 0 ? 127 : -128) : draw(-128, 127));
    }
    for (int64_t o = 0; o < c.out; ++o) {
      weight_scale[size_t(o)] = c.extreme ? 1.0f : float(uniform(0.001, 0.01));
      if (c.bias >= 0) pc::store_float(bias.data(), o, Dtype(c.bias), float(uniform(-2, 2)));
    }
    solve();
  }

  int64_t at(int64_t n, int64_t ch, int64_t i, int64_t j) const {
    return n * strides[0] + ch * strides[1] + i * strides[2] + j * strides[3];
  }
  float value(int64_t n, int64_t ch, int64_t i, int64_t j) const {
    return pc::load_float(x.data(), at(n, ch, i, j), c.dtype);
  }
  cv::WeightShape shape() const { return {c.out, c.c / c.groups, c.kh, c.kw, c.groups}; }

  void solve();
  cv::Args args(void* y) const;
};

double activated(double v, Activation activation) {
  switch (activation) {
    case Activation::relu: return v < 0 ? 0 : v;
    case Activation::gelu: return 0.5 * v * (1 + std::erf(v * std::sqrt(0.5)));
    case Activation::gelu_tanh:
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    case Activation::silu: return v / (1 + std::exp(-v));
    default: return v;
  }
}

// int8_conv2d.h, line by line: float32 where it rounds to an integer, float64 elsewhere.
void Problem::solve() {
  expected.assign(size_t(c.y_count()), 0.0);
  magnitude.assign(size_t(c.y_count()), 0.0);
  const int64_t per_group = c.c / c.groups, outs = c.out / c.groups;
  size_t next = 0;
  std::vector<double> q(size_t(c.c * c.h * c.w));
  for (int64_t n = 0; n < c.n; ++n) {
    float largest = 0;
    for (int64_t i = 0; i < c.c * c.h * c.w; ++i) {
      largest = std::max(largest, std::fabs(value(n, i / (c.h * c.w), i / c.w % c.h, i % c.w)));
    }
    const float scale = c.mode == Mode::static_ ? input_scale : std::max(largest / 127.0f, FLT_MIN),
                inverse = 1 / scale;
    for (int64_t i = 0; i < c.c * c.h * c.w; ++i) {
      double step = std::nearbyint(value(n, i / (c.h * c.w), i / c.w % c.h, i % c.w) * inverse);
      if (c.mode == Mode::static_) step = std::min(std::max(step, double(-input_zero_point)), 255.0 - input_zero_point);
      q[size_t(i)] = step;
    }
    for (int64_t o = 0; o < c.out; ++o) {
      for (int64_t p = 0; p < c.out_h() * c.out_w(); ++p, ++next) {
        double sum = 0;
        for (int64_t k = 0; k < per_group * c.kh * c.kw; ++k) {
          const int64_t ch = o / outs * per_group + k / (c.kh * c.kw);
          const int64_t i = p / c.out_w() * c.stride_h - c.pad_top + k / c.kw % c.kh * c.dilation_h;
          const int64_t j = p % c.out_w() * c.stride_w - c.pad_left + k % c.kw * c.dilation_w;
          if (i < 0 || i >= c.h || j < 0 || j >= c.w) continue;
          sum += q[size_t((ch * c.h + i) * c.w + j)] * weight[size_t(o * per_group * c.kh * c.kw + k)];
        }
        const double b = c.bias < 0 ? 0.0 : double(pc::load_float(bias.data(), o, Dtype(c.bias)));
        const double product = sum * double(scale) * double(weight_scale[size_t(o)]);
        expected[next] = activated(product + b, c.activation);
        magnitude[next] = std::fabs(product) + std::fabs(b);
      }
    }
  }
}

cv::Args Problem::args(void* y) const {
  cv::Args a;
  a.mode = c.mode;
  a.activation = c.activation;
  a.threads = c.threads;
  a.x = x.data();
  a.dtype = c.dtype;
  a.n = c.n;
  a.c = c.c;
  a.h = c.h;
  a.w = c.w;
  a.x_stride_n = strides[0];
  a.x_stride_c = strides[1];
  a.x_stride_h = strides[2];
  a.x_stride_w = strides[3];
  a.stride_h = c.stride_h;
  a.stride_w = c.stride_w;
  a.pad_top = c.pad_top;
  a.pad_left = c.pad_left;
  a.dilation_h = c.dilation_h;
  a.dilation_w = c.dilation_w;
  a.weight_scale = weight_scale.data();
  a.bias = c.bias < 0 ? nullptr : bias.data();
  a.bias_dtype = c.bias < 0 ? Dtype::f32 : Dtype(c.bias);
  if (c.mode == Mode::static_) {
    a.input_scale = &input_scale;
    a.input_zero_point = &input_zero_point;
  }
  a.y = y;
  a.out_h = c.out_h();
  a.out_w = c.out_w();
  a.channels_last = c.channels_last;
  return a;
}

}  // namespace
