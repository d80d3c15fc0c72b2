// The index kernels, written once over Vec and a description of the dot product:
//
//   for each panel of up to 4 registers of tokens:
//     transpose (s8: quantise first) the rows of x into the panel        index_panel.h
//     for each strip of 16 outputs:
//       for each group: walk its lists, sums in registers                below
//       transpose the sums back, scale, add bias, activate, store        index_finish.h
//
// Include after Vec. Everything is in an unnamed namespace (see vec_math.h); no std templates, for the same reason.
#pragma once

#include "sparse_linear/index_finish.h"
#include "sparse_linear/index_panel.h"

namespace pycompress::sparse_linear {
namespace {

#define PYCOMPRESS_INLINE_WALK __attribute__((always_inline)) inline
#define PYCOMPRESS_UNROLL4 _Pragma("GCC unroll 4")
#define PYCOMPRESS_UNROLL8 _Pragma("GCC unroll 8")

// ---- dot products: what a unit of the panel and a value do to a sum -------------------------------------------------

struct FloatDot {
  using Sum = Vec::F;
  static constexpr bool kGather = false, kInteger = false;
  static constexpr int kBytes = 4;
  static Sum first(int32_t) { return Vec::zero(); }
  static Sum add(Sum a, Sum b) { return Vec::add(a, b); }
  static Sum load(const char* x) { return Vec::load(reinterpret_cast<const float*>(x)); }
  static Sum weight(const char* w) {
    float value;
    std::memcpy(&value, w, sizeof value);
    return Vec::set1(value);
  }
  static Sum dot(Sum sum, Sum x, Sum w) { return Vec::fma(x, w, sum); }
};

struct HalfDot : FloatDot {
  static constexpr int kBytes = 2;
  static Sum weight(const char* w) {
    uint16_t value;
    std::memcpy(&value, w, sizeof value);
    return Vec::set1(bf16_to_float(value));
  }
};

template <class Dot8>
struct IntDot {
  using Sum = Vec::I;
  static constexpr bool kGather = false, kInteger = true;
  static constexpr int kBytes = 4;
  static Sum first(int32_t init) { return Vec::iset1(init); }
  static Sum add(Sum a, Sum b) { return Vec::iadd(a, b); }
  static Sum load(const char* x) { return Vec::iload(x); }
  static Sum weight(const char* w) {
    int32_t value;
    std::memcpy(&value, w, sizeof value);
    return Vec::iset1(value);
  }
  static Sum dot(Sum sum, Sum x, Sum w) { return Dot8::dot(sum, x, w); }
};

// Four columns of bytes, interleaved.
template <class Dot8>
struct GatherDot : IntDot<Dot8> {
  static constexpr bool kGather = true;
};

// ---- one group -------------------------------------------------------------------------------------------------

// x[v]: the unit's registers, for the vectors that hold tokens
template <class Dot, int NV>
PYCOMPRESS_INLINE_WALK void load_unit(const char* panel, const uint16_t* unit, typename Dot::Sum (&x)[NV]) {
#ifdef __AVX512F__
  if constexpr (Dot::kGather) {
    const __m512i a = _mm512_load_si512(panel + int64_t(unit[0]) * 64);
    const __m512i b = _mm512_load_si512(panel + int64_t(unit[1]) * 64);
    const __m512i c = _mm512_load_si512(panel + int64_t(unit[2]) * 64);
    const __m512i d = _mm512_load_si512(panel + int64_t(unit[3]) * 64);
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    x[0] = _mm512_unpacklo_epi16(ab, cd);
    if constexpr (NV > 1) x[1] = _mm512_unpackhi_epi16(ab, cd);
    if constexpr (NV > 2) {
      const __m512i high_ab = _mm512_unpackhi_epi8(a, b), high_cd = _mm512_unpackhi_epi8(c, d);
      x[2] = _mm512_unpacklo_epi16(high_ab, high_cd);
      if constexpr (NV > 3) x[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
    }
    return;
  }
#endif
  const char* at = panel + int64_t(*unit) * (NV * L * 4);
  PYCOMPRESS_UNROLL4
  for (int v = 0; v < NV; ++v) x[v] = Dot::load(at + v * L * 4);
}

// The list of the units that exactly the rows in P want.
template <class Dot, int G, int NV, unsigned P>
PYCOMPRESS_INLINE_WALK void walk_list(int count, const char* panel, const uint16_t*& units, const char*& values,
                                      typename Dot::Sum (&sum)[G][NV]) {
  using Sum = typename Dot::Sum;
  constexpr int kUnits = Dot::kGather ? 4 : 1, R = __builtin_popcount(P), kBytes = R * Dot::kBytes;
  // Products take 4 cycles and two start in each: with fewer than 8 sums, neighbouring units go to sets of their own.
  constexpr int kSets = 8 / (R * NV) > 1 ? 8 / (R * NV) : 1;
  if constexpr (kSets > 1) {
    if (count >= kSets) {
      Sum set[kSets][R * NV];
      PYCOMPRESS_UNROLL8
      for (int s = 0; s < kSets; ++s) {
        PYCOMPRESS_UNROLL8
        for (int i = 0; i < R * NV; ++i) set[s][i] = Dot::first(0);
      }
      for (; count >= kSets; count -= kSets, units += kSets * kUnits, values += kSets * kBytes) {
        PYCOMPRESS_UNROLL8
        for (int s = 0; s < kSets; ++s) {
          Sum x[NV];
          load_unit<Dot, NV>(panel, units + s * kUnits, x);
          PYCOMPRESS_UNROLL4
          for (int i = 0; i < R; ++i) {
            const Sum w = Dot::weight(values + s * kBytes + i * Dot::kBytes);
            PYCOMPRESS_UNROLL4
            for (int v = 0; v < NV; ++v) set[s][i * NV + v] = Dot::dot(set[s][i * NV + v], x[v], w);
          }
        }
      }
      PYCOMPRESS_UNROLL8
      for (int s = 0; s < kSets; ++s) {
        PYCOMPRESS_UNROLL4
        for (int r = 0; r < G; ++r) {
          if (((P >> r) & 1) == 0) continue;
          const int i = __builtin_popcount(P & ((1u << r) - 1));  // of the rows in P
          PYCOMPRESS_UNROLL4
          for (int v = 0; v < NV; ++v) sum[r][v] = Dot::add(sum[r][v], set[s][i * NV + v]);
        }
      }
    }
  }
  for (; count > 0; --count, units += kUnits, values += kBytes) {
    Sum x[NV];
    load_unit<Dot, NV>(panel, units, x);
    PYCOMPRESS_UNROLL4
    for (int r = 0; r < G; ++r) {
      if (((P >> r) & 1) == 0) continue;
      const Sum w = Dot::weight(values + __builtin_popcount(P & ((1u << r) - 1)) * Dot::kBytes);
      PYCOMPRESS_UNROLL4
      for (int v = 0; v < NV; ++v) sum[r][v] = Dot::dot(sum[r][v], x[v], w);
    }
  }
}

template <class Dot, int G, int NV, unsigned P>
PYCOMPRESS_INLINE_WALK void walk_lists(const uint16_t* counts, const char* panel, const uint16_t*& units,
                                       const char*& values, typename Dot::Sum (&sum)[G][NV]) {
  if constexpr (P < (1u << G)) {
    walk_list<Dot, G, NV, P>(counts[P - 1], panel, units, values, sum);
    walk_lists<Dot, G, NV, P + 1>(counts, panel, units, values, sum);
  }
}

// Where the next group begins.
struct Cursor {
  const uint16_t* list;
  const char* value;
};

// The sums of a group's rows to tile [rows, NV * L].
template <class Dot, int G, int NV>
Cursor run_group(Cursor at, const char* panel, const int32_t* row_init, char* tile) {
  typename Dot::Sum sum[G][NV];
  PYCOMPRESS_UNROLL4
  for (int r = 0; r < G; ++r) {
    PYCOMPRESS_UNROLL4
    for (int v = 0; v < NV; ++v) sum[r][v] = Dot::first(row_init[r]);
  }
  const uint16_t* counts = at.list + 1;
  const uint16_t* units = counts + ((1 << G) - 1);
  const char* values = at.value;
  walk_lists<Dot, G, NV, 1>(counts, panel, units, values, sum);
  PYCOMPRESS_UNROLL4
  for (int r = 0; r < G; ++r) {
    PYCOMPRESS_UNROLL4
    for (int v = 0; v < NV; ++v) Vec::istore(tile + (r * NV + v) * L * 4, (Vec::I)sum[r][v]);
  }
  return {units, values};
}

template <class Dot, int MAX_GROUP, int NV>
void run_strip(const IndexWeight& weight, int64_t strip, const char* panel, char* tile) {
  const Strip begin = weight.strips[strip];
  const uint16_t* end = weight.lists + weight.strips[strip + 1].list;
  Cursor at{weight.lists + begin.list, weight.values + begin.value * Dot::kBytes};
  const int32_t* row_init = weight.row_init + strip * kStrip;
  while (at.list < end) {
    const int rows = at.list[0];
    if (MAX_GROUP >= 4 && rows == 4) {
      at = run_group<Dot, MAX_GROUP >= 4 ? 4 : 1, NV>(at, panel, row_init, tile);
    } else if (rows == 2) {
      at = run_group<Dot, 2, NV>(at, panel, row_init, tile);
    } else {
      at = run_group<Dot, 1, NV>(at, panel, row_init, tile);
    }
    row_init += rows;
    tile += rows * NV * L * 4;
  }
}

template <class Dot, class Source, int MAX_GROUP>
void run_panels(const IndexBlock& block) {
  const Args& a = *block.args;
  const IndexWeight& weight = *block.weight;
  const int64_t units = (a.k + Source::kUnit - 1) / Source::kUnit;
  const int64_t columns = Dot::kGather ? a.k : units;
  const PanelScratch scratch(block.scratch, panel_bytes(columns, Dot::kGather));
  const int64_t vectors = (block.tokens.end - block.tokens.begin + L - 1) / L;
  const int64_t widest = panel_vectors(columns, Dot::kGather);
  const int64_t panels = (vectors + widest - 1) / widest;
  const FinishStrips finish = strip_finisher<Dot::kInteger>(a.activation, a.dtype);
  constexpr void (*kRunStrip[])(const IndexWeight&, int64_t, const char*, char*) = {
      run_strip<Dot, MAX_GROUP, 1>, run_strip<Dot, MAX_GROUP, 2>, run_strip<Dot, MAX_GROUP, 3>,
      run_strip<Dot, MAX_GROUP, 4>};
  for (int64_t p = 0; p < panels; ++p) {
    const Range part = split(vectors, panels, p);  // equal panels: 5 registers are 3 + 2
    const int nv = int(part.end - part.begin);
    const Range tokens{block.tokens.begin + part.begin * L,
                       at_most(block.tokens.begin + part.end * L, block.tokens.end)};
    fill_panel<Source>(a, tokens, nv, Dot::kGather, scratch);
    for (int64_t s = block.strips.begin; s < block.strips.end; s += kFinishStrips) {
      const Range strips{s, at_most(s + kFinishStrips, block.strips.end)};
      for (int64_t i = s; i < strips.end; ++i) {
        kRunStrip[nv - 1](weight, i, scratch.panel, scratch.tile + (i - s) * kStrip * nv * L * 4);
      }
      finish(block, tokens, strips, nv, scratch);
    }
  }
}

template <class Dot, int MAX_GROUP>
void run_float_block(const IndexBlock& block) {
  switch (block.args->dtype) {
    case Dtype::f32: return run_panels<Dot, FloatSource<Dtype::f32>, MAX_GROUP>(block);
    case Dtype::bf16: return run_panels<Dot, FloatSource<Dtype::bf16>, MAX_GROUP>(block);
    case Dtype::f16: return run_panels<Dot, FloatSource<Dtype::f16>, MAX_GROUP>(block);
  }
}

template <class Dot, class Dot8, int MAX_GROUP>
void run_dot8_block(const IndexBlock& block) {
  switch (block.args->dtype) {
    case Dtype::f32: return run_panels<Dot, QuantizedSource<Dot8, Dtype::f32>, MAX_GROUP>(block);
    case Dtype::bf16: return run_panels<Dot, QuantizedSource<Dot8, Dtype::bf16>, MAX_GROUP>(block);
    case Dtype::f16: return run_panels<Dot, QuantizedSource<Dot8, Dtype::f16>, MAX_GROUP>(block);
  }
}

template <class Dot8, int MAX_GROUP, bool MAY_GATHER>
void run_int_block(const IndexBlock& block) {
  if constexpr (MAY_GATHER) {
    if (block.weight->gather) return run_dot8_block<GatherDot<Dot8>, Dot8, MAX_GROUP>(block);
  }
  run_dot8_block<IntDot<Dot8>, Dot8, MAX_GROUP>(block);
}

inline int64_t float_scratch_bytes(const Args& a, const IndexWeight&) {
  return PanelScratch::bytes(panel_bytes(a.k, false), FloatSource<Dtype::f32>::rows_bytes(a, a.k));
}

template <class Dot8>
int64_t int_scratch_bytes(const Args& a, const IndexWeight& weight) {
  const int64_t units = (a.k + Dot8::kLayout.ku - 1) / Dot8::kLayout.ku;
  return PanelScratch::bytes(panel_bytes(weight.gather ? a.k : units, weight.gather),
                             QuantizedSource<Dot8, Dtype::f32>::rows_bytes(a, a.k));
}

}  // namespace
}  // namespace pycompress::sparse_linear
