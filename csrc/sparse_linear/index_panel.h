// Rows of x to a panel of units, tokens in lanes; see index.h. Include after Vec.
#pragma once

#include "int8_matmul/prepare_rows.h"
#include "sparse_linear/index.h"

namespace pycompress::sparse_linear {
namespace {

namespace im = int8_matmul;
using im::at_most;
using im::round_up;

constexpr int L = Vec::kLanes;
constexpr int kVectors = 4;                 // registers a panel is wide, at most
constexpr int kFinishStrips = 8;            // strips that are stored together, 512 bytes of f32 in a row of y
constexpr int64_t kPanelBytes = 640 << 10;  // in L2, beside the lists and values that stream through it

// What one thread keeps. `tokens` of a panel, at most.
struct PanelScratch {
  char* panel;
  char* tile;    // [kFinishStrips * kStrip, tokens] sums
  float* scale;  // [tokens] x_scale
  char* rows;    // L rows: quantised, or gathered where the columns of x are not adjacent
  char* stage;   // gather: 16 quads of every vector, before they are spread

  static constexpr int64_t kTile = int64_t(kFinishStrips) * kStrip * kVectors * L * 4;
  static constexpr int64_t kScale = int64_t(kVectors) * L * 4;
  static constexpr int64_t kStage = int64_t(L) * kVectors * L * 4;

  static int64_t bytes(int64_t panel_bytes, int64_t rows_bytes) {
    return kTile + kScale + kStage + panel_bytes + rows_bytes;
  }

  PanelScratch(char* scratch, int64_t panel_bytes) {
    tile = scratch;
    scale = reinterpret_cast<float*>(tile + kTile);
    stage = tile + kTile + kScale;
    panel = stage + kStage;
    rows = panel + panel_bytes;
  }
};

// Registers of a panel: fewer tokens where K is so large that the panel would not stay in L2.
inline int panel_vectors(int64_t unit_count, bool gather) {
  if (gather) return kVectors;
  int vectors = kVectors;
  while (vectors > 1 && unit_count * vectors * L * 4 > kPanelBytes) vectors /= 2;
  return vectors;
}

inline int64_t panel_bytes(int64_t units, bool gather) {
  const int64_t whole = round_up(units, 4 * L);
  return gather ? whole * kVectors * L : whole * panel_vectors(units, false) * L * 4;
}

// ---- float -----------------------------------------------------------------------------------------------------

template <Dtype D>
struct FloatSource {
  static constexpr int kUnit = 1;
  static constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2;
  const char* row[L];
  int64_t k;

  static int64_t rows_bytes(const Args& a, int64_t) { return a.col_stride == 1 ? 0 : L * round_up(a.k, 64) * 4; }

  FloatSource(const Args& a, Range tokens, const PanelScratch& scratch, float*) : k(a.k) {
    for (int i = 0; i < L; ++i) {
      const int64_t m = at_most(tokens.begin + i, tokens.end - 1);  // lanes without a token repeat the last one
      row[i] = im::row_of(a, m, scratch.rows + i * round_up(a.k, 64) * 4);
    }
  }

  // units [u, u + L) of token i
  Vec::I load(int i, int64_t u) const {
    if (u + L <= k) return as_bits(Vec::load_as<D>(row[i] + u * kSize));
    alignas(64) char tail[L * kSize] = {};
    std::memcpy(tail, row[i] + u * kSize, size_t((k - u) * kSize));
    return as_bits(Vec::load_as<D>(tail));
  }
  static Vec::I as_bits(Vec::F v) { return (Vec::I)v; }
};

// ---- s8 --------------------------------------------------------------------------------------------------------

template <class Dot, Dtype D>
struct QuantizedSource {
  using X = typename Dot::X;
  static constexpr int kUnit = Dot::kLayout.ku;
  im::Pass<X> pass;

  static int64_t rows_bytes(const Args&, int64_t k) { return im::Pass<X>::bytes(k, 0, L); }

  QuantizedSource(const Args& a, Range tokens, const PanelScratch& scratch, float* scale) : pass(scratch.rows, a.k, L) {
    im::Args args;
    static_cast<LinearArgs&>(args) = a;
    im::Block block{};
    block.args = &args;
    im::quantize_rows<Dot, D>(block, tokens, pass);
    for (int i = 0; i < L; ++i) scale[i] = pass.scale[at_most(i, tokens.end - tokens.begin - 1)];
  }

  Vec::I load(int i, int64_t u) const {
    const Vec::I raw = Vec::iload(pass.rows + i * pass.stride + u * kUnit);  // lanes without a token: anything
    return Dot::kLayout.offset == 0 ? raw : Vec::ixor(raw, Vec::iset1(int32_t(0x80808080)));
  }
};

// ---- the panel -------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
// 4 registers of 16 tokens x 4 columns -> 4 columns of 64 bytes. Within each 128-bit quarter l, byte 4 r + t of a column
// is token 16 r + 4 l + t: the order that unpacking bytes and then words turns back into whole registers (see
// GatherDot::load).
inline void spread_quad(const char* quads, char* columns) {
  const __m512i by_column = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i r[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) r[v] = _mm512_shuffle_epi8(_mm512_load_si512(quads + v * 64), by_column);
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  _mm512_store_si512(columns, _mm512_unpacklo_epi64(a, c));
  _mm512_store_si512(columns + 64, _mm512_unpackhi_epi64(a, c));
  _mm512_store_si512(columns + 128, _mm512_unpacklo_epi64(b, d));
  _mm512_store_si512(columns + 192, _mm512_unpackhi_epi64(b, d));
}
#else
inline void spread_quad(const char*, char*) {}  // no layout of AVX2 gathers
#endif

// Fills the panel with `tokens`, at most `vectors` * L of them.
template <class Source>
void fill_panel(const Args& a, Range tokens, int vectors, bool gather, const PanelScratch& scratch) {
  const int64_t units = (a.k + Source::kUnit - 1) / Source::kUnit;
  const int64_t step = int64_t(gather ? kVectors : vectors) * L * 4;
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = tokens.begin + v * L;
    const Source source(a, {first, at_most(first + L, tokens.end)}, scratch, scratch.scale + v * L);
    for (int64_t u = 0; u < units; u += L) {
      Vec::I square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = source.load(i, u);
      Vec::transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) Vec::istore(scratch.panel + (u + j) * step + v * L * 4, square[j]);
    }
  }
  if (!gather) return;
  // Quads of 4 columns to columns of bytes, in place: both take 256 bytes.
  for (int64_t u = 0; u < units; ++u) {
    std::memcpy(scratch.stage, scratch.panel + u * step, size_t(step));
    spread_quad(scratch.stage, scratch.panel + u * step);
  }
}

}  // namespace
}  // namespace pycompress::sparse_linear
