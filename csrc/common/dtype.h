// Element types of activations, and the exact scalar conversions that the specification path and the tests use.
// Everything is static: this header is included in files built for different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

namespace pycompress {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

static inline int dtype_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

// Round to nearest even; NaN stays a (quiet) NaN.
static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ffu;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // subnormal: mantissa * 2^-24
  return sign ? -magnitude : magnitude;
}

static inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal result: adding 0.5 leaves the rounded mantissa in the low bits
    return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

// element i of an array of the given dtype
static inline float load_float(const void* base, int64_t i, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return static_cast<const float*>(base)[i];
    case Dtype::bf16: return bf16_to_float(static_cast<const uint16_t*>(base)[i]);
    default: return f16_to_float(static_cast<const uint16_t*>(base)[i]);
  }
}

static inline void store_float(void* base, int64_t i, Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::f32: static_cast<float*>(base)[i] = value; break;
    case Dtype::bf16: static_cast<uint16_t*>(base)[i] = float_to_bf16(value); break;
    default: static_cast<uint16_t*>(base)[i] = float_to_f16(value); break;
  }
}

}  // namespace pycompress
