// Stands in for CUDA's header of this name: the type, and the functions on it that kernels use. See cuda_runtime.h.
#pragma once

#include "cuda_emulator/float16.h"
#include "cuda_runtime.h"

struct __half {
  __half() = default;
  __half(float x) : bits(emulator::float_to_half(x)) {}             // NOLINT: converts, as in CUDA
  operator float() const { return emulator::half_to_float(bits); }  // NOLINT
  uint16_t bits;
};
static_assert(sizeof(__half) == 2, "what global memory holds");

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

// ---- two at a time: x in the low half -------------------------------------------------------------------------------

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }

// ---- arithmetic, rounded once ---------------------------------------------------------------------------------------

inline __half __hadd(__half a, __half b) { return float{a} + float{b}; }
inline __half __hsub(__half a, __half b) { return float{a} - float{b}; }
inline __half __hmul(__half a, __half b) { return float{a} * float{b}; }
inline __half __hneg(__half x) { return __ushort_as_half(x.bits ^ 0x8000); }
inline __half __habs(__half x) { return __ushort_as_half(x.bits & 0x7fff); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline bool __hisnan(__half x) { return (x.bits & 0x7fff) > 0x7c00; }
inline int __hisinf(__half x) { return (x.bits & 0x7fff) != 0x7c00 ? 0 : (x.bits & 0x8000 ? -1 : 1); }
