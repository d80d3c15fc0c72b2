// Words and types that nvcc knows without a header: qualifiers, indices, short vectors.
#pragma once

#include <cstddef>
#include <cstdint>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- vectors: CUDA aligns those of 2 and 4 elements to their size, up to 16 bytes ----------------------------------

#define PYCOMPRESS_VECTOR_TYPES(name, element)                                                         \
  struct name##1 { element x; };                                                                       \
  struct alignas(2 * sizeof(element)) name##2 { element x, y; };                                       \
  struct name##3 { element x, y, z; };                                                                 \
  struct alignas(4 * sizeof(element) < 16 ? 4 * sizeof(element) : 16) name##4 { element x, y, z, w; }; \
  inline name##1 make_##name##1(element x) { return {x}; }                                             \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }                               \
  inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }

PYCOMPRESS_VECTOR_TYPES(char, signed char)
PYCOMPRESS_VECTOR_TYPES(uchar, unsigned char)
PYCOMPRESS_VECTOR_TYPES(short, short)
PYCOMPRESS_VECTOR_TYPES(ushort, unsigned short)
PYCOMPRESS_VECTOR_TYPES(int, int)
PYCOMPRESS_VECTOR_TYPES(uint, unsigned)
PYCOMPRESS_VECTOR_TYPES(longlong, long long)
PYCOMPRESS_VECTOR_TYPES(ulonglong, unsigned long long)
PYCOMPRESS_VECTOR_TYPES(float, float)
PYCOMPRESS_VECTOR_TYPES(double, double)
#undef PYCOMPRESS_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}  // NOLINT: as in CUDA
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}                                         // NOLINT
};

// ---- which thread this is: set by the scheduler whenever it lets one run -------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
