// The bitmap kernels, written once over Vec and a Form: how an instruction set expands one type of weight.
//
//   Form::Value, X, Sum    a stored weight, an element of prepared x, a register of sums
//   Form::kColumns         columns that expand() makes at a time, as one register of Weights
//   Form::kParts, part     registers into which that falls apart before x meets it
//   Form::arrange, place   where there are 2: puts kColumns columns of x into the parts' order; where column j goes
//   Form::load, multiply   a register of x; its products with weights, added to a sum
//   Form::kSums            registers to spend on sums
//   Form::kExact           whether x is kept out of the sum where there is no weight, be it infinite or NaN
//   Form::Quantize         s8: int8_matmul's description of the dot product, which quantises x
//
// A block of outputs is walked by up to 4 streams side by side, each through neighbouring rows:
//
//   outputs n0 .. n0+63:   | stream 0: 16 rows | stream 1: 16 rows | stream 2 | stream 3 |
//
// so that bits and values of a stream lie one after the other in memory, where a fetch far ahead is never in vain, and
// so that the streams' chains of mask, count, address and load overlap. Sums stay in registers through a row and go to
// a tile; transposed, 16 outputs lie in the lanes of a register, and scale, bias and activation act on all of them.
#pragma once

#include "sparse_linear/bitmap_finish.h"
#include "sparse_linear/bitmap_tokens.h"

namespace pycompress::sparse_linear {
namespace {

// ---- sums ------------------------------------------------------------------------------------------------------

// Each register of token t's tile to the sum of its lanes.
template <class X>
void add_lanes(int64_t t, int64_t count, BitmapScratch<X>& scratch) {
  constexpr int L = Vec::kLanes;
  for (int64_t i = t * kBitmapBlock; i < t * kBitmapBlock + count; i += L) {
    const char* tile = scratch.tile + i * int64_t(sizeof(Vec::F));
    Vec::I square[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) square[j] = Vec::iload(tile + j * int64_t(sizeof(Vec::F)));
    Vec::transpose(square);
    if constexpr (BitmapScratch<X>::kInteger) {
#pragma GCC unroll 4
      for (int step = L / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
        for (int j = 0; j < step; ++j) square[j] = Vec::iadd(square[j], square[j + step]);
      }
      const Vec::I init = Vec::iset1(scratch.pass.row_init[t]);
      Vec::store(scratch.sums + i, Vec::to_float(Vec::iadd(square[0], init)));
    } else {
      Vec::F sum[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) sum[j] = (Vec::F)square[j];
#pragma GCC unroll 4
      for (int step = L / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
        for (int j = 0; j < step; ++j) sum[j] = Vec::add(sum[j], sum[j + step]);
      }
      Vec::store(scratch.sums + i, sum[0]);
    }
  }
}

// s8 with more columns than an int32 sum holds: a row at a time, a sum for each chunk of K, their total exact.
template <class Form, class X>
void sum_long_rows(const Walk<Form>& walk, int64_t n, int64_t rows, int64_t tokens, BitmapScratch<X>& scratch) {
  constexpr int64_t kChunkBytes = int8_matmul::kMaxChunkK / 8;
  static_assert(int8_matmul::kMaxChunkK % kBitmapWord == 0, "a chunk ends with a word of the bitmap");
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < tokens; ++t) {
      const typename Form::Value* next = walk.values + walk.row_start[n + r];
      int64_t total = 0;
      for (int64_t c = 0; c < scratch.pass.chunks; ++c) {
        const int64_t begin = c * kChunkBytes, bytes = int8_matmul::at_most(kChunkBytes, walk.row_bytes - begin);
        total += Vec::reduce_add(multiply_span(walk, walk.bits + (n + r) * walk.row_bytes + begin, bytes,
                                               walk.x + begin * 8 * tokens + t * Form::kColumns, tokens, next));
        total += scratch.pass.row_init[c * scratch.pass.max_rows + t];
      }
      scratch.sums[t * kBitmapBlock + r] = float(total);
    }
  }
}

// What the masks of other instruction sets do: only kept weights meet x, so that infinity times a pruned weight is
// nothing. For rows of x that hold infinity or NaN.
template <class Form>
float sum_kept(const Walk<Form>& walk, int64_t n, int64_t t, int64_t tokens) {
  constexpr int C = Form::kColumns;
  const uint8_t* bits = walk.bits + n * walk.row_bytes;
  const typename Form::Value* value = walk.values + walk.row_start[n];
  float sum = 0;
  for (int64_t k = 0; k < walk.row_bytes * 8; ++k) {
    if (!((bits[k / 8] >> (k % 8)) & 1)) continue;
    const float x = walk.x[(k / C * tokens + t) * C + Form::place(int(k % C))];
    sum += x * load_float(value++, 0, sizeof(*value) == 4 ? Dtype::f32 : Dtype::bf16);
  }
  return sum;
}

// scratch.sums of the outputs [n, n + count)
template <class Form, int TOKENS, class X>
void sum_block(const Walk<Form>& walk, int64_t n, int64_t count, BitmapScratch<X>& scratch) {
  if constexpr (BitmapScratch<X>::kInteger) {
    if (scratch.pass.chunks > 1) return sum_long_rows(walk, n, count, TOKENS, scratch);
  }
  constexpr int kStreams = Form::kSums / TOKENS < 4 ? Form::kSums / TOKENS : 4;
  auto* tile = reinterpret_cast<typename Form::Sum*>(scratch.tile);
  const int64_t values = walk.values_end - walk.values;
  int64_t done = count;  // but for rows too close to the end of the values
  while (done > 0 && walk.row_start[n + done] + kBitmapOverread > values) --done;
  if (done < kStreams) done = 0;
  if (done > 0) multiply_rows<Form, kStreams, TOKENS>(walk, n, done / kStreams, tile);
  // what the streams left over, together with rows that are done already
  if (done % kStreams != 0) multiply_rows<Form, kStreams, TOKENS>(walk, n + done - kStreams, 1, tile + done - kStreams);
  for (int64_t r = done; r < count; ++r) {
    for (int64_t t = 0; t < TOKENS; ++t) {
      const typename Form::Value* next = walk.values + walk.row_start[n + r];
      tile[t * kBitmapBlock + r] = multiply_span(walk, walk.bits + (n + r) * walk.row_bytes, walk.row_bytes,
                                                 walk.x + t * Form::kColumns, TOKENS, next);
    }
  }
  for (int64_t t = 0; t < TOKENS; ++t) {
    add_lanes(t, count, scratch);
    if constexpr (!Form::kExact) {
      for (int64_t i = 0; i < count && !scratch.finite[t]; ++i) {
        scratch.sums[t * kBitmapBlock + i] = sum_kept(walk, n + i, t, TOKENS);
      }
    }
  }
}

// ---- a block of work -------------------------------------------------------------------------------------------

template <class Form, class X>
using SumBlock = void (*)(const Walk<Form>&, int64_t, int64_t, BitmapScratch<X>&);

// Start here.
template <class Form>
void run_bitmap_block(const BitmapBlock& block) {
  using X = typename Form::X;
  static constexpr SumBlock<Form, X> kSumBlock[kBitmapTokens] = {
      sum_block<Form, 1, X>, sum_block<Form, 2, X>, sum_block<Form, 3, X>, sum_block<Form, 4, X>,
      sum_block<Form, 5, X>, sum_block<Form, 6, X>, sum_block<Form, 7, X>, sum_block<Form, 8, X>};
  const Args& a = *block.args;
  const Bitmap& w = *block.weight;
  const auto* values = static_cast<const typename Form::Value*>(w.values);
  const FinishBlock finish = block_finisher(a.activation, a.dtype);
  BitmapScratch<X> scratch(block.scratch, a.m, a.k);
  const int64_t groups = (a.m + kBitmapTokens - 1) / kBitmapTokens;
  for (int64_t g = 0; g < groups; ++g) {
    const Range rows = split(a.m, groups, g);
    const X* x = prepare_tokens<Form>(a, rows, scratch);
    const Walk<Form> walk{w.bits, values, values + w.row_start[w.n], w.row_start, (a.k + 7) / 8, x};
    for (int64_t n = block.outputs.begin; n < block.outputs.end; n += kBitmapBlock) {
      const int64_t count = int8_matmul::at_most(kBitmapBlock, block.outputs.end - n);
      kSumBlock[rows.end - rows.begin - 1](walk, n, count, scratch);
      finish({scratch.sums, scratch.scale, &block, rows, n, count});
    }
  }
}

template <class Form>
int64_t bitmap_scratch_bytes(int64_t m, int64_t k) {
  return BitmapScratch<typename Form::X>::bytes(m, k);
}

}  // namespace
}  // namespace pycompress::sparse_linear
