// The inner loops: one tile of up to 6 rows x nr outputs, accumulated over K in registers. See tile_engine.h.
#pragma once

#include "common/memory.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

// Memory to bring into L2 during a tile: two lines from `next` at every step, then `stride` bytes on. At most 128.
struct Fetch {
  const uint8_t* next;
  int64_t stride;
};

// Every loop over registers is unrolled by pragma: GCC keeps an array in registers only if all its indices are
// constants early on, and otherwise stores the accumulators at every step.
#define PYCOMPRESS_UNROLL _Pragma("GCC unroll 8")

// sum[r][j] += x[r] . w[j] for one group of ku values of k
template <class Isa, int MR, int NV>
__attribute__((always_inline)) inline void int_step(const uint8_t* w, const typename Isa::X* x, int64_t ldx,
                                                    typename Vec::I (&sum)[MR][NV]) {
  typename Vec::I b[NV];
  PYCOMPRESS_UNROLL
  for (int j = 0; j < NV; ++j) b[j] = Isa::load_weight(w + j * Isa::kBytes);
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    const typename Vec::I q = Isa::broadcast(x + r * ldx);
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) sum[r][j] = Isa::dot(sum[r][j], b[j], q);
  }
}

// acc[MR, NV vectors] = row_init[r] + col_init[n] + sum over `groups` of ku values of x[r] . w[n]
// `fetch` is memory to bring into L2 meanwhile.
template <class Isa, int MR, int NV>
void int_tile(const uint8_t* w, const typename Isa::X* x, int64_t ldx, int64_t groups, const int32_t* row_init,
              const int32_t* col_init, Fetch fetch, int32_t* acc) {
  constexpr int kStep = Isa::kBytes * NV, KU = Isa::kLayout.ku;
  // A tile with few accumulators takes a second set, so that the latency of the dot product does not stall it.
  constexpr bool kTwoSets = MR * NV < 8;
  typename Vec::I sum[MR][NV], odd[MR][NV];
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) {
      sum[r][j] = Vec::iset1(row_init[r]);
      odd[r][j] = Vec::izero();
    }
  }
  if (kTwoSets) {
    for (; groups >= 2; groups -= 2) {
      int_step<Isa, MR, NV>(w, x, ldx, sum);
      int_step<Isa, MR, NV>(w + kStep, x + KU, ldx, odd);
      w += 2 * kStep;
      x += 2 * KU;
    }
  }
  for (; groups > 0; --groups) {
    if (!kTwoSets) {
      __builtin_prefetch(fetch.next, 0, 2);
      __builtin_prefetch(fetch.next + kAlignment, 0, 2);
      fetch.next += fetch.stride;
    }
    int_step<Isa, MR, NV>(w, x, ldx, sum);
    w += kStep;
    x += KU;
  }
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) {
      typename Vec::I total = kTwoSets ? Vec::iadd(sum[r][j], odd[r][j]) : sum[r][j];
      if (col_init != nullptr) total = Vec::iadd(total, Vec::iload(col_init + j * Vec::kLanes));
      Vec::istore(acc + (r * Isa::kVectors + j) * Vec::kLanes, total);
    }
  }
}

constexpr int64_t kWidenAhead = 8192;  // bytes of weight fetched ahead; at M = 1 nearly twice the speed of none

// acc[MR, NV vectors] += the same in f32, for weight_only: every weight is widened once for all rows of the tile.
template <class Isa, int MR, int NV>
void float_tile(const uint8_t* w, const float* x, int64_t ldx, int64_t groups, float* acc) {
  constexpr int KU = Isa::kLayout.ku;
  typename Vec::F sum[MR][NV];
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) sum[r][j] = Vec::load(acc + (r * Isa::kVectors + j) * Vec::kLanes);
  }
  for (int64_t g = 0; g < groups; ++g) {
    // Widening fills the window of instructions in flight, so that they do not reach far enough ahead by themselves.
    PYCOMPRESS_UNROLL
    for (int line = 0; line < Isa::kBytes * NV; line += kAlignment) __builtin_prefetch(w + kWidenAhead + line);
    PYCOMPRESS_UNROLL
    for (int i = 0; i < KU; ++i) {
      typename Vec::F b[NV];
      PYCOMPRESS_UNROLL
      for (int j = 0; j < NV; ++j) b[j] = Vec::to_float(Isa::weight_at(Isa::load_weight(w + j * Isa::kBytes), i));
      PYCOMPRESS_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename Vec::F v = Vec::set1(x[r * ldx + i]);
        PYCOMPRESS_UNROLL
        for (int j = 0; j < NV; ++j) sum[r][j] = Vec::fma(v, b[j], sum[r][j]);
      }
    }
    w += Isa::kBytes * NV;
    x += KU;
  }
  PYCOMPRESS_UNROLL
  for (int r = 0; r < MR; ++r) {
    PYCOMPRESS_UNROLL
    for (int j = 0; j < NV; ++j) Vec::store(acc + (r * Isa::kVectors + j) * Vec::kLanes, sum[r][j]);
  }
}

}  // namespace
}  // namespace pycompress::int8_matmul
