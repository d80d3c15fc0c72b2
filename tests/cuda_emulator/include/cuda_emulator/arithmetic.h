// The arithmetic that CUDA has and the C++ library has not, or has under another name. What is exact on a GPU is exact
// here; the approximate functions are the exact ones.
#pragma once

#include <math.h>  // not <cmath>: kernels call expf, isnan and the like without std::

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace emulator {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// To an integer as the GPU converts: beyond the range the nearest end, NaN 0.
template <class Int>
inline Int saturate(double x) {
  if (x != x) return 0;
  if (x <= static_cast<double>(std::numeric_limits<Int>::min())) return std::numeric_limits<Int>::min();
  if (x >= static_cast<double>(std::numeric_limits<Int>::max())) return std::numeric_limits<Int>::max();
  return static_cast<Int>(x);
}

}  // namespace emulator

// ---- bits ----------------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return emulator::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) {
    reversed = reversed << 1 | (x >> bit & 1);
  }
  return reversed;
}

// Byte i of the result is byte (selector >> 4 i & 7) of the eight in y:x; with bit 3 of it, that byte's sign all over.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (choice & 7)) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

// ---- integers ------------------------------------------------------------------------------------------------------

inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);  // the sum wraps around
  for (int i = 0; i < 4; ++i) {
    const int left = static_cast<int8_t>(static_cast<unsigned>(a) >> 8 * i);
    const int right = static_cast<int8_t>(static_cast<unsigned>(b) >> 8 * i);
    sum += static_cast<unsigned>(left * right);
  }
  return static_cast<int>(sum);
}

// Of two types C++'s common one, as the overloads of CUDA give; of floats and a NaN the other one.
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  const bool other = static_cast<T>(b) < static_cast<T>(a) || a != a;
  return other ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  const bool other = static_cast<T>(a) < static_cast<T>(b) || a != a;
  return other ? static_cast<T>(b) : static_cast<T>(a);
}

// ---- conversions: _rn nearest even, _rz towards zero, _rd down, _ru up ----------------------------------------------

inline int __float2int_rn(float x) { return emulator::saturate<int>(rint(double{x})); }
inline int __float2int_rz(float x) { return emulator::saturate<int>(trunc(double{x})); }
inline int __float2int_rd(float x) { return emulator::saturate<int>(floor(double{x})); }
inline int __float2int_ru(float x) { return emulator::saturate<int>(ceil(double{x})); }
inline unsigned __float2uint_rn(float x) { return emulator::saturate<unsigned>(rint(double{x})); }
inline unsigned __float2uint_rz(float x) { return emulator::saturate<unsigned>(trunc(double{x})); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// ---- floats: each rounded by itself, never fused into the operation around it (the build says -ffp-contract=off) ----

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
