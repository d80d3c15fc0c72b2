// Units of 16 outputs to floats with AVX-512: a nibble is the index of a permutation, which reads the low 4 bits only.
#pragma once

#include "common/vec_avx512.h"
#include "int4_matmul/kind.h"

namespace pycompress::int4_matmul {
namespace {

struct Avx512 {
  static constexpr Layout kLayout = kUnits16;
  static constexpr int kVectors = 4, kTileVectors = 4;  // registers a panel is wide; a tile of decoded weights

  // Up to so many rows decoding in registers is the faster, and registers of outputs to do with `rows` of them at once.
  static constexpr int64_t kFewRows = 16;
  static constexpr int few_vectors(int rows) { return rows <= 2 ? 4 : 2; }

  // The 16 values that the four bits stand for, without scale and zero point: exact floats.
  struct Table {
    __m512 values;
    explicit Table(const float* v) : values(_mm512_loadu_ps(v)) {}
  };

  static __m512 zero_points(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // value i of each unit
  template <int I, Kind>
  static __m512 decode(__m512i units, const Table& table) {
    return _mm512_permutexvar_ps(I == 0 ? units : _mm512_srli_epi32(units, 4 * I), table.values);
  }

  // q - zero_point without a shift for each q: four bits at bit b of the fraction of 2^(23-b) are 2^(23-b) + q, and one
  // subtraction takes the power and the zero point off, exactly. Three places b = 8, 12, 16 and two shifts do for all
  // eight; five places would need more constants than there are registers for. A fifth faster than decode() and a
  // subtraction.
  struct Offsets {
    __m512 place[3];
    Offsets() = default;
    explicit Offsets(__m512 zero) {
      for (int p = 0; p < 3; ++p) place[p] = _mm512_add_ps(zero, _mm512_set1_ps(float(1 << (15 - 4 * p))));
    }
  };
  template <int I>
  static __m512 step(__m512i units, const Offsets& offsets) {
    constexpr int kPlace = I < 2 ? I : (I - 2) % 3, kBit = 8 + 4 * kPlace;
    const __m512i moved = I < 2 ? _mm512_slli_epi32(units, 8) : I < 5 ? units : _mm512_srli_epi32(units, 12);
    const __m512i power = _mm512_castps_si512(_mm512_set1_ps(float(1 << (23 - kBit))));
    const __m512i sum = _mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(15 << kBit), power, 0xea);  // (a & b) | c
    return _mm512_sub_ps(_mm512_castsi512_ps(sum), offsets.place[kPlace]);
  }
};

}  // namespace
}  // namespace pycompress::int4_matmul
