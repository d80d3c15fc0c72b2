// Units of 8 outputs to floats with AVX2.
#pragma once

#include "common/vec_avx2.h"
#include "int4_matmul/kind.h"

namespace pycompress::int4_matmul {
namespace {

struct Avx2 {
  static constexpr Layout kLayout = kUnits8;
  static constexpr int kVectors = 4, kTileVectors = 2;  // registers a panel is wide; a tile of decoded weights

  // Up to so many rows decoding in registers is the faster, and registers of outputs to do with `rows` of them at once.
  static constexpr int64_t kFewRows = 12;
  static constexpr int few_vectors(int rows) { return rows <= 2 ? 2 : 1; }

  // The codebook. A permutation takes 8 values.
  struct Table {
    __m256 low, high;
    explicit Table(const float* v) : low(_mm256_loadu_ps(v)), high(_mm256_loadu_ps(v + 8)) {}
  };

  static __m256 zero_points(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // value i of each unit
  template <int I, Kind KIND>
  static __m256 decode(__m256i units, const Table& table) {
    if constexpr (KIND == Kind::symmetric) {
      // q - 8 is q with its fourth bit turned over, as a signed number of four bits
      const __m256i turned = _mm256_xor_si256(units, _mm256_set1_epi32(int(0x88888888)));
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(turned, 28 - 4 * I), 28));
    }
    const __m256i index = I == 0 ? units : _mm256_srli_epi32(units, 4 * I);
    if constexpr (KIND == Kind::asymmetric) {
      return _mm256_cvtepi32_ps(I == 7 ? index : _mm256_and_si256(index, _mm256_set1_epi32(15)));
    }
    // the fourth bit, moved to the sign, chooses the half
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(units, 28 - 4 * I));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                            upper);
  }

  // q - zero_point for one row; the short form of decode_avx512.h wants more registers than there are.
  struct Offsets {
    __m256 zero;
    Offsets() = default;
    explicit Offsets(__m256 v) : zero(v) {}
  };
  template <int I>
  static __m256 step(__m256i units, const Offsets& offsets) {
    return _mm256_sub_ps(decode<I, Kind::asymmetric>(units, Table(kSteps)), offsets.zero);
  }
};

}  // namespace
}  // namespace pycompress::int4_matmul
