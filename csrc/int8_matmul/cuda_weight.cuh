// Sixteen neighbouring bytes of a row of the int8 weight, whatever its alignment.
#pragma once

#include "common/cuda/device.h"
#include "int8_matmul/cuda.h"

namespace pycompress::int8_matmul {
namespace {

using cuda::Global;

struct Weight {
  Global<const int8_t> rows;  // [n,k]
  int64_t n, k;
  bool words;  // every row begins at a multiple of 4 bytes, and k is one
};

inline bool aligned_rows(const CudaArgs& a, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(a.weight) % static_cast<uintptr_t>(bytes) == 0 && (a.k % bytes == 0);
}

inline Weight weight_of(const CudaArgs& a) { return {a.weight, a.n, a.k, aligned_rows(a, 4)}; }

// Sixteen bytes from element `at` on, of which `count` are asked for; the others are zeros. VECTORS: the rows begin at
// multiples of 16 bytes, and all or none are asked for.
template <bool VECTORS>
__device__ inline uint4 load_weight(const Weight& weight, int64_t at, int count) {
  if (count <= 0) return make_uint4(0, 0, 0, 0);
  if constexpr (VECTORS) return weight.rows.load_once_as<uint4>(at);
  uint32_t word[4] = {0, 0, 0, 0};
  if (weight.words) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i < count) word[i] = weight.rows.load_as<uint32_t>(at + 4 * i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t byte = i < count ? static_cast<uint8_t>(weight.rows.load(at + i)) : 0;
      word[i / 4] |= byte << (8 * (i % 4));
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

}  // namespace
}  // namespace pycompress::int8_matmul
