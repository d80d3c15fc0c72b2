// Rows of x on the device: eight neighbouring elements at a time as float, and their quantisation.
#pragma once

#include <cfloat>
#include <cstring>

#include "common/cuda/device.h"
#include "common/linear_args.h"

namespace pycompress::int8_matmul {
namespace {

using cuda::Global;

constexpr int kUnit = 8;  // elements that are read, quantised and stored together

struct Rows {
  Global<const char> x;
  Dtype dtype;
  int inner_rows;
  int64_t k, outer_stride, row_stride, col_stride;
  bool vectors;  // adjacent columns, and every row begins at a multiple of 16 bytes
};

inline Rows rows_of(const LinearArgs& a) {
  const int64_t per_vector = 16 / dtype_size(a.dtype);
  const bool vectors = a.col_stride == 1 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0 &&
                       (a.m <= 1 || (a.outer_stride % per_vector == 0 && a.row_stride % per_vector == 0));
  const auto inner_rows = static_cast<int>(a.inner_rows < INT32_MAX ? a.inner_rows : INT32_MAX);
  return {static_cast<const char*>(a.x), a.dtype, inner_rows, a.k, a.outer_stride, a.row_stride, a.col_stride, vectors};
}

// In elements.
__device__ inline int64_t row_begin(const Rows& rows, int m) {
  return m / rows.inner_rows * rows.outer_stride + m % rows.inner_rows * rows.row_stride;
}

// Element i of an array of any dtype.
__device__ inline float load_element(Global<const char> from, int64_t i, Dtype dtype) {
  return cuda::load_float(from, i * cuda::size_of(dtype), dtype);
}

// Two 16-bit elements of a word.
template <Dtype D>
__device__ inline float2 widen(uint32_t word) {
  if constexpr (D == Dtype::bf16) {  // is the upper half of a float
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  } else {
    __half2 pair;
    memcpy(&pair, &word, 4);
    return __half22float2(pair);
  }
}

// v[0..8) = row[k..k+8), zeros behind the row's end.
template <Dtype D>
__device__ inline void load_unit(const Rows& rows, int64_t begin, int64_t k, float (&v)[kUnit]) {
  if (rows.vectors && k + kUnit <= rows.k) {
    if constexpr (D == Dtype::f32) {
#pragma unroll
      for (int i = 0; i < kUnit; i += 4) {
        const float4 part = rows.x.load_as<float4>((begin + k + i) * 4);
        v[i] = part.x, v[i + 1] = part.y, v[i + 2] = part.z, v[i + 3] = part.w;
      }
    } else {
      const uint4 raw = rows.x.load_as<uint4>((begin + k) * 2);
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = widen<D>(words[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    v[i] = k + i < rows.k ? load_element(rows.x, begin + (k + i) * rows.col_stride, D) : 0.0f;
  }
}

// ---- quantisation --------------------------------------------------------------------------------------------------

// The largest magnitude as bits, which compare like the numbers, and infinity and NaN come after all of them.
__device__ inline uint32_t largest_magnitude(const float (&v)[kUnit]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
  return largest;
}

struct Quantization {
  Global<const float> input_scale;  // static only, else null
  Global<const int32_t> zero_point;
};

// q = clamp(rne(x * inverse), low, high) + zero_point
struct Grid {
  float low, high;
  int zero_point;  // static: less 128, so that q is signed
};

__device__ inline Grid grid_of(const Quantization& how) {
  if (how.zero_point.is_null()) return {-127.0f, 127.0f, 0};
  const int zero_point = how.zero_point.load(0) - 128;
  return {static_cast<float>(-128 - zero_point), static_cast<float>(127 - zero_point), zero_point};
}

struct RowScale {
  float scale;  // NaN where the row holds NaN or infinity: q is then anything
  float inverse;
};

__device__ inline RowScale row_scale(const Quantization& how, uint32_t largest) {
  const float scale = how.input_scale.is_null()
                          ? fmaxf(__uint_as_float(largest) / 127.0f, FLT_MIN)  // the floor keeps the reciprocal finite
                          : how.input_scale.load(0);
  return {largest > 0x7f7fffffu ? __uint_as_float(0x7fc00000u) : scale, 1.0f / scale};
}

__device__ inline uint32_t quantize(const Grid& grid, float inverse, float x) {
  const float steps = fminf(grid.high, fmaxf(grid.low, __fmul_rn(x, inverse)));  // of NaN: low
  return static_cast<uint32_t>(__float2int_rn(steps) + grid.zero_point);
}

// Eight bytes, zeros from element `count` on: static 0 is not step 0.
__device__ inline uint2 quantize_unit(const Grid& grid, float inverse, const float (&v)[kUnit], int64_t count) {
  uint32_t word[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t q[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) q[j] = quantize(grid, inverse, v[4 * i + j]);
    const uint32_t low = __byte_perm(q[0], q[1], 0x0040), high = __byte_perm(q[2], q[3], 0x0040);
    word[i] = __byte_perm(low, high, 0x5410);
    const int64_t kept = count - 4 * i;
    if (kept < 4) word[i] = kept <= 0 ? 0 : word[i] & (0xffffffffu >> (32 - 8 * kept));
  }
  return make_uint2(word[0], word[1]);
}

}  // namespace
}  // namespace pycompress::int8_matmul
