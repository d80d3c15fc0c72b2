// The vector kernels, written once over an instruction-set description `Isa` (see decode_avx512.h):
//
//   for each pass of some rows: widen them to f32 into scratch, each group of K filled up to whole units
//     for each panel of `nr` outputs:
//       few rows: decode each unit in registers, multiply, scale at each group's end      few_rows.h
//       many rows: decode a stretch of K into the cache, with its scale; multiply tiles   many_rows.h
//       add bias, activate, store                                                        int8_matmul/finish_tile.h
//
// Which of the two it is depends on M alone, and both sum in an order of their own that rows and threads do not change.
//
// Include after Vec. Everything is in an unnamed namespace (see vec_math.h); no std templates, for the same reason.
#pragma once

#include "int4_matmul/few_rows.h"
#include "int4_matmul/many_rows.h"
#include "int4_matmul/panel.h"
#include "int8_matmul/finish_tile.h"

namespace pycompress::int4_matmul {
namespace {

constexpr int64_t kPassBytes = 2 << 20;              // of widened rows held at a time
constexpr int64_t kLeastRows = 24, kMostRows = 192;  // of a pass

// ---- scratch ---------------------------------------------------------------------------------------------------

// What one pass keeps.
template <class Isa>
struct Pass {
  static constexpr int nr = Isa::kLayout.nr;
  int64_t max_rows, ldx;
  float* x;        // [max_rows, ldx] widened
  float* total;    // [max_rows, nr] sums
  float* ones;     // [max(nr, max_rows)] scales for finish_tile, which the sums have already
  float* decoded;  // [kStretch, nr]
  char* gathered;  // [K] elements of x, for a row whose columns are not adjacent

  // An odd number of cache lines between rows, so that the rows of a tile do not fall into the same cache set.
  static int64_t row_stride(const Shape& s) {
    constexpr int64_t kLine = kAlignment / 4;
    return (round_up(groups_of(s).total_units * kUnit, kLine) / kLine | 1) * kLine;
  }
  static int64_t row_count(int64_t m, const Shape& s) {
    if (m <= Isa::kFewRows) return m;
    return at_most(m, at_most(at_least(kPassBytes / (row_stride(s) * 4), kLeastRows), kMostRows));
  }
  static int64_t bytes(int64_t m, const Shape& s) {
    return (row_count(m, s) * (row_stride(s) + nr) + at_least(nr, row_count(m, s)) + kStretch * nr) * 4 + s.k * 4;
  }

  Pass(char* scratch, int64_t m, const Shape& s) : max_rows(row_count(m, s)), ldx(row_stride(s)) {
    x = reinterpret_cast<float*>(scratch);
    total = x + max_rows * ldx;
    ones = total + max_rows * nr;
    const int64_t scales = at_least(nr, max_rows);
    decoded = ones + scales;
    gathered = reinterpret_cast<char*>(decoded + kStretch * nr);
    for (int64_t i = 0; i < scales; ++i) ones[i] = 1.0f;
  }
};

// ---- preparing rows --------------------------------------------------------------------------------------------

// `count` elements to f32, followed by zeros up to a whole unit
template <Dtype D>
PYCOMPRESS_INLINE void widen(const char* x, int64_t count, float* out) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2;
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) Vec::store(out + i, Vec::load_as<D>(x + i * kSize));
  if (i == count) return;
  alignas(64) char tail[Vec::kLanes * kSize] = {};
  alignas(64) float wide[Vec::kLanes];
  std::memcpy(tail, x + i * kSize, size_t((count - i) * kSize));
  Vec::store(wide, Vec::load_as<D>(tail));
  std::memcpy(out + i, wide, size_t(round_up(count - i, kUnit)) * sizeof(float));
}

template <Dtype D, class Isa>
void widen_rows(const Args& a, const Shape& s, Range rows, const Pass<Isa>& pass) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2;
  const int64_t span = s.group_size % kUnit == 0 ? a.k : s.group_size;  // what needs no gap
  const int64_t padded = round_up(span, kUnit);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const char* row = int8_matmul::row_of(a, m, pass.gathered);
    float* out = pass.x + (m - rows.begin) * pass.ldx;
    for (int64_t k = 0; k < a.k; k += span, out += padded) widen<D>(row + k * kSize, at_most(span, a.k - k), out);
  }
}

// ---- a block of work -------------------------------------------------------------------------------------------

// What finish_tile.h wants to know of an instruction set.
template <class Isa>
struct Finished {
  static constexpr int kVectors = Isa::kVectors;
  static constexpr Layout kLayout = Isa::kLayout;
};

template <class Isa, class Source>
void multiply(const Block& block, Range rows, const Pass<Isa>& pass) {
  const Args& a = *block.args;
  const Shape& s = block.weight.shape;
  constexpr int nr = Isa::kLayout.nr;
  const int size = dtype_size(a.dtype);
  const Groups groups = groups_of(s);
  const int64_t count = rows.end - rows.begin, padded_n = round_up(a.n, Vec::kLanes);
  const auto finish = int8_matmul::finisher<Finished<Isa>>(a.activation, a.dtype);
  for (int64_t p = block.panels.begin; p < block.panels.end; ++p) {
    const int64_t first = p * nr, width = at_most(nr, padded_n - first);
    const Panel panel{block.weight.panels + p * panel_bytes(s, groups, nr), width, head_bytes(s, width), groups};
    std::memset(pass.total, 0, size_t(count * nr) * sizeof(float));
    if (a.m <= Isa::kFewRows) {
      multiply_few<Isa, Source>(panel, pass.x, pass.ldx, count, pass.total);
    } else {
      multiply_many<Isa, Source>(panel, pass.x, pass.ldx, count, pass.decoded, pass.total);
    }
    const int columns = int(at_most(nr, a.n - first));
    char* y = static_cast<char*>(a.y) + (rows.begin * a.ldy + first) * size;
    finish({pass.total, pass.ones, pass.ones, block.bias + first, y, a.ldy * size, int(count), columns, true});
  }
}

template <class Isa, Kind KIND>
void run_kind(const Block& block) {
  const Args& a = *block.args;
  const Shape& s = block.weight.shape;
  const Pass<Isa> pass(block.scratch, a.m, s);
  const int64_t count = block.rows.end - block.rows.begin, passes = (count + pass.max_rows - 1) / pass.max_rows;
  for (int64_t i = 0; i < passes; ++i) {
    const Range part = split(count, passes, i);
    const Range rows{block.rows.begin + part.begin, block.rows.begin + part.end};
    switch (a.dtype) {
      case Dtype::f32: widen_rows<Dtype::f32>(a, s, rows, pass); break;
      case Dtype::bf16: widen_rows<Dtype::bf16>(a, s, rows, pass); break;
      case Dtype::f16: widen_rows<Dtype::f16>(a, s, rows, pass); break;
    }
    multiply<Isa, Source<Isa, KIND>>(block, rows, pass);
  }
}

// Start here.
template <class Isa>
void run_block(const Block& block) {
  const Shape& s = block.weight.shape;
  if (s.format == Format::nf4) return run_kind<Isa, Kind::codebook>(block);
  if (s.has_zero_point) return run_kind<Isa, Kind::asymmetric>(block);
  run_kind<Isa, Kind::symmetric>(block);
}

template <class Isa>
int64_t block_scratch_bytes(int64_t m, const Shape& s) {
  return Pass<Isa>::bytes(m, s);
}

}  // namespace
}  // namespace pycompress::int4_matmul
