// Rows of x made ready for the tiles: quantised, or widened to f32 for weight_only. See tile_engine.h.
#pragma once

#include "common/memory.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

constexpr int kMaxRows = 6;                        // of a tile
constexpr int64_t kPassBytes = 256 * 1024;         // of prepared rows held at a time: part of L2
constexpr int64_t kFetchAhead = 4096;              // bytes of x fetched ahead of the first look at a row
constexpr int64_t kPad = 64;                       // rows in scratch are padded to this many elements
constexpr float kSmallestScale = 1.17549435e-38f;  // FLT_MIN: keeps 1 / scale finite

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// ---- scratch ---------------------------------------------------------------------------------------------------

// What one pass keeps. Element is the type of a prepared row: s8 or s16 when quantised, f32 for weight_only.
template <class Element>
struct Pass {
  int64_t max_rows, stride, chunks;
  Element* rows;      // [max_rows, stride]
  float* scale;       // [max_rows] x_scale
  int32_t* row_init;  // [chunks, max_rows] -offset * sum of the quantised row, by chunk of K
  char* gathered;     // [K] elements of x, for a row whose columns are not adjacent
  char* tile;         // [kMaxRows, nr] accumulators, then the same in int64

  // An odd number of cache lines between rows, so that the rows of a tile do not fall into the same cache set.
  static int64_t row_stride(int64_t k) {
    const int64_t line = kAlignment / int64_t(sizeof(Element));
    return (round_up(k, kPad) / line | 1) * line;
  }
  static int64_t chunk_count(int64_t k) { return at_least((k + kMaxChunkK - 1) / kMaxChunkK, 1); }
  static int64_t row_count(int64_t k) {
    const int64_t fit = kPassBytes / (row_stride(k) * int64_t(sizeof(Element)));
    return at_most(at_least(fit / kMaxRows, 1), 32) * kMaxRows;
  }
  static int64_t bytes(int64_t k, int nr) { return bytes(k, nr, row_count(k)); }
  static int64_t bytes(int64_t k, int nr, int64_t rows) {
    const int64_t chunks = chunk_count(k);
    return rows * row_stride(k) * int64_t(sizeof(Element)) + round_up(rows * 4, kAlignment) +
           round_up(chunks * rows * 4, kAlignment) + round_up(k * 4, kAlignment) + kMaxRows * nr * 12 + kAlignment;
  }

  // Equal passes: a last one of two rows would read the whole weight for them.
  int64_t count(Range all) const { return (all.end - all.begin + max_rows - 1) / max_rows; }
  Range part(Range all, int64_t i) const {
    const Range part = split(all.end - all.begin, count(all), i);
    return {all.begin + part.begin, all.begin + part.end};
  }

  Pass(char* scratch, int64_t k) : Pass(scratch, k, row_count(k)) {}
  Pass(char* scratch, int64_t k, int64_t rows_held)
      : max_rows(rows_held), stride(row_stride(k)), chunks(chunk_count(k)) {
    rows = reinterpret_cast<Element*>(scratch);
    scratch += max_rows * stride * int64_t(sizeof(Element));
    scale = reinterpret_cast<float*>(scratch);
    scratch += round_up(max_rows * 4, kAlignment);
    row_init = reinterpret_cast<int32_t*>(scratch);
    scratch += round_up(chunks * max_rows * 4, kAlignment);
    gathered = scratch;
    scratch += round_up(k * 4, kAlignment);
    tile = scratch;
  }
};

// Inlined by force where a call, its prologue and its spilled constants would cost a sixth of a short row.
#define PYCOMPRESS_INLINE __attribute__((always_inline)) inline

// ---- preparing rows --------------------------------------------------------------------------------------------

// Row m of x with its columns adjacent: the caller's memory where it already is so, else gathered.
inline const char* row_of(const LinearArgs& a, int64_t m, char* gathered) {
  const int64_t size = dtype_size(a.dtype);
  // Mostly there is one level of rows, and no division.
  const int64_t offset =
      m < a.inner_rows ? m * a.row_stride : m / a.inner_rows * a.outer_stride + m % a.inner_rows * a.row_stride;
  const char* row = static_cast<const char*>(a.x) + offset * size;
  if (a.col_stride == 1) return row;
  for (int64_t k = 0; k < a.k; ++k) {
    if (size == 4) {
      reinterpret_cast<uint32_t*>(gathered)[k] = reinterpret_cast<const uint32_t*>(row)[k * a.col_stride];
    } else {
      reinterpret_cast<uint16_t*>(gathered)[k] = reinterpret_cast<const uint16_t*>(row)[k * a.col_stride];
    }
  }
  return gathered;
}

// max |x| over the row as float; infinity or NaN where the row holds one.
template <Dtype D>
PYCOMPRESS_INLINE float largest_magnitude(const char* row, int64_t k) {
  constexpr int64_t kBytes = sizeof(typename Vec::I);
  const int64_t total = k * (D == Dtype::f32 ? 4 : 2);
  Vec::I m0 = Vec::izero(), m1 = Vec::izero(), m2 = Vec::izero(), m3 = Vec::izero();
  int64_t i = 0;
  for (; i + 4 * kBytes <= total; i += 4 * kBytes) {
    for (int64_t line = 0; line < 4 * kBytes; line += kAlignment) __builtin_prefetch(row + i + kFetchAhead + line);
    m0 = Vec::max_magnitude<D>(m0, Vec::iload(row + i));
    m1 = Vec::max_magnitude<D>(m1, Vec::iload(row + i + kBytes));
    m2 = Vec::max_magnitude<D>(m2, Vec::iload(row + i + 2 * kBytes));
    m3 = Vec::max_magnitude<D>(m3, Vec::iload(row + i + 3 * kBytes));
  }
  for (; i + kBytes <= total; i += kBytes) m0 = Vec::max_magnitude<D>(m0, Vec::iload(row + i));
  if (i < total) {
    alignas(64) char tail[kBytes] = {};
    std::memcpy(tail, row + i, size_t(total - i));
    m1 = Vec::max_magnitude<D>(m1, Vec::iload(tail));
  }
  m0 = Vec::max_magnitude<D>(Vec::max_magnitude<D>(m0, m1), Vec::max_magnitude<D>(m2, m3));
  if constexpr (D == Dtype::f32) {
    return bits_to_float(Vec::reduce_max_u32(m0));
  } else {
    const uint16_t bits = Vec::reduce_max_u16(m0);
    return D == Dtype::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
  }
}

struct Steps {  // x -> q: clamp(x * inverse, low, high), rounded, plus zero_point
  Vec::F inverse, low, high;
  Vec::I zero_point;
};

template <Dtype D, bool STATIC>
Vec::I to_steps(const char* p, const Steps& s) {
  Vec::F v = Vec::mul(Vec::load_as<D>(p), s.inverse);
  // dynamic needs no clamp: |x| * (1 / scale) is at most 127 * (1 + 2^-22)
  if constexpr (STATIC) v = Vec::min(s.high, Vec::max(s.low, v));
  const Vec::I q = Vec::to_int(v);
  return STATIC ? Vec::iadd(q, s.zero_point) : q;
}

// Quantises `count` elements into q, padded with zeros to kPad, and returns the sum of q where the layout needs it.
template <class Isa, Dtype D, bool STATIC>
PYCOMPRESS_INLINE int32_t quantize_elements(const char* x, int64_t count, const Steps& s, typename Isa::X* q) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, kVec = Vec::kLanes * kSize, kStep = 4 * Vec::kLanes;
  Vec::I sum = Vec::izero();
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const char* p = x + i * kSize;
    Isa::store_steps(q + i, to_steps<D, STATIC>(p, s), to_steps<D, STATIC>(p + kVec, s),
                     to_steps<D, STATIC>(p + 2 * kVec, s), to_steps<D, STATIC>(p + 3 * kVec, s));
    sum = Isa::add_steps(sum, q + i);
  }
  // A call of memset costs as much as a short row.
  if (i < round_up(count, kPad)) std::memset(q + i, 0, size_t(round_up(count, kPad) - i) * sizeof(typename Isa::X));
  if (i < count) {
    alignas(64) char tail[4 * kVec] = {};
    std::memcpy(tail, x + i * kSize, size_t((count - i) * kSize));
    Isa::store_steps(q + i, to_steps<D, STATIC>(tail, s), to_steps<D, STATIC>(tail + kVec, s),
                     to_steps<D, STATIC>(tail + 2 * kVec, s), to_steps<D, STATIC>(tail + 3 * kVec, s));
    std::memset(q + count, 0, size_t(i + kStep - count) * sizeof(typename Isa::X));  // static: 0 is not step 0
    sum = Isa::add_steps(sum, q + i);
  }
  return Vec::reduce_add(sum);
}

// x_scale and its reciprocal for a row whose largest magnitude is given.
struct RowScale {
  float scale, inverse;
};

inline RowScale row_scale(const Block& block, float largest) {
  if (!(largest <= 3.4028234664e38f)) return {__builtin_nanf(""), 0.0f};  // NaN or Inf in the row
  const float dynamic = largest / 127.0f > kSmallestScale ? largest / 127.0f : kSmallestScale;
  const float scale = block.args->mode == Mode::static_ ? block.input_scale : dynamic;
  return {scale, 1.0f / scale};
}

template <class Isa, Dtype D>
PYCOMPRESS_INLINE void quantize_row(const Block& block, const char* row, float inverse, int64_t r,
                                    Pass<typename Isa::X>& pass) {
  const int64_t k = block.args->k;
  auto* q = pass.rows + r * pass.stride;
  if (inverse == 0.0f) {
    std::memset(q, 0, size_t(round_up(k, kPad)) * sizeof(typename Isa::X));
    for (int64_t c = 0; c < pass.chunks; ++c) pass.row_init[c * pass.max_rows + r] = 0;
    return;
  }
  const bool is_static = block.args->mode == Mode::static_;
  const Steps s{Vec::set1(inverse), Vec::set1(float(-128 - block.zero_point)), Vec::set1(float(127 - block.zero_point)),
                Vec::iset1(block.zero_point)};
  for (int64_t c = 0; c < pass.chunks; ++c) {
    const int64_t begin = c * kMaxChunkK, count = at_most(kMaxChunkK, k - begin);
    const char* x = row + begin * (D == Dtype::f32 ? 4 : 2);
    const int32_t sum = is_static ? quantize_elements<Isa, D, true>(x, count, s, q + begin)
                                  : quantize_elements<Isa, D, false>(x, count, s, q + begin);
    pass.row_init[c * pass.max_rows + r] = -Isa::kLayout.offset * sum;
  }
}

// In groups of rows, first every scale and then every row: one row's reduction and divisions, some hundred cycles of
// latency, overlap with the others'.
template <class Isa, Dtype D>
void quantize_rows(const Block& block, Range rows, Pass<typename Isa::X>& pass) {
  constexpr int kGroup = 8;
  constexpr int64_t kGroupBytes = 16 * 1024;  // the second look at a row must find it in L1
  const Args& a = *block.args;
  const int64_t row_bytes = a.k * dtype_size(a.dtype);
  // `gathered` holds one row
  const int64_t group = a.col_stride != 1 ? 1 : at_least(at_most(kGroupBytes / at_least(row_bytes, 1), kGroup), 1);
  for (int64_t m = rows.begin; m < rows.end;) {
    const int count = int(at_most(group, rows.end - m));
    const char* row[kGroup];
    RowScale scale[kGroup];
    for (int i = 0; i < count; ++i) {
      row[i] = row_of(a, m + i, pass.gathered);
      scale[i] = row_scale(block, largest_magnitude<D>(row[i], a.k));
    }
    for (int i = 0; i < count; ++i) {
      const int64_t r = m + i - rows.begin;
      pass.scale[r] = scale[i].scale;
      quantize_row<Isa, D>(block, row[i], scale[i].inverse, r, pass);
    }
    m += count;
  }
}

template <Dtype D>
void widen_rows(const Args& a, Range rows, Pass<float>& pass) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const char* row = row_of(a, m, pass.gathered);
    float* out = pass.rows + (m - rows.begin) * pass.stride;
    pass.scale[m - rows.begin] = 1.0f;
    int64_t k = 0;
    for (; k + Vec::kLanes <= a.k; k += Vec::kLanes) Vec::store(out + k, Vec::load_as<D>(row + k * kSize));
    if (k < a.k) {
      alignas(64) char tail[Vec::kLanes * kSize] = {};
      std::memcpy(tail, row + k * kSize, size_t((a.k - k) * kSize));
      Vec::store(out + k, Vec::load_as<D>(tail));
    }
  }
}

}  // namespace
}  // namespace pycompress::int8_matmul
