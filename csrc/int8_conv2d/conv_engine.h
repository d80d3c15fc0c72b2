// The vector kernels, written once over an instruction-set description `Isa` (int8_matmul/dot_<isa>.h):
//
//   quantise an image into its buffer                                   quantize_image.h
//   for each panel of `nr` channels of y, for each block of up to 64 outputs, for each tile of up to 6 of them:
//     accumulate the tile over the runs of its windows, in registers    window_tile, below
//     scale, add bias, activate                                         int8_matmul/finish_tile.h
//     into y where it is channels last, else into a small buffer, which is transposed into the planes of y
//
// Include after Vec. Everything is in an unnamed namespace (see vec_math.h); no std templates, for the same reason.
#pragma once

#include "int8_conv2d/quantize_image.h"
#include "int8_matmul/finish_tile.h"

namespace pycompress::int8_conv2d {
namespace {

using int8_matmul::kMaxRows;

// acc[MR, NV vectors] = init[n] + sum over the runs of row[r] . w[n]
template <class Isa, int MR, int NV>
void window_tile(const uint8_t* w, const typename Isa::X* const* row, const int64_t* run, int64_t runs,
                 int64_t run_groups, const int32_t* init, int32_t* acc) {
  constexpr int KU = Isa::kLayout.ku;
  typename Vec::I sum[MR][NV];
  const typename Isa::X* x[MR];
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    x[r] = row[r];
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) sum[r][j] = Vec::iload(init + j * Vec::kLanes);
  }
  for (int64_t i = 0; i < runs; ++i) {
    int64_t at = run[i];
    for (int64_t g = 0; g < run_groups; ++g) {
      typename Vec::I b[NV];
      PYCOMPRESS_UNROLL
      for (int j = 0; j < NV; ++j) b[j] = Isa::load_weight(w + j * Isa::kBytes);
      PYCOMPRESS_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename Vec::I q = Isa::broadcast(x[r] + at);
        PYCOMPRESS_UNROLL
        for (int j = 0; j < NV; ++j) sum[r][j] = Isa::dot(sum[r][j], b[j], q);
      }
      w += Isa::kBytes * NV;
      at += KU;
    }
  }
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) Vec::istore(acc + (r * Isa::kVectors + j) * Vec::kLanes, sum[r][j]);
  }
}

template <class Isa>
using WindowTile = void (*)(const uint8_t*, const typename Isa::X* const*, const int64_t*, int64_t, int64_t,
                            const int32_t*, int32_t*);

template <class Isa, int MR>
WindowTile<Isa> window_tile_of(int nv) {
  if constexpr (Isa::kVectors == 4) {
    if (nv == 4) return window_tile<Isa, MR, 4>;
    if (nv == 3) return window_tile<Isa, MR, 3>;
  }
  return nv == 2 ? window_tile<Isa, MR, 2> : window_tile<Isa, MR, 1>;
}

template <class Isa>
WindowTile<Isa> window_tile_for(int rows, int nv) {
  switch (rows) {
    case 1: return window_tile_of<Isa, 1>(nv);
    case 2: return window_tile_of<Isa, 2>(nv);
    case 3: return window_tile_of<Isa, 3>(nv);
    case 4: return window_tile_of<Isa, 4>(nv);
    case 5: return window_tile_of<Isa, 5>(nv);
    default: return window_tile_of<Isa, 6>(nv);
  }
}

struct Panel {
  const uint8_t* w;
  int64_t first;         // channel of y
  int columns, vectors;  // real channels, and registers that hold them
  int64_t offset;        // of the group's channels in a pixel of the buffer
  alignas(64) int32_t init[64];
};

// What a thread keeps of a block: finished outputs before they are transposed, and the sums of one tile.
template <class Isa>
struct Scratch {
  float outputs[kLargestBlock][Isa::kLayout.nr];
  int32_t tile[kMaxRows][Isa::kLayout.nr];
};

template <class Isa>
Panel open_panel(const Multiply& m, int64_t p) {
  const PackedConv& packed = *m.weight;
  const WeightShape& s = packed.shape;
  constexpr int nr = Isa::kLayout.nr;
  const int64_t per_group = s.out / s.groups, panels = (per_group + nr - 1) / nr, group = p / panels;
  const PackedWeight weight = group_weight(packed, group);
  const int64_t first = p % panels * nr, padded = int8_matmul::round_up(per_group, Vec::kLanes);
  const int64_t width = at_most(nr, padded - first);
  Panel panel;
  panel.w = weight.panels + first * weight.k;
  panel.first = group * per_group + first;
  panel.columns = int(at_most(nr, per_group - first));
  panel.vectors = int(width / Vec::kLanes);
  panel.offset = group * packed.padded;
  // The stored activations are `zero` too large.
  for (int64_t n = 0; n < width; ++n) panel.init[n] = -m.zero * weight.column_sum[first + n];
  return panel;
}

// One register of outputs of one register of channels, from rows of outputs to planes of channels `plane` bytes apart.
template <class Isa, Dtype D>
PYCOMPRESS_INLINE void store_square(const float (&outputs)[kLargestBlock][Isa::kLayout.nr], int64_t p, int n, char* y,
                                    int64_t plane) {
  constexpr int L = Vec::kLanes;
  Vec::I r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) r[i] = Vec::iload(&outputs[p + i][n]);
  Vec::transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    Vec::store_as<D>(y, Vec::as_float(r[i]));
    y += plane;
  }
}

template <class Isa, Dtype D>
void store_planes(const Scratch<Isa>& scratch, int64_t outputs, int columns, char* y, int64_t plane) {
  constexpr int L = Vec::kLanes;
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2;
  plane *= kSize;
  for (int n = 0; n < columns; n += L, y += L * plane) {
    for (int64_t p = 0; p < outputs; p += L) {
      if (columns - n >= L && outputs - p >= L) {
        store_square<Isa, D>(scratch.outputs, p, n, y + p * kSize, plane);
        continue;
      }
      alignas(64) Vec::I r[L];  // at the edges the same, without the assumptions
      for (int i = 0; i < L; ++i) r[i] = Vec::iload(&scratch.outputs[p + i][n]);
      Vec::transpose(r);
      const int channels = int(at_most(L, columns - n)), count = int(at_most(L, outputs - p));
      for (int i = 0; i < channels; ++i) {
        Vec::store_as<D>(y + i * plane + p * kSize, Vec::as_float(r[i]), count);
      }
    }
  }
}

// Fetches the lines of y that a block is about to write while its sums are computed, a share with each tile: `count`
// pieces of `bytes`, `stride` bytes apart.
inline void prefetch_output(const char* y, int64_t stride, Range pieces, int64_t bytes) {
  for (int64_t i = pieces.begin; i < pieces.end; ++i) {
    for (int64_t b = 0; b < bytes; b += kAlignment) __builtin_prefetch(y + i * stride + b, 1);
  }
}

// Outputs [first, first + outputs) of one image and the channels of one panel.
template <class Isa>
void run_block(const Multiply& m, const Panel& panel, int64_t image, int64_t first, int64_t outputs,
               int8_matmul::FinishTile finish) {
  const Args& a = *m.args;
  const Geometry& g = *m.geometry;
  constexpr int nr = Isa::kLayout.nr;
  auto& scratch = *reinterpret_cast<Scratch<Isa>*>(m.scratch);
  const auto* x = static_cast<const typename Isa::X*>(m.buffer) + image * g.image + panel.offset;
  const int64_t size = dtype_size(a.dtype), pixels = a.out_h * a.out_w, out = m.weight->shape.out;
  char* y = static_cast<char*>(a.y);
  y += a.channels_last ? (((m.first + image) * pixels + first) * out + panel.first) * size
                       : (((m.first + image) * out + panel.first) * pixels + first) * size;
  char* to = a.channels_last ? y : reinterpret_cast<char*>(scratch.outputs);
  const int64_t ld_bytes = a.channels_last ? out * size : nr * 4;
  const int columns = a.channels_last ? panel.columns : panel.vectors * Vec::kLanes;

  float scale[kMaxRows];
  for (float& value : scale) value = m.x_scale[image];
  int64_t i = first / a.out_w, j = first % a.out_w;
  const int64_t tiles = (outputs + kMaxRows - 1) / kMaxRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const Range part = split(outputs, tiles, t);  // 16 are 6 + 5 + 5: no tile is left with one or two
    const int rows = int(part.end - part.begin);
    const typename Isa::X* row[kMaxRows];
    for (int r = 0; r < rows; ++r) {
      row[r] = x + i * g.window_row + j * g.window_col;
      if (++j == a.out_w) {
        j = 0;
        ++i;
      }
    }
    if (a.channels_last) {
      prefetch_output(y, ld_bytes, part, columns * size);
    } else {
      prefetch_output(y, pixels * size, split(panel.columns, tiles, t), outputs * size);
    }
    window_tile_for<Isa>(rows, panel.vectors)(panel.w, row, g.run, g.runs, g.run_groups, panel.init, scratch.tile[0]);
    finish({scratch.tile, scale, m.scale + panel.first, m.bias + panel.first, to + part.begin * ld_bytes, ld_bytes,
            rows, columns, false});
  }
  if (a.channels_last) return;
  switch (a.dtype) {
    case Dtype::f32: return store_planes<Isa, Dtype::f32>(scratch, outputs, panel.columns, y, pixels);
    case Dtype::bf16: return store_planes<Isa, Dtype::bf16>(scratch, outputs, panel.columns, y, pixels);
    default: return store_planes<Isa, Dtype::f16>(scratch, outputs, panel.columns, y, pixels);
  }
}

template <class Isa>
void multiply(const Multiply& m) {
  const Args& a = *m.args;
  const int64_t pixels = a.out_h * a.out_w, blocks = block_count(pixels);
  const int8_matmul::FinishTile finish =
      int8_matmul::finisher<Isa>(a.activation, a.channels_last ? a.dtype : Dtype::f32);
  for (int64_t p = m.panels.begin; p < m.panels.end; ++p) {
    const Panel panel = open_panel<Isa>(m, p);
    for (int64_t b = m.blocks.begin; b < m.blocks.end; ++b) {
      const int64_t image = b / blocks, first = b % blocks * kBlock;
      const int64_t outputs = b % blocks == blocks - 1 ? pixels - first : kBlock;
      run_block<Isa>(m, panel, image, first, outputs, finish);
    }
  }
}

}  // namespace
}  // namespace pycompress::int8_conv2d
