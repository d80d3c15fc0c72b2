// A few rows of x: the weight is decoded in registers, every time it is read. See panel_engine.h.
#pragma once

#include <type_traits>

#include "common/memory.h"
#include "int4_matmul/panel.h"

namespace pycompress::int4_matmul {
namespace {

// Units summed up before they are scaled and added to the rest, also inside a long group: rounding errors grow with
// this length, and not with K.
constexpr int64_t kSegmentUnits = 64;

// One step: a unit of NV registers of outputs meets 8 values of MR rows. Sums of even and of odd k are kept apart: with
// one row there would else be four chains, too few to hide the latency of a sum. It is so for any number of rows, so
// that the result of a row does not depend on how many come with it.
template <class Source, class Zero, int MR, int NV, int I = 0>
PYCOMPRESS_INLINE void few_step(const Source& source, const Vec::I (&units)[NV], const Zero (&zero)[NV], const float* x,
                                int64_t ldx, Vec::F (&sum)[2][MR][NV]) {
  if constexpr (I < kUnit) {
    Vec::F w[NV];
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) w[j] = source.template value<I>(units[j], zero[j]);
    PYCOMPRESS_UNROLL
    for (int r = 0; r < MR; ++r) {
      const Vec::F v = Vec::set1(x[r * ldx + I]);
      PYCOMPRESS_UNROLL
      for (int j = 0; j < NV; ++j) sum[I % 2][r][j] = Vec::fma(v, w[j], sum[I % 2][r][j]);
    }
    few_step<Source, Zero, MR, NV, I + 1>(source, units, zero, x, ldx, sum);
  }
}

// total[MR, NV registers] += scale * (x . w) over a segment, from register `first` of the panel's outputs on
template <class Isa, class Source, int MR, int NV>
PYCOMPRESS_INLINE void few_tile(const Segment& segment, int64_t width, int first, const float* x, int64_t ldx,
                                float* total) {
  constexpr int L = Vec::kLanes, ld_total = Isa::kLayout.nr;
  // With one row the decoding is what takes the time, and registers are left for its short form.
  using Zero = std::conditional_t<Source::kHasZero && MR == 1, typename Isa::Offsets, Vec::F>;
  const Source source;
  const GroupHead<Source> head(segment.group, width, first);
  Zero zero[NV];
  Vec::F sum[2][MR][NV];
  PYCOMPRESS_UNROLL
  for (int j = 0; j < NV; ++j) {
    zero[j] = Zero(head.template zero<Isa>(j));
    PYCOMPRESS_UNROLL
    for (int r = 0; r < MR; ++r) sum[0][r][j] = sum[1][r][j] = Vec::zero();
  }
  const uint8_t* w = segment.w + first * L * 4;
  for (int64_t u = segment.units; u > 0; --u) {
    Vec::I units[NV];
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) units[j] = Vec::iload(w + j * L * 4);
    if (first == 0) {  // for the rest of the width too: it follows at once
      PYCOMPRESS_UNROLL
      for (int line = 0; line < Isa::kLayout.nr * 4; line += kAlignment) __builtin_prefetch(w + kDecodeAhead + line);
    }
    few_step<Source, Zero, MR, NV>(source, units, zero, x, ldx, sum);
    w += width * 4;
    x += kUnit;
  }
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* const at = total + r * ld_total + (first + j) * L;
      Vec::store(at, Vec::fma(Vec::add(sum[0][r][j], sum[1][r][j]), head.scale(j), Vec::load(at)));
    }
  }
}

// total[MR, nr] += scale * (x . w) over the whole width of the next `segments` segments, or what there is of them
template <class Isa, class Source, int MR>
void few_segments(Walk walk, int64_t segments, int64_t width, const float* x, int64_t ldx, float* total) {
  constexpr int kMost = Isa::few_vectors(MR);
  const int vectors = int(width) / Vec::kLanes;
  for (; segments > 0; --segments) {
    const Segment segment = walk.next(kSegmentUnits);
    if (segment.units == 0) return;
    for (int first = 0; first < vectors; first += kMost) {
      const int left = vectors - first;
      if (left >= kMost) {
        few_tile<Isa, Source, MR, kMost>(segment, width, first, x, ldx, total);
        continue;
      }
      if constexpr (kMost == 4) {
        if (left == 3) few_tile<Isa, Source, MR, 3>(segment, width, first, x, ldx, total);
        if (left == 2) few_tile<Isa, Source, MR, 2>(segment, width, first, x, ldx, total);
      }
      if (left == 1) few_tile<Isa, Source, MR, 1>(segment, width, first, x, ldx, total);
    }
    x += segment.units * kUnit;
  }
}

using FewSegments = void (*)(Walk, int64_t, int64_t, const float*, int64_t, float*);

template <class Isa, class Source>
FewSegments few_segments_for(int64_t rows) {
  switch (rows) {
    case 1: return few_segments<Isa, Source, 1>;
    case 2: return few_segments<Isa, Source, 2>;
    case 3: return few_segments<Isa, Source, 3>;
    case 4: return few_segments<Isa, Source, 4>;
    case 5: return few_segments<Isa, Source, 5>;
    default: return few_segments<Isa, Source, 6>;
  }
}

// total[rows, nr] += x . w for one panel
template <class Isa, class Source>
void multiply_few(const Panel& panel, const float* x, int64_t ldx, int64_t rows, float* total) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  Walk walk(panel);
  if (tiles == 1) {
    few_segments_for<Isa, Source>(rows)(walk, panel.groups.total_units, panel.width, x, ldx, total);
    return;
  }
  for (Walk next = walk;; walk = next) {
    const int64_t units = next.next(kSegmentUnits).units;
    if (units == 0) return;
    for (int64_t t = 0; t < tiles; ++t) {  // all of them while the segment is in the first cache
      const Range part = split(rows, tiles, t);
      few_segments_for<Isa, Source>(part.end - part.begin)(walk, 1, panel.width, x + part.begin * ldx, ldx,
                                                           total + part.begin * Isa::kLayout.nr);
    }
    x += units * kUnit;
  }
}

}  // namespace
}  // namespace pycompress::int4_matmul
