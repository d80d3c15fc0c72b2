// Embedding with an int8 table: rows are gathered and scaled in one pass, one by one or reduced by bags.
//
//   rows   y[i,d] = scale[index[i]] * table[index[i],d]
//   sum    y[b,d] = sum over i in bag b of weight[i] * scale[index[i]] * table[index[i],d]
//   mean   the sum without weights, divided by the number of its terms
//   max    the largest scale[index[i]] * table[index[i],d] over i in bag b
//
// table: s8 [V,D], row-major and contiguous. scale: [V], finite. index: s32 or s64 [count].
// Bag b is [offset[b], offset[b+1]), the last one ends at `count`; without offsets a bag is bag_size neighbours. An
// index equal to `padding` is no term of its bag (in `rows` it is looked up like any other). A bag without terms gives 0.
// y: f32, bf16 or f16 [outputs,D], contiguous. `rows` rounds the exact product once; sums are f32, in the order of the
// indices, rounded to y's dtype at the end. A thread computes whole rows of y: their number changes no bit.
// Every index is checked before anything is read or written. D == 0 or no outputs does nothing else.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/range.h"

namespace pycompress::int8_embedding {

enum class Reduce : int { rows = 0, sum, mean, max };

struct Table {
  const int8_t* rows = nullptr;
  const float* scale = nullptr;
  int64_t v = 0, d = 0;
};

struct Args {
  Table table;
  Reduce reduce = Reduce::rows;

  const void* index = nullptr;   // [count]
  const void* offset = nullptr;  // [outputs], of the same width; bags only, null for bags of bag_size
  bool wide = true;              // index and offset are s64, else s32
  int64_t count = 0, bag_size = 0;
  int64_t padding = -1;           // -1: none
  const float* weight = nullptr;  // [count] or null; sum only

  void* y = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t outputs = 0;  // rows of y: `count`, or the number of bags
  int threads = 1;
};

static inline int64_t whole(const void* values, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
}

static inline int64_t bag_begin(const Args& a, int64_t bag) {
  if (a.offset == nullptr) return bag * a.bag_size;
  return bag < a.outputs ? whole(a.offset, a.wide, bag) : a.count;
}

// ---- what a kernel file provides -------------------------------------------------------------------------------

struct Kernel {
  const char* name;
  Isa isa;
  void (*run)(const Args&, Range outputs);
};

extern const Kernel kScalar, kAvx2, kAvx512;

// ---- int8_embedding.cpp ----------------------------------------------------------------------------------------

// The best kernel that may run here.
const Kernel& best_kernel();

// Checks every field, index and offset, then computes. Throws ArgumentError or IndexError before any work.
void run(const Args& args);

}  // namespace pycompress::int8_embedding
