// Many rows of x: a stretch of a panel is decoded into the cache once, and then multiplied as a float weight. See
// panel_engine.h.
#pragma once

#include "common/memory.h"
#include "int4_matmul/panel.h"

namespace pycompress::int4_matmul {
namespace {

constexpr int64_t kStretchUnits = 16, kStretch = kStretchUnits * kUnit;  // k decoded at a time: 32 KB of floats

template <class Source, int I = 0>
PYCOMPRESS_INLINE void decode_unit(const Source& source, Vec::I units, Vec::F zero, Vec::F scale, int64_t width,
                                   float* out) {
  if constexpr (I < kUnit) {
    Vec::store(out + I * width, Vec::mul(source.template value<I>(units, zero), scale));
    decode_unit<Source, I + 1>(source, units, zero, scale, width, out);
  }
}

// The next stretch of a panel's weights as floats [k, width]. Answers how many k they are, 0 at the end.
template <class Isa, class Source>
int64_t decode_stretch(Walk& walk, int64_t width, float* out) {
  constexpr int L = Vec::kLanes;
  const Source source;
  int64_t done = 0;
  while (done < kStretchUnits) {
    const Segment segment = walk.next(kStretchUnits - done);
    if (segment.units == 0) break;
    const uint8_t* w = segment.w;
    for (int64_t u = 0; u < segment.units; ++u, out += kUnit * width) {
      for (int64_t j = 0; j < width / L; ++j, w += L * 4) {
        const GroupHead<Source> head(segment.group, width, j);
        __builtin_prefetch(w + kDecodeAhead, 0, 2);
        decode_unit(source, Vec::iload(w), head.template zero<Isa>(0), head.scale(0), width, out + j * L);
      }
    }
    done += segment.units;
  }
  return done * kUnit;
}

// total[MR, NV registers] += x . w over k
template <class Isa, int MR, int NV>
void dense_tile(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t k, float* total) {
  constexpr int L = Vec::kLanes, ld_total = Isa::kLayout.nr;
  Vec::F sum[MR][NV];
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) sum[r][j] = Vec::zero();
  }
  for (; k > 0; --k, w += ldw, ++x) {
    Vec::F b[NV];
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = Vec::load(w + j * L);
    PYCOMPRESS_UNROLL
    for (int r = 0; r < MR; ++r) {
      const Vec::F v = Vec::set1(x[r * ldx]);
      PYCOMPRESS_UNROLL
      for (int j = 0; j < NV; ++j) sum[r][j] = Vec::fma(v, b[j], sum[r][j]);
    }
  }
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* const at = total + r * ld_total + j * L;
      Vec::store(at, Vec::add(sum[r][j], Vec::load(at)));
    }
  }
}

using DenseTile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*);

template <class Isa, int MR>
DenseTile dense_tile_of(int vectors) {
  if constexpr (Isa::kTileVectors == 4) {
    if (vectors == 4) return dense_tile<Isa, MR, 4>;
    if (vectors == 3) return dense_tile<Isa, MR, 3>;
  }
  return vectors == 2 ? dense_tile<Isa, MR, 2> : dense_tile<Isa, MR, 1>;
}

template <class Isa>
DenseTile dense_tile_for(int rows, int vectors) {
  switch (rows) {
    case 1: return dense_tile_of<Isa, 1>(vectors);
    case 2: return dense_tile_of<Isa, 2>(vectors);
    case 3: return dense_tile_of<Isa, 3>(vectors);
    case 4: return dense_tile_of<Isa, 4>(vectors);
    case 5: return dense_tile_of<Isa, 5>(vectors);
    default: return dense_tile_of<Isa, 6>(vectors);
  }
}

// total[rows, nr] += x . w for one panel; `decoded` has room for a stretch of it
template <class Isa, class Source>
void multiply_many(const Panel& panel, const float* x, int64_t ldx, int64_t rows, float* decoded, float* total) {
  constexpr int L = Vec::kLanes, nr = Isa::kLayout.nr;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int vectors = int(panel.width) / L;
  Walk walk(panel);
  for (int64_t k = decode_stretch<Isa, Source>(walk, panel.width, decoded); k > 0;
       x += k, k = decode_stretch<Isa, Source>(walk, panel.width, decoded)) {
    for (int first = 0; first < vectors; first += Isa::kTileVectors) {
      const int count = int(at_most(Isa::kTileVectors, vectors - first));
      for (int64_t t = 0; t < tiles; ++t) {
        const Range part = split(rows, tiles, t);  // 16 rows are 6 + 5 + 5: no tile is left with a row or two
        dense_tile_for<Isa>(int(part.end - part.begin), count)(decoded + first * L, panel.width, x + part.begin * ldx,
                                                               ldx, k, total + part.begin * nr + first * L);
      }
    }
  }
}

}  // namespace
}  // namespace pycompress::int4_matmul
