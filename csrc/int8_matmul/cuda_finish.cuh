// Sums to y on the device: scales, bias, activation, rounding to y's dtype, stores of 16 bytes where y allows them.
#pragma once

#include "int8_matmul/cuda_rows.cuh"

namespace pycompress::int8_matmul {
namespace {

struct Finish {
  Global<char> y;
  Dtype dtype, bias_dtype;
  Activation activation;
  bool vectors;  // every row of y begins at a multiple of 16 bytes
  int64_t m, n, ldy;
  Global<const float> weight_scale;
  Global<const char> bias;
};

inline Finish finish_of(const LinearArgs& a) {
  const bool vectors =
      reinterpret_cast<uintptr_t>(a.y) % 16 == 0 && (a.m <= 1 || a.ldy * dtype_size(a.dtype) % 16 == 0);
  return {
      static_cast<char*>(a.y),         a.dtype, a.bias_dtype, a.activation, vectors, a.m, a.n, a.ldy, a.weight_scale,
      static_cast<const char*>(a.bias)};
}

__device__ inline float load_bias(const Finish& f, int64_t n) {
  return f.bias.is_null() ? 0.0f : load_element(f.bias, n, f.bias_dtype);
}

template <int V>
__device__ inline void activate(float (&v)[V], Activation activation) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu:
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i];  // NaN stays NaN
      return;
    case Activation::gelu:
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = 0.5f * v[i] * (1.0f + erff(v[i] * 0.70710678119f));
      return;
    default: break;
  }
    // v * sigmoid(z); gelu_tanh: 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (v + 0.044715 v^3)
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float z = v[i];
    if (activation == Activation::gelu_tanh) z *= 1.5957691216f * (1.0f + 0.044715f * v[i] * v[i]);
    v[i] = v[i] / (1.0f + expf(-z));
  }
}

// x_scale last: it may be as large as FLT_MAX / 127.
__device__ inline float scaled(float sum, float weight_scale, float x_scale, float bias) {
  return fmaf(sum * weight_scale, x_scale, bias);
}

// Two elements of 16 bits as a word.
template <Dtype D>
__device__ inline uint32_t narrow(float low, float high) {
  uint32_t word;
  if constexpr (D == Dtype::bf16) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(make_float2(low, high));
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __float22half2_rn(make_float2(low, high));
    memcpy(&word, &pair, 4);
  }
  return word;
}

// y[m, n ...], as far as y goes, from 8 or 16 bytes of y's elements; n is a multiple of their number.
template <Dtype D, int WORDS>
__device__ inline void store_words(const Finish& f, int64_t m, int64_t n, const uint32_t (&word)[WORDS]) {
  static_assert(WORDS == 2 || WORDS == 4, "8 or 16 bytes");
  constexpr int kSize = D == Dtype::f32 ? 4 : 2, kElements = WORDS * 4 / kSize;
  const int64_t at = (m * f.ldy + n) * kSize;
  if (f.vectors && n + kElements <= f.n) {
    if constexpr (WORDS == 4) {
      f.y.store_as<uint4>(at, make_uint4(word[0], word[1], word[2], word[3]));
    } else {
      f.y.store_as<uint2>(at, make_uint2(word[0], word[1]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (n + i >= f.n) return;
    if constexpr (kSize == 4) {
      f.y.store_as<uint32_t>(at + i * 4, word[i]);
    } else {
      f.y.store_as<uint16_t>(at + i * 2, static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2))));
    }
  }
}

// y[m, n .. n + 4) as far as y goes; n is a multiple of 4.
template <Dtype D>
__device__ inline void store_columns(const Finish& f, int64_t m, int64_t n, const float (&v)[4]) {
  if constexpr (D == Dtype::f32) {
    const uint32_t word[4] = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                              __float_as_uint(v[3])};
    store_words<D>(f, m, n, word);
  } else {
    const uint32_t word[2] = {narrow<D>(v[0], v[1]), narrow<D>(v[2], v[3])};
    store_words<D>(f, m, n, word);
  }
}

__device__ inline void store_value(const Finish& f, int64_t m, int64_t n, float v) {
  cuda::store_float(f.y, (m * f.ldy + n) * cuda::size_of(f.dtype), f.dtype, v);
}

}  // namespace
}  // namespace pycompress::int8_matmul
