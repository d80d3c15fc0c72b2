// Stands in for CUDA's header of this name: the type, and the functions on it that kernels use. See cuda_runtime.h.
#pragma once

#include "cuda_emulator/float16.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(emulator::float_to_bfloat16(x)) {}      // NOLINT: converts, as in CUDA
  operator float() const { return emulator::bfloat16_to_float(bits); }  // NOLINT
  uint16_t bits;
};
static_assert(sizeof(__nv_bfloat16) == 2, "what global memory holds");

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits = bits;
  return x;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

// ---- two at a time: x in the low half -------------------------------------------------------------------------------

inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {__nv_bfloat16(x), __nv_bfloat16(x)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }

// ---- arithmetic, rounded once ---------------------------------------------------------------------------------------

inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return float{a} + float{b}; }
inline __nv_bfloat16 __hsub(__nv_bfloat16 a, __nv_bfloat16 b) { return float{a} - float{b}; }
inline __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return float{a} * float{b}; }
inline __nv_bfloat16 __hneg(__nv_bfloat16 x) { return __ushort_as_bfloat16(x.bits ^ 0x8000); }
inline __nv_bfloat16 __habs(__nv_bfloat16 x) { return __ushort_as_bfloat16(x.bits & 0x7fff); }
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline bool __hisnan(__nv_bfloat16 x) { return (x.bits & 0x7fff) > 0x7f80; }
inline int __hisinf(__nv_bfloat16 x) { return (x.bits & 0x7fff) != 0x7f80 ? 0 : (x.bits & 0x8000 ? -1 : 1); }
