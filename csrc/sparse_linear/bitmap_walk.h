// The inner loop of the bitmap kernels: rows of the weight times tokens, sums in registers. See bitmap_engine.h.
#pragma once

#include "int8_matmul/prepare_rows.h"
#include "sparse_linear/bitmap.h"

namespace pycompress::sparse_linear {
namespace {

constexpr int64_t kBitmapBlock = 64;          // outputs whose sums meet in a tile
constexpr int64_t kBitmapWord = 64;           // columns between two looks at anything but weights; x is padded to it
constexpr int64_t kBitmapValuesAhead = 2048;  // bytes fetched ahead of the values in use
constexpr int64_t kBitmapBitsAhead = 512;
constexpr int64_t kBitmapOverread = 64;  // values that expand() may read behind those it needs

#define PYCOMPRESS_UNROLL_8 _Pragma("GCC unroll 8")

// What every row is multiplied with.
template <class Form>
struct Walk {
  const uint8_t* bits;
  const typename Form::Value* values;
  const typename Form::Value* values_end;
  const int64_t* row_start;
  int64_t row_bytes;          // of bits
  const typename Form::X* x;  // [K / kColumns][tokens][kColumns], zeros behind K
};

// Puts the weights of every stream into a register of its own: vexpandps waits for the last use of its destination (5
// cycles on Zen 5), and GCC would give it the same one again and again.
template <class Weights, int STREAMS>
PYCOMPRESS_INLINE void hold_apart(Weights (&a)[STREAMS]) {
  if constexpr (STREAMS == 2) asm("" : "+v"(a[0].w), "+v"(a[1].w));
  if constexpr (STREAMS == 3) asm("" : "+v"(a[0].w), "+v"(a[1].w), "+v"(a[2].w));
  if constexpr (STREAMS == 4) asm("" : "+v"(a[0].w), "+v"(a[1].w), "+v"(a[2].w), "+v"(a[3].w));
}

// 64 columns of each stream, TOKENS of the `held` tokens that lie interleaved in x. `stride`: bytes from one stream's
// bits to the next one's.
template <class Form, int STREAMS, int TOKENS>
PYCOMPRESS_INLINE void multiply_columns(const uint8_t* bits, int64_t stride,
                                        const typename Form::Value* (&values)[STREAMS], const typename Form::X* x,
                                        int64_t held, typename Form::Sum (&sum)[STREAMS][TOKENS]) {
  constexpr int C = Form::kColumns;
  PYCOMPRESS_UNROLL_8
  for (int c = 0; c < kBitmapWord; c += C) {
    typename Form::Weights w[STREAMS];
    PYCOMPRESS_UNROLL_8
    for (int s = 0; s < STREAMS; ++s) {
      const uint8_t* mask = bits + s * stride + c / 8;
      w[s] = Form::expand(mask, values[s]);
      uint64_t word = 0;
      std::memcpy(&word, mask, C / 8);
      values[s] += __builtin_popcountll(word);
    }
    hold_apart(w);
    PYCOMPRESS_UNROLL_8
    for (int p = 0; p < Form::kParts; ++p) {
      typename Form::Weights part[STREAMS];
      PYCOMPRESS_UNROLL_8
      for (int s = 0; s < STREAMS; ++s) part[s] = Form::part(w[s], p);
      PYCOMPRESS_UNROLL_8
      for (int t = 0; t < TOKENS; ++t) {
        typename Form::Sum columns = Form::load(x + c * held + t * C + p * C / Form::kParts);
        if (STREAMS > 1) asm("" : "+v"(columns));  // once for all streams, not as an operand of every instruction
        PYCOMPRESS_UNROLL_8
        for (int s = 0; s < STREAMS; ++s) sum[s][t] = Form::multiply(sum[s][t], part[s], columns);
      }
    }
  }
}

// Copies the 1 to 7 bytes at the end of a row of bits.
inline uint64_t last_bits(const uint8_t* bits, int64_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, bits, size_t(bytes));
  return word;
}

// STREAMS runs of `rows` rows, the first one at n. The sums of stream s, row r, token t go to
// tile[t * kBitmapBlock + s * rows + r]. Behind the values of the last row there are kBitmapOverread more.
template <class Form, int STREAMS, int TOKENS>
void multiply_rows(const Walk<Form>& walk, int64_t n, int64_t rows, typename Form::Sum* tile) {
  using Value = typename Form::Value;
  const Value* values[STREAMS];
  PYCOMPRESS_UNROLL_8
  for (int s = 0; s < STREAMS; ++s) values[s] = walk.values + walk.row_start[n + s * rows];
  const uint8_t* bits = walk.bits + n * walk.row_bytes;
  const int64_t stride = rows * walk.row_bytes;
  for (int64_t r = 0; r < rows; ++r, bits += walk.row_bytes) {
    typename Form::Sum sum[STREAMS][TOKENS] = {};
    const typename Form::X* x = walk.x;
    int64_t i = 0;
    for (; i + 8 <= walk.row_bytes; i += 8, x += kBitmapWord * TOKENS) {
      PYCOMPRESS_UNROLL_8
      for (int s = 0; s < STREAMS; ++s) {
        const char* ahead = reinterpret_cast<const char*>(values[s]) + kBitmapValuesAhead;
        __builtin_prefetch(ahead);
        if (sizeof(Value) == 4) __builtin_prefetch(ahead + kAlignment);
        if (i % 64 == 0) __builtin_prefetch(bits + s * stride + i + kBitmapBitsAhead);
      }
      multiply_columns<Form, STREAMS, TOKENS>(bits + i, stride, values, x, TOKENS, sum);
    }
    if (i < walk.row_bytes) {
      uint64_t tail[STREAMS];
      PYCOMPRESS_UNROLL_8
      for (int s = 0; s < STREAMS; ++s) tail[s] = last_bits(bits + s * stride + i, walk.row_bytes - i);
      multiply_columns<Form, STREAMS, TOKENS>(reinterpret_cast<const uint8_t*>(tail), 8, values, x, TOKENS, sum);
    }
    PYCOMPRESS_UNROLL_8
    for (int s = 0; s < STREAMS; ++s) {
      PYCOMPRESS_UNROLL_8
      for (int t = 0; t < TOKENS; ++t) tile[t * kBitmapBlock + s * rows + r] = sum[s][t];
    }
  }
}

// `bytes` of bits of one row, one token: the careful way, for what multiply_rows() cannot do. Where the values end, it
// reads a copy.
template <class Form>
typename Form::Sum multiply_span(const Walk<Form>& walk, const uint8_t* bits, int64_t bytes, const typename Form::X* x,
                                 int64_t held, const typename Form::Value*& next) {
  using Value = typename Form::Value;
  static const Value kNothing[kBitmapOverread] = {};
  typename Form::Sum sum[1][1] = {};
  for (int64_t i = 0; i < bytes; i += 8, x += kBitmapWord * held) {
    const uint64_t word = last_bits(bits + i, int8_matmul::at_most(bytes - i, 8));
    const int64_t left = walk.values_end - next;
    Value copy[kBitmapWord + kBitmapOverread];
    const Value* values[1] = {word == 0 ? kNothing : next};
    if (word != 0 && left < kBitmapWord + kBitmapOverread) {
      std::memset(copy, 0, sizeof copy);
      std::memcpy(copy, next, size_t(left) * sizeof(Value));
      values[0] = copy;
    }
    multiply_columns<Form, 1, 1>(reinterpret_cast<const uint8_t*>(&word), 0, values, x, held, sum);
    next += __builtin_popcountll(word);
  }
  return sum[0][0];
}

}  // namespace
}  // namespace pycompress::sparse_linear
