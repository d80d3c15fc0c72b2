// One image of x into its buffer: quantised, channels adjacent, padding around it. See conv_engine.h.
#pragma once

#include "int8_conv2d/int8_conv2d.h"
#include "int8_matmul/prepare_rows.h"
#include "int8_matmul/tiles.h"

namespace pycompress::int8_conv2d {
namespace {

using int8_matmul::at_most;
using int8_matmul::largest_magnitude;

inline float largest(const char* x, int64_t count, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return largest_magnitude<Dtype::f32>(x, count);
    case Dtype::bf16: return largest_magnitude<Dtype::bf16>(x, count);
    default: return largest_magnitude<Dtype::f16>(x, count);
  }
}

struct Steps {  // Grid in registers
  Vec::F inverse, low, high;
  Vec::I zero;
};

// dynamic needs no clamp: |x| * (1 / scale) is at most 127 * (1 + 2^-22)
template <bool CLAMP>
PYCOMPRESS_INLINE Vec::I to_steps(Vec::F v, const Steps& s) {
  v = Vec::mul(v, s.inverse);
  if constexpr (CLAMP) v = Vec::min(s.high, Vec::max(s.low, v));
  return Vec::iadd(Vec::to_int(v), s.zero);
}

// `count` values that stand for the real 0: a byte that repeats, both for u8 and for s16, where it is 0.
template <class X>
X* fill_zero(X* to, int64_t count, int32_t zero) {
  if (count > 0) std::memset(to, zero, size_t(count) * sizeof(X));
  return to + (count > 0 ? count : 0);
}

// What the rows of the buffer take from those of x.
struct Columns {
  int64_t left, inside, right;  // padding, columns of x, padding
};

inline Columns buffer_columns(const Args& a, const Geometry& g) {
  // The first of the buffer's columns at or behind column 0 of x, and the first at or behind column w.
  const int64_t left = at_most((a.pad_left + g.column_step - 1) / g.column_step, g.columns);
  const int64_t end = at_most((a.w + a.pad_left + g.column_step - 1) / g.column_step, g.columns);
  return {left, end - left, g.columns - end};
}

// ---- channels adjacent in x ------------------------------------------------------------------------------------

template <class Isa, Dtype D, bool CLAMP>
PYCOMPRESS_INLINE void quantize_run(const char* x, int64_t count, const Steps& s, typename Isa::X* q) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, kVec = Vec::kLanes * kSize, kStep = 4 * Vec::kLanes;
  const auto four = [&](const char* p, typename Isa::X* to) __attribute__((always_inline)) {
    Isa::store_steps(to, to_steps<CLAMP>(Vec::load_as<D>(p), s), to_steps<CLAMP>(Vec::load_as<D>(p + kVec), s),
                     to_steps<CLAMP>(Vec::load_as<D>(p + 2 * kVec), s),
                     to_steps<CLAMP>(Vec::load_as<D>(p + 3 * kVec), s));
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) four(x + i * kSize, q + i);
  if (i < count) {
    alignas(64) char tail[4 * kVec] = {};
    typename Isa::X stored[kStep];
    std::memcpy(tail, x + i * kSize, size_t((count - i) * kSize));
    four(tail, stored);
    std::memcpy(q + i, stored, size_t(count - i) * sizeof(typename Isa::X));
  }
}

// `pixels` pixels of `per_group` values each, adjacent, to places `padded` values apart, zeros between. BYTES: of a place.
template <class X, int BYTES>
void spread(const X* from, int64_t pixels, int64_t per_group, X* to) {
  const uint64_t mask = ~uint64_t(0) >> (64 - 8 * per_group * int64_t(sizeof(X)));
  for (int64_t i = 0; i < pixels; ++i) {
    uint64_t values;
    std::memcpy(&values, from + i * per_group, sizeof values);
    values &= mask;
    std::memcpy(to + i * (BYTES / int64_t(sizeof(X))), &values, BYTES);
  }
}

// A row of pixels with so few channels (the first layer's three) that each would be a tail: quantised as one run, then
// spread out.
template <class Isa, Dtype D, bool CLAMP>
void quantize_few_channels(const char* x, int64_t pixels, int64_t channels, int64_t padded, const Steps& s,
                           typename Isa::X* to) {
  using X = typename Isa::X;
  constexpr int64_t kHeld = 512;
  X held[kHeld + 8];
  const int64_t most = kHeld / channels;
  for (int64_t i = 0; i < pixels; i += most) {
    const int64_t count = at_most(most, pixels - i);
    quantize_run<Isa, D, CLAMP>(x + i * channels * (D == Dtype::f32 ? 4 : 2), count * channels, s, held);
    if (padded * int64_t(sizeof(X)) == 4) {
      spread<X, 4>(held, count, channels, to + i * padded);
    } else {
      spread<X, 8>(held, count, channels, to + i * padded);
    }
  }
}

template <class Isa, Dtype D, bool CLAMP>
void quantize_pixels(const Quantize& q, const Steps& s) {
  using X = typename Isa::X;
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2;
  const Args& a = *q.args;
  const Geometry& g = *q.geometry;
  const Columns columns = buffer_columns(a, g);
  const int64_t per_group = a.c / q.groups, step = g.column_step * a.x_stride_w;
  const bool whole = g.padded == per_group;  // the groups of a pixel are adjacent in the buffer too
  const int64_t place = g.padded * int64_t(sizeof(X));
  const bool few = q.groups == 1 && step == a.c && (place == 4 || place == 8);
  auto* out = static_cast<X*>(q.buffer) + q.rows.begin * g.columns * g.pixel;
  for (int64_t r = q.rows.begin; r < q.rows.end; ++r) {
    const int64_t i = r * g.row_step - a.pad_top;
    if (i < 0 || i >= a.h || columns.inside <= 0) {
      out = fill_zero(out, g.columns * g.pixel, q.grid.zero);
      continue;
    }
    out = fill_zero(out, columns.left * g.pixel, q.grid.zero);
    const int64_t first = columns.left * g.column_step - a.pad_left;
    const char* x = q.image + (i * a.x_stride_h + first * a.x_stride_w) * kSize;
    if (whole && step == a.c) {
      quantize_run<Isa, D, CLAMP>(x, columns.inside * a.c, s, out);
    } else if (few) {
      quantize_few_channels<Isa, D, CLAMP>(x, columns.inside, a.c, g.padded, s, out);
    } else {
      for (int64_t j = 0; j < columns.inside; ++j) {
        for (int64_t k = 0; k < (whole ? 1 : q.groups); ++k) {
          const int64_t count = whole ? a.c : per_group;
          X* to = out + j * g.pixel + k * g.padded;
          quantize_run<Isa, D, CLAMP>(x + (j * step + k * per_group) * kSize, count, s, to);
          if (!whole) fill_zero(to + per_group, g.padded - per_group, q.grid.zero);
        }
      }
    }
    out += columns.inside * g.pixel;
    out = fill_zero(out, columns.right * g.pixel, q.grid.zero);
  }
}

// ---- columns adjacent in x -------------------------------------------------------------------------------------

// `pixels` columns, at most a register, of `channels` channels that lie `stride` bytes apart: transposed, so that the
// groups of ku channels of a pixel become adjacent. q: the first pixel's place for them; `pixel` values to the next.
template <class Isa, Dtype D, bool CLAMP>
PYCOMPRESS_INLINE void quantize_patch(const char* x, int64_t stride, int64_t channels, int64_t pixels, const Steps& s,
                                      typename Isa::X* q, int64_t pixel) {
  constexpr int L = Vec::kLanes, KU = Isa::kLayout.ku;
  const int64_t groups = (channels + KU - 1) / KU;
  Vec::I words[L];
  const auto load = [&](int64_t c) __attribute__((always_inline)) {
    if (c >= channels) return s.zero;
    const char* p = x + c * stride;
    return to_steps<CLAMP>(pixels == L ? Vec::load_as<D>(p) : Vec::load_first<D>(p, int(pixels)), s);
  };
  for (int64_t j = 0; j < groups; ++j) {
    Vec::I part[KU];
    PYCOMPRESS_UNROLL
    for (int i = 0; i < KU; ++i) part[i] = load(j * KU + i);
    words[j] = Isa::interleave(part);
  }
  if (pixel == KU) {  // one group in all: the pixels are adjacent already
    if (pixels == L) return Vec::istore(q, words[0]);
    alignas(64) char stored[sizeof(Vec::I)];
    Vec::istore(stored, words[0]);
    std::memcpy(q, stored, size_t(pixels) * 4);
    return;
  }
  for (int64_t j = groups; j < L; ++j) words[j] = Vec::izero();
  Vec::transpose(words);
  if (groups == L) {
    for (int64_t i = 0; i < pixels; ++i) Vec::istore(q + i * pixel, words[i]);
    return;
  }
  for (int64_t i = 0; i < pixels; ++i) {
    alignas(64) char stored[sizeof(Vec::I)];
    Vec::istore(stored, words[i]);
    std::memcpy(q + i * pixel, stored, size_t(groups) * 4);
  }
}

template <class Isa, Dtype D, bool CLAMP>
void quantize_planes(const Quantize& q, const Steps& s) {
  using X = typename Isa::X;
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, L = Vec::kLanes, kChannels = L * Isa::kLayout.ku;
  const Args& a = *q.args;
  const Geometry& g = *q.geometry;
  Columns columns = buffer_columns(a, g);
  Range rows = q.rows;
  auto* out = static_cast<X*>(q.buffer) + rows.begin * g.columns * g.pixel;
  const int64_t per_group = a.c / q.groups, stride = a.x_stride_c * kSize;
  // Rows that follow each other, in x as in the buffer, are one long row: no short tails.
  const bool joined = columns.inside == g.columns && g.columns == a.w && a.x_stride_h == a.w && g.row_step == 1 &&
                      rows.begin >= a.pad_top && rows.end <= a.pad_top + a.h;
  if (joined) {
    columns.inside *= rows.end - rows.begin;
    rows.end = rows.begin + 1;
  }
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const int64_t i = r * g.row_step - a.pad_top;
    if (i < 0 || i >= a.h || columns.inside <= 0) {
      out = fill_zero(out, g.columns * g.pixel, q.grid.zero);
      continue;
    }
    out = fill_zero(out, columns.left * g.pixel, q.grid.zero);
    const char* row = q.image + i * a.x_stride_h * kSize;
    for (int64_t k = 0; k < q.groups; ++k) {
      for (int64_t c = 0; c < per_group; c += kChannels) {
        const char* x = row + (k * per_group + c) * stride;
        X* to = out + k * g.padded + c;
        const int64_t channels = at_most(per_group - c, kChannels);
        for (int64_t j = 0; j < columns.inside; j += L) {
          quantize_patch<Isa, D, CLAMP>(x + j * kSize, stride, channels, at_most(columns.inside - j, L), s,
                                        to + j * g.pixel, g.pixel);
        }
      }
    }
    out += columns.inside * g.pixel;
    out = fill_zero(out, columns.right * g.pixel, q.grid.zero);
  }
}

// ---- the choice ------------------------------------------------------------------------------------------------

template <class Isa, Dtype D>
void quantize_as(const Quantize& q) {
  const Steps s{Vec::set1(q.grid.inverse), Vec::set1(q.grid.low), Vec::set1(q.grid.high), Vec::iset1(q.grid.zero)};
  const bool clamp = q.args->mode == Mode::static_;
  if (q.geometry->by_pixel) {
    clamp ? quantize_pixels<Isa, D, true>(q, s) : quantize_pixels<Isa, D, false>(q, s);
  } else {
    clamp ? quantize_planes<Isa, D, true>(q, s) : quantize_planes<Isa, D, false>(q, s);
  }
}

template <class Isa>
void quantize(const Quantize& q) {
  switch (q.args->dtype) {
    case Dtype::f32: return quantize_as<Isa, Dtype::f32>(q);
    case Dtype::bf16: return quantize_as<Isa, Dtype::bf16>(q);
    default: return quantize_as<Isa, Dtype::f16>(q);
  }
}

}  // namespace
}  // namespace pycompress::int8_conv2d
