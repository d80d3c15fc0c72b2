// The vector kernels, written once over an instruction-set description `Isa` (see kernel_avx512vnni.cpp):
//
//   for each pass of a few rows, small enough to stay in L2:            prepare_rows.h
//     quantise the rows (weight_only: widen them to f32) into scratch
//     for each panel of `nr` outputs, for each tile of up to 6 rows:
//       accumulate the tile over K in registers, into a small buffer    tiles.h
//       scale, add bias, activate, store                                finish_tile.h
//
// Include after Vec. Everything is in an unnamed namespace (see vec_math.h); no std templates, for the same reason.
#pragma once

#include "int8_matmul/finish_tile.h"
#include "int8_matmul/prepare_rows.h"
#include "int8_matmul/tiles.h"

namespace pycompress::int8_matmul {
namespace {

constexpr int64_t kStreamBytes = 8 << 20;  // a weight this large comes from memory at every call

// Tables of the tile functions by [rows - 1][vectors - 1].
template <class Isa>
using IntTile = void (*)(const uint8_t*, const typename Isa::X*, int64_t, int64_t, const int32_t*, const int32_t*,
                         Fetch, int32_t*);
using FloatTile = void (*)(const uint8_t*, const float*, int64_t, int64_t, float*);

template <class Isa, int MR>
struct TileRow {
  static IntTile<Isa> integer(int nv) {
    if constexpr (Isa::kVectors == 4) {
      if (nv == 4) return int_tile<Isa, MR, 4>;
      if (nv == 3) return int_tile<Isa, MR, 3>;
    }
    return nv == 2 ? int_tile<Isa, MR, 2> : int_tile<Isa, MR, 1>;
  }
  static FloatTile floating(int nv) {
    if constexpr (Isa::kVectors == 4) {
      if (nv == 4) return float_tile<Isa, MR, 4>;
      if (nv == 3) return float_tile<Isa, MR, 3>;
    }
    return nv == 2 ? float_tile<Isa, MR, 2> : float_tile<Isa, MR, 1>;
  }
};

template <class Isa>
IntTile<Isa> int_tile_for(int rows, int nv) {
  switch (rows) {
    case 1: return TileRow<Isa, 1>::integer(nv);
    case 2: return TileRow<Isa, 2>::integer(nv);
    case 3: return TileRow<Isa, 3>::integer(nv);
    case 4: return TileRow<Isa, 4>::integer(nv);
    case 5: return TileRow<Isa, 5>::integer(nv);
    default: return TileRow<Isa, 6>::integer(nv);
  }
}

template <class Isa>
FloatTile float_tile_for(int rows, int nv) {
  switch (rows) {
    case 1: return TileRow<Isa, 1>::floating(nv);
    case 2: return TileRow<Isa, 2>::floating(nv);
    case 3: return TileRow<Isa, 3>::floating(nv);
    case 4: return TileRow<Isa, 4>::floating(nv);
    case 5: return TileRow<Isa, 5>::floating(nv);
    default: return TileRow<Isa, 6>::floating(nv);
  }
}

struct Panel {
  const uint8_t* w;
  int64_t first;            // output
  int columns, vectors;     // real outputs, and registers that hold them
  const int32_t* col_init;  // [nr], or null
  Fetch fetch;
};

// K beyond kMaxChunkK: exact s32 sums by chunk, added up in s64, left in the tile as f32.
template <class Isa>
void long_k_tile(const Block& block, const Pass<typename Isa::X>& pass, const Panel& panel, int64_t r, int rows) {
  constexpr int nr = Isa::kLayout.nr;
  auto* sum32 = reinterpret_cast<int32_t*>(pass.tile);
  auto* sum64 = reinterpret_cast<int64_t*>(pass.tile + kMaxRows * nr * 4);
  const int width = panel.vectors * Vec::kLanes;
  for (int i = 0; i < rows; ++i) {
    for (int n = 0; n < width; ++n) {
      sum64[i * nr + n] = -int64_t(block.zero_point) * block.weight.column_sum[panel.first + n];
    }
  }
  for (int64_t c = 0; c < pass.chunks; ++c) {
    const int64_t begin = c * kMaxChunkK, end = at_most(begin + kMaxChunkK, round_up(block.args->k, Isa::kLayout.ku));
    int_tile_for<Isa>(rows, panel.vectors)(panel.w + begin * width, pass.rows + r * pass.stride + begin, pass.stride,
                                           (end - begin) / Isa::kLayout.ku, pass.row_init + c * pass.max_rows + r,
                                           nullptr, {panel.w, 0}, sum32);
    for (int i = 0; i < rows; ++i) {
      for (int n = 0; n < width; ++n) sum64[i * nr + n] += sum32[i * nr + n];
    }
  }
  auto* as_float = reinterpret_cast<float*>(pass.tile);
  for (int i = 0; i < rows; ++i) {
    for (int n = 0; n < width; ++n) as_float[i * nr + n] = float(sum64[i * nr + n]);
  }
}

// weight_only: f32 sums by chunks of K, so that rounding errors grow with the chunk and not with K.
template <class Isa>
void weight_only_tile(const Block& block, const Pass<float>& pass, const Panel& panel, int64_t r, int rows) {
  constexpr int64_t kChunk = 2048;
  constexpr int nr = Isa::kLayout.nr, KU = Isa::kLayout.ku;
  auto* acc = reinterpret_cast<float*>(pass.tile);
  std::memset(acc, 0, size_t(rows * nr) * sizeof(float));
  const int64_t k = round_up(block.args->k, KU);
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t end = at_most(begin + kChunk, k);
    float_tile_for<Isa>(rows, panel.vectors)(panel.w + begin * panel.vectors * Vec::kLanes,
                                             pass.rows + r * pass.stride + begin, pass.stride, (end - begin) / KU, acc);
  }
}

template <class Isa, class Element>
void run_tile(const Block& block, const Pass<Element>& pass, const Panel& panel, int64_t r, int rows) {
  if constexpr (sizeof(Element) == sizeof(float)) {
    weight_only_tile<Isa>(block, pass, panel, r, rows);
  } else if (pass.chunks > 1) {
    long_k_tile<Isa>(block, pass, panel, r, rows);
  } else {
    constexpr int KU = Isa::kLayout.ku;
    int_tile_for<Isa>(rows, panel.vectors)(panel.w, pass.rows + r * pass.stride, pass.stride,
                                           (block.args->k + KU - 1) / KU, pass.row_init + r, panel.col_init,
                                           panel.fetch, reinterpret_cast<int32_t*>(pass.tile));
  }
}

// Fetches the lines of y that a tile is about to write while its sums are computed: without it the stores wait for
// them, up to a sixth of the time at K = 384.
inline void prefetch_output(const char* y, int64_t ldy_bytes, int rows, int64_t row_bytes) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < row_bytes; i += kAlignment) __builtin_prefetch(y + r * ldy_bytes + i, 1);
  }
}

// Tile t's share of the next panel: an equal part for each of the first four tiles, spread over its steps.
template <class Isa>
Fetch fetch_next_panel(const Panel& panel, int64_t panel_bytes, int64_t t, int64_t tiles) {
  constexpr int64_t kStep = Isa::kBytes * Isa::kVectors;  // bytes of its own panel that a step of a tile reads
  const int64_t shares = at_most(tiles, 4);
  if (shares < 2 || t >= shares) return {panel.w, 0};
  return {panel.w + panel_bytes + t * panel_bytes / shares, kStep / shares};
}

// Multiplies the prepared rows with every panel of the block.
template <class Isa, class Element>
void multiply(const Block& block, Range rows, const Pass<Element>& pass) {
  const Args& a = *block.args;
  constexpr int nr = Isa::kLayout.nr;
  const FinishTile finish = finisher<Isa>(a.activation, a.dtype);
  const int64_t count = rows.end - rows.begin, tiles = (count + kMaxRows - 1) / kMaxRows;
  const int64_t padded_k = round_up(a.k, Isa::kLayout.ku), padded_n = round_up(a.n, Vec::kLanes);
  const int size = dtype_size(a.dtype);
  const bool streams = panel_count(Isa::kLayout, a.n) * nr * padded_k >= kStreamBytes;
  alignas(64) int32_t col_init[nr];

  for (int64_t p = block.panels.begin; p < block.panels.end; ++p) {
    const int64_t first = p * nr, width = at_most(nr, padded_n - first);
    Panel panel{block.weight.panels + first * padded_k,
                first,
                int(at_most(nr, a.n - first)),
                int(width / Vec::kLanes),
                nullptr,
                {nullptr, 0}};
    if (block.zero_point != 0 && pass.chunks == 1) {
      for (int n = 0; n < width; ++n) col_init[n] = -block.zero_point * block.weight.column_sum[first + n];
      panel.col_init = col_init;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const Range part = split(count, tiles, t);  // 16 rows are 6 + 5 + 5: no tile is left with a row or two
      const int tile_rows = int(part.end - part.begin);
      panel.fetch = fetch_next_panel<Isa>(panel, width * padded_k, t, tiles);
      if (!streams || p + 1 == block.panels.end) panel.fetch = {panel.w, 0};
      char* y = static_cast<char*>(a.y) + ((rows.begin + part.begin) * a.ldy + first) * size;
      prefetch_output(y, a.ldy * size, tile_rows, panel.columns * size);
      run_tile<Isa>(block, pass, panel, part.begin, tile_rows);
      finish({pass.tile, pass.scale + part.begin, block.scale + first, block.bias + first, y, a.ldy * size, tile_rows,
              panel.columns, sizeof(Element) == sizeof(float) || pass.chunks > 1});
    }
  }
}

template <class Isa>
void run_block(const Block& block) {
  const Args& a = *block.args;
  if (a.mode == Mode::weight_only) {
    Pass<float> pass(block.scratch, a.k);
    for (int64_t i = 0; i < pass.count(block.rows); ++i) {
      const Range rows = pass.part(block.rows, i);
      switch (a.dtype) {
        case Dtype::f32: widen_rows<Dtype::f32>(a, rows, pass); break;
        case Dtype::bf16: widen_rows<Dtype::bf16>(a, rows, pass); break;
        case Dtype::f16: widen_rows<Dtype::f16>(a, rows, pass); break;
      }
      multiply<Isa>(block, rows, pass);
    }
    return;
  }
  Pass<typename Isa::X> pass(block.scratch, a.k);
  for (int64_t i = 0; i < pass.count(block.rows); ++i) {
    const Range rows = pass.part(block.rows, i);
    switch (a.dtype) {
      case Dtype::f32: quantize_rows<Isa, Dtype::f32>(block, rows, pass); break;
      case Dtype::bf16: quantize_rows<Isa, Dtype::bf16>(block, rows, pass); break;
      case Dtype::f16: quantize_rows<Isa, Dtype::f16>(block, rows, pass); break;
    }
    multiply<Isa>(block, rows, pass);
  }
}

template <class Isa>
int64_t block_scratch_bytes(Mode mode, int64_t k) {
  return mode == Mode::weight_only ? Pass<float>::bytes(k, Isa::kLayout.nr)
                                   : Pass<typename Isa::X>::bytes(k, Isa::kLayout.nr);
}

}  // namespace
}  // namespace pycompress::int8_matmul
