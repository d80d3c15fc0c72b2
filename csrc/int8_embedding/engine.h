// The vector kernels, written once over Vec. Include vec_avx2.h or vec_avx512.h first; a file supplies
//
//   struct Rows { static Vec::F load(const int8_t* p);              kLanes values, widened
//                 static Vec::F load(const int8_t* p, int count); } the first `count`, nothing behind them is read
#pragma once

#include "int8_embedding/int8_embedding.h"

namespace pycompress::int8_embedding {
namespace {

constexpr int64_t kLine = 64;
// A row lies anywhere in a table beyond the caches, and the processor does not see where the next one starts: its lines
// are asked for about this many bytes ahead, at least two rows. 1M x 64 in bags of 32, a thread of a Zen 5: 16 ns a row
// without, 12 ns with 8 rows ahead, 6.6 ns with 32, 4.6 ns with 64, 4.5 ns with 128.
constexpr int64_t kAheadBytes = 4096, kMostAhead = 64;

inline int64_t rows_ahead(int64_t d) {
  const int64_t rows = kAheadBytes / d;
  return rows > kMostAhead ? kMostAhead : (rows < 2 ? 2 : rows);
}

// The row and its scale.
inline void fetch(const Table& t, int64_t row, int64_t first, int64_t columns) {
  const int8_t* const p = t.rows + row * t.d + first;
  for (int64_t at = 0; at < columns; at += kLine) __builtin_prefetch(p + at);
  __builtin_prefetch(p + columns - 1);  // a row seldom starts at a line
  __builtin_prefetch(t.scale + row);
}

template <class Rows, Dtype D, class Index>
void run_rows(const Args& a, Range outputs) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, L = Vec::kLanes;
  const Table t = a.table;
  const Index* const index = static_cast<const Index*>(a.index);
  const int64_t ahead = rows_ahead(t.d);
  for (int64_t i = outputs.begin; i < outputs.end; ++i) {
    if (i + ahead < outputs.end) fetch(t, index[i + ahead], 0, t.d);
    const int64_t row = index[i];
    const int8_t* const q = t.rows + row * t.d;
    const Vec::F scale = Vec::set1(t.scale[row]);
    char* const y = static_cast<char*>(a.y) + i * t.d * kSize;
    int64_t at = 0;
    for (; at + L <= t.d; at += L) Vec::store_as<D>(y + at * kSize, Vec::mul(scale, Rows::load(q + at)));
    const int rest = int(t.d - at);
    if (rest > 0) Vec::store_as<D>(y + at * kSize, Vec::mul(scale, Rows::load(q + at, rest)), rest);
  }
}

// Columns of one bag: N whole registers, or (N = 0) the `rest` lanes behind them.
constexpr int kRegisters = 4;

template <class Rows, Reduce R, Dtype D, class Index, int N>
void run_columns(const Args& a, int64_t bag, int64_t first, int rest) {
  constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2, L = Vec::kLanes;
  constexpr int kSums = N > 0 ? N : 1;
  const Table t = a.table;
  const Index* const index = static_cast<const Index*>(a.index);
  const float* const weight = a.weight;
  const int64_t begin = bag_begin(a, bag), end = bag_begin(a, bag + 1), count = a.count, padding = a.padding;
  const int64_t ahead = rows_ahead(t.d);
  int64_t terms = 0;
  Vec::F sum[kSums];
#pragma GCC unroll 4
  for (int j = 0; j < kSums; ++j) sum[j] = Vec::zero();
  for (int64_t i = begin; i < end; ++i) {
    if (i + ahead < count) fetch(t, index[i + ahead], first, N > 0 ? N * L : rest);
    const int64_t row = index[i];
    if (row == padding) continue;
    const int8_t* const q = t.rows + row * t.d + first;
    const Vec::F scale = Vec::set1(weight == nullptr ? t.scale[row] : weight[i] * t.scale[row]);
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) {
      const Vec::F v = N > 0 ? Rows::load(q + j * L) : Rows::load(q, rest);
      if constexpr (R == Reduce::max) {
        const Vec::F scaled = Vec::mul(scale, v);
        sum[j] = terms == 0 ? scaled : Vec::max(sum[j], scaled);
      } else {
        sum[j] = Vec::fma(scale, v, sum[j]);
      }
    }
    ++terms;
  }
  char* const y = static_cast<char*>(a.y) + (bag * t.d + first) * kSize;
  const Vec::F divisor = Vec::set1(float(terms > 0 ? terms : 1));
#pragma GCC unroll 4
  for (int j = 0; j < kSums; ++j) {
    const Vec::F v = R == Reduce::mean ? Vec::div(sum[j], divisor) : sum[j];
    if (N > 0) {
      Vec::store_as<D>(y + j * L * kSize, v);
    } else {
      Vec::store_as<D>(y, v, rest);
    }
  }
}

template <class Rows, Reduce R, Dtype D, class Index>
void run_bags(const Args& a, Range outputs) {
  constexpr int64_t L = Vec::kLanes, kStep = kRegisters * L;
  const int64_t d = a.table.d;
  for (int64_t bag = outputs.begin; bag < outputs.end; ++bag) {
    int64_t at = 0;
    for (; at + kStep <= d; at += kStep) run_columns<Rows, R, D, Index, kRegisters>(a, bag, at, 0);
    for (; at + L <= d; at += L) run_columns<Rows, R, D, Index, 1>(a, bag, at, 0);
    if (at < d) run_columns<Rows, R, D, Index, 0>(a, bag, at, int(d - at));
  }
}

template <class Rows, Dtype D, class Index>
void run_reduced(const Args& a, Range outputs) {
  switch (a.reduce) {
    case Reduce::rows: return run_rows<Rows, D, Index>(a, outputs);
    case Reduce::sum: return run_bags<Rows, Reduce::sum, D, Index>(a, outputs);
    case Reduce::mean: return run_bags<Rows, Reduce::mean, D, Index>(a, outputs);
    default: return run_bags<Rows, Reduce::max, D, Index>(a, outputs);
  }
}

template <class Rows, Dtype D>
void run_as(const Args& a, Range outputs) {
  return a.wide ? run_reduced<Rows, D, int64_t>(a, outputs) : run_reduced<Rows, D, int32_t>(a, outputs);
}

template <class Rows>
void run_outputs(const Args& a, Range outputs) {
  switch (a.dtype) {
    case Dtype::f32: return run_as<Rows, Dtype::f32>(a, outputs);
    case Dtype::bf16: return run_as<Rows, Dtype::bf16>(a, outputs);
    default: return run_as<Rows, Dtype::f16>(a, outputs);
  }
}

}  // namespace
}  // namespace pycompress::int8_embedding
