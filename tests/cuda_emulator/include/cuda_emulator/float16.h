// Float to and from the two 16-bit formats, in integer arithmetic: to nearest, ties to even, with infinities and
// subnormal numbers; a NaN becomes 0x7fff, as on the GPU.
#pragma once

#include <cstdint>

#include "cuda_emulator/arithmetic.h"

namespace emulator {

inline float bfloat16_to_float(uint16_t bits) { return bits_as<float>(uint32_t{bits} << 16); }

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // beyond the largest: infinity
}

// half: 1 sign, 5 exponent (bias 15), 10 fraction
inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return bits_as<float>(sign | (exponent + 127 - 15) << 23 | fraction << 13);
}

// The last bits of `value` cut off, to nearest even.
inline uint32_t round_off(uint32_t value, unsigned count) {
  const uint32_t half = uint32_t{1} << (count - 1), rest = value & ((half << 1) - 1), kept = value >> count;
  return kept + (rest > half || (rest == half && (kept & 1)) ? 1 : 0);
}

inline uint16_t float_to_half(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t exponent = magnitude >> 23;
  uint32_t half;
  if (exponent >= 127 + 16) {
    half = 0x7c00;  // infinity
  } else if (exponent >= 127 - 14) {
    half = round_off(magnitude - (uint32_t{127 - 15} << 23), 13);  // may carry into the exponent, up to infinity
  } else if (exponent >= 127 - 25) {
    const uint32_t fraction = (magnitude & 0x7fffff) | 0x800000;
    half = round_off(fraction, 127 - 14 - exponent + 13);  // subnormal, may carry into the smallest normal number
  } else {
    half = 0;
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace emulator
