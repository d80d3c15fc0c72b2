// Expanding through a table: for 8 bits of the bitmap, which of the next 8 values goes where. For instruction sets
// without an expanding instruction of the wanted width.
#pragma once

#include <immintrin.h>

#include "sparse_linear/bitmap.h"

namespace pycompress::sparse_linear {
namespace {

// Byte j: how many of the bits below j are set, or 0x80 where bit j is not: vpshufb gives 0 there.
struct ExpandTable {
  uint8_t source[256][8];
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    uint8_t next = 0;
    for (int j = 0; j < 8; ++j) table.source[bits][j] = (bits >> j) & 1 ? next++ : uint8_t(0x80);
  }
  return table;
}

alignas(64) constexpr ExpandTable kExpandTable = make_expand_table();

inline __m128i load_8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

// 16 columns of s8. Reads up to 16 values.
__attribute__((always_inline)) inline __m128i expand_16_bytes(const uint8_t* bits, const int8_t* values) {
  const auto* second = reinterpret_cast<const double*>(values + __builtin_popcount(bits[0]));
  const auto* second_source = reinterpret_cast<const double*>(kExpandTable.source[bits[1]]);
  const __m128d pair = _mm_loadh_pd(_mm_castsi128_pd(load_8(values)), second);
  const __m128d source = _mm_loadh_pd(_mm_castsi128_pd(load_8(kExpandTable.source[bits[0]])), second_source);
  const __m128i upper = _mm_set_epi64x(0x0808080808080808, 0);  // 0x88 is as good as 0x80
  return _mm_shuffle_epi8(_mm_castpd_si128(pair), _mm_add_epi8(_mm_castpd_si128(source), upper));
}

}  // namespace
}  // namespace pycompress::sparse_linear
