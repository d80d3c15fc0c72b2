// The vector kernels, written once over an instruction-set description `Isa` (see kernel_avx512vnni.cpp):
//
//   for each pass of a few rows, small enough to stay in L2:
//     quantise the rows (weight_only: convert them to f32) into scratch
//     for each panel of `nr` outputs, for each tile of up to 6 rows:
//       accumulate the tile over K in registers, leave it in a small buffer, finish it: scale, bias, activate, store
//
// Include after Vec. Everything is in an unnamed namespace (see vec_math.h); no std templates, for the same reason.
#pragma once

#include "common/memory.h"
#include "common/vec_math.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

constexpr int kMaxRows = 6;                     // of a tile
constexpr int64_t kPassBytes = 192 * 1024;      // of quantised rows held at a time
constexpr int64_t kPad = 64;                    // rows in scratch are padded to this many elements
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
  static int64_t bytes(int64_t k, int nr) {
    const int64_t rows = row_count(k), chunks = chunk_count(k);
    return rows * row_stride(k) * int64_t(sizeof(Element)) + round_up(rows * 4, kAlignment) +
           round_up(chunks * rows * 4, kAlignment) + round_up(k * 4, kAlignment) + kMaxRows * nr * 12 + kAlignment;
  }

  Pass(char* scratch, int64_t k) : max_rows(row_count(k)), stride(row_stride(k)), chunks(chunk_count(k)) {
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

// ---- preparing rows --------------------------------------------------------------------------------------------

// Row m of x with its columns adjacent: the caller's memory where it already is so, else gathered.
inline const char* row_of(const Args& a, int64_t m, char* gathered) {
  const int64_t size = dtype_size(a.dtype);
  const char* row = static_cast<const char*>(a.x) +
                    (m / a.inner_rows * a.outer_stride + m % a.inner_rows * a.row_stride) * size;
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
float largest_magnitude(const char* row, int64_t k) {
  constexpr int64_t kBytes = sizeof(typename Vec::I);
  const int64_t total = k * (D == Dtype::f32 ? 4 : 2);
  Vec::I m0 = Vec::izero(), m1 = Vec::izero(), m2 = Vec::izero(), m3 = Vec::izero();
  int64_t i = 0;
  for (; i + 4 * kBytes <= total; i += 4 * kBytes) {
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

template <class Isa, Dtype D, bool STATIC>
void quantize_elements(const char* row, int64_t k, const Steps& s, typename Isa::X* q) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, kVec = Vec::kLanes * kSize, kStep = 4 * Vec::kLanes;
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    const char* p = row + i * kSize;
    Isa::store_steps(q + i, to_steps<D, STATIC>(p, s), to_steps<D, STATIC>(p + kVec, s),
                     to_steps<D, STATIC>(p + 2 * kVec, s), to_steps<D, STATIC>(p + 3 * kVec, s));
  }
  if (i < k) {
    alignas(64) char tail[4 * kVec] = {};
    std::memcpy(tail, row + i * kSize, size_t((k - i) * kSize));
    Isa::store_steps(q + i, to_steps<D, STATIC>(tail, s), to_steps<D, STATIC>(tail + kVec, s),
                     to_steps<D, STATIC>(tail + 2 * kVec, s), to_steps<D, STATIC>(tail + 3 * kVec, s));
  }
  std::memset(q + k, 0, size_t(round_up(k, kPad) - k) * sizeof(typename Isa::X));
}

// Quantises one row into q and returns its scale, NaN where the row holds NaN or Inf.
template <class Isa, Dtype D>
float quantize_row(const Block& block, const char* row, typename Isa::X* q) {
  const int64_t k = block.args->k;
  const float largest = largest_magnitude<D>(row, k);
  if (!(largest <= 3.4028234664e38f)) {
    std::memset(q, 0, size_t(round_up(k, kPad)) * sizeof(typename Isa::X));
    return __builtin_nanf("");
  }
  if (block.args->mode == Mode::static_) {
    const Steps s{Vec::set1(1.0f / block.input_scale), Vec::set1(float(-128 - block.zero_point)),
                  Vec::set1(float(127 - block.zero_point)), Vec::iset1(block.zero_point)};
    quantize_elements<Isa, D, true>(row, k, s, q);
    return block.input_scale;
  }
  const float scale = largest / 127.0f > kSmallestScale ? largest / 127.0f : kSmallestScale;
  quantize_elements<Isa, D, false>(row, k, {Vec::set1(1.0f / scale), Vec::zero(), Vec::zero(), Vec::izero()}, q);
  return scale;
}

template <class Isa, Dtype D>
void quantize_rows(const Block& block, Range rows, Pass<typename Isa::X>& pass) {
  const Args& a = *block.args;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t r = m - rows.begin;
    auto* q = pass.rows + r * pass.stride;
    pass.scale[r] = quantize_row<Isa, D>(block, row_of(a, m, pass.gathered), q);
    for (int64_t c = 0; c < pass.chunks; ++c) {
      const int64_t begin = c * kMaxChunkK, end = at_most(begin + kMaxChunkK, round_up(a.k, kPad));
      pass.row_init[c * pass.max_rows + r] = Isa::kLayout.offset == 0 ? 0 : -Isa::kLayout.offset * Isa::sum(q + begin, end - begin);
    }
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

// ---- tiles -----------------------------------------------------------------------------------------------------

// acc[MR, NV vectors] = row_init[r] + col_init[n] + sum over `groups` of ku values of x[r] . w[n]
// Several accumulator sets hide the latency of the dot product where the tile has too few accumulators to do so.
template <class Isa, int MR, int NV>
void int_tile(const uint8_t* w, const typename Isa::X* x, int64_t ldx, int64_t groups, const int32_t* row_init,
              const int32_t* col_init, int32_t* acc) {
  constexpr int kStep = Isa::kBytes * NV, KU = Isa::kLayout.ku;
  constexpr int kSets = MR * NV >= 8 ? 1 : (MR * NV >= 4 ? 2 : 4);
  typename Vec::I sum[kSets][MR][NV];
  for (int s = 0; s < kSets; ++s) {
    for (int r = 0; r < MR; ++r) {
      for (int j = 0; j < NV; ++j) {
        sum[s][r][j] = s > 0 ? Vec::izero() : Vec::iset1(row_init[r]);
        if (s == 0 && col_init != nullptr) sum[s][r][j] = Vec::iadd(sum[s][r][j], Vec::iload(col_init + j * Vec::kLanes));
      }
    }
  }
  auto step = [&](int s) __attribute__((always_inline)) {
    typename Vec::I b[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) b[j] = Isa::load_weight(w + j * Isa::kBytes);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const typename Vec::I q = Isa::broadcast(x + r * ldx);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[s][r][j] = Isa::dot(sum[s][r][j], b[j], q);
    }
    w += kStep;
    x += KU;
  };
  int64_t g = 0;
  for (; g + kSets <= groups; g += kSets) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) step(s);
  }
  if constexpr (kSets > 1) {
    for (; g < groups; ++g) step(0);
  }
  for (int r = 0; r < MR; ++r) {
    for (int j = 0; j < NV; ++j) {
      for (int s = 1; s < kSets; ++s) sum[0][r][j] = Vec::iadd(sum[0][r][j], sum[s][r][j]);
      Vec::istore(acc + (r * Isa::kVectors + j) * Vec::kLanes, sum[0][r][j]);
    }
  }
}

// The same in f32 for weight_only, added to acc: every weight is widened once for all rows of the tile.
template <class Isa, int MR, int NV>
void float_tile(const uint8_t* w, const float* x, int64_t ldx, int64_t groups, float* acc) {
  constexpr int KU = Isa::kLayout.ku;
  typename Vec::F sum[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int j = 0; j < NV; ++j) sum[r][j] = Vec::zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    typename Vec::I raw[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) raw[j] = Isa::load_weight(w + j * Isa::kBytes);
#pragma GCC unroll 4
    for (int i = 0; i < KU; ++i) {
      typename Vec::F b[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) b[j] = Vec::to_float(Isa::weight_at(raw[j], i));
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const typename Vec::F v = Vec::set1(x[r * ldx + i]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[r][j] = Vec::fma(v, b[j], sum[r][j]);
      }
    }
    w += Isa::kBytes * NV;
    x += KU;
  }
  for (int r = 0; r < MR; ++r) {
    for (int j = 0; j < NV; ++j) {
      float* p = acc + (r * Isa::kVectors + j) * Vec::kLanes;
      Vec::store(p, Vec::add(Vec::load(p), sum[r][j]));
    }
  }
}

// ---- finishing a tile ------------------------------------------------------------------------------------------

template <Activation A>
Vec::F activate(Vec::F v) {
  if constexpr (A == Activation::relu) return vrelu(v);
  if constexpr (A == Activation::gelu) return vgelu(v);
  if constexpr (A == Activation::gelu_tanh) return vgelu_tanh(v);
  if constexpr (A == Activation::silu) return vsilu(v);
  return v;
}

struct Finish {
  const void* tile;      // [rows, nr] accumulators: s32, or f32 where `is_float`
  const float* x_scale;  // [rows]
  const float* w_scale;  // [columns, padded to lanes]
  const float* bias;
  char* y;
  int64_t ldy_bytes;
  int rows, columns;
  bool is_float;
};

// w_scale before x_scale: x_scale may be as large as FLT_MAX / 127, and the product with it must come last.
template <class Isa, Activation A, Dtype D>
void finish_tile(const Finish& f) {
  constexpr int L = Vec::kLanes, kSize = D == Dtype::f32 ? 4 : 2;
  for (int r = 0; r < f.rows; ++r) {
    const Vec::F x_scale = Vec::set1(f.x_scale[r]);
    const char* tile = static_cast<const char*>(f.tile) + r * Isa::kLayout.nr * 4;
    char* y = f.y + r * f.ldy_bytes;
    for (int n = 0; n < f.columns; n += L) {
      const char* p = tile + n * 4;
      const Vec::F sum = f.is_float ? Vec::load(reinterpret_cast<const float*>(p)) : Vec::to_float(Vec::iload(p));
      const Vec::F scaled = Vec::mul(sum, Vec::load(f.w_scale + n));
      const Vec::F v = activate<A>(Vec::fma(scaled, x_scale, Vec::load(f.bias + n)));
      if (n + L <= f.columns) {
        Vec::store_as<D>(y + n * kSize, v);
      } else {
        Vec::store_as<D>(y + n * kSize, v, f.columns - n);
      }
    }
  }
}

using FinishTile = void (*)(const Finish&);

template <class Isa, Activation A>
FinishTile finisher(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return finish_tile<Isa, A, Dtype::f32>;
    case Dtype::bf16: return finish_tile<Isa, A, Dtype::bf16>;
    default: return finish_tile<Isa, A, Dtype::f16>;
  }
}

template <class Isa>
FinishTile finisher(Activation activation, Dtype dtype) {
  switch (activation) {
    case Activation::relu: return finisher<Isa, Activation::relu>(dtype);
    case Activation::gelu: return finisher<Isa, Activation::gelu>(dtype);
    case Activation::gelu_tanh: return finisher<Isa, Activation::gelu_tanh>(dtype);
    case Activation::silu: return finisher<Isa, Activation::silu>(dtype);
    default: return finisher<Isa, Activation::none>(dtype);
  }
}

// ---- running a block -------------------------------------------------------------------------------------------

// Tables of the tile functions by [rows - 1][vectors - 1].
template <class Isa>
using IntTile = void (*)(const uint8_t*, const typename Isa::X*, int64_t, int64_t, const int32_t*, const int32_t*,
                         int32_t*);
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
  int64_t first;           // output
  int columns, vectors;    // real outputs, and registers that hold them
  const int32_t* col_init;  // [nr], or null
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
                                           nullptr, sum32);
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
                                           reinterpret_cast<int32_t*>(pass.tile));
  }
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
  alignas(64) int32_t col_init[nr];

  for (int64_t p = block.panels.begin; p < block.panels.end; ++p) {
    const int64_t first = p * nr, width = at_most(nr, padded_n - first);
    Panel panel{block.weight.panels + first * padded_k, first, int(at_most(nr, a.n - first)),
                int(width / Vec::kLanes), nullptr};
    if (block.zero_point != 0 && pass.chunks == 1) {
      for (int n = 0; n < width; ++n) col_init[n] = -block.zero_point * block.weight.column_sum[first + n];
      panel.col_init = col_init;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const Range part = split(count, tiles, t);  // 16 rows are 6 + 5 + 5: no tile is left with a row or two
      const int tile_rows = int(part.end - part.begin);
      run_tile<Isa>(block, pass, panel, part.begin, tile_rows);
      finish({pass.tile, pass.scale + part.begin, block.scale + first, block.bias + first,
              static_cast<char*>(a.y) + ((rows.begin + part.begin) * a.ldy + first) * size, a.ldy * size, tile_rows,
              panel.columns, sizeof(Element) == sizeof(float) || pass.chunks > 1});
    }
  }
}

template <class Isa>
void run_block(const Block& block) {
  const Args& a = *block.args;
  if (a.mode == Mode::weight_only) {
    Pass<float> pass(block.scratch, a.k);
    for (int64_t m = block.rows.begin; m < block.rows.end; m += pass.max_rows) {
      const Range rows{m, at_most(m + pass.max_rows, block.rows.end)};
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
  for (int64_t m = block.rows.begin; m < block.rows.end; m += pass.max_rows) {
    const Range rows{m, at_most(m + pass.max_rows, block.rows.end)};
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
