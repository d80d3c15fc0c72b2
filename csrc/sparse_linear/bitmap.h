// The bitmap kernels: what a kernel file provides. The form is described in sparse_linear.h.
#pragma once

#include "sparse_linear/sparse_linear.h"

namespace pycompress::sparse_linear {

// One thread's share: every row of x, up to kBitmapTokens at a time, times the outputs in `outputs`.
struct BitmapBlock {
  const Args* args;
  const Bitmap* weight;
  const float* bias;   // [N, padded to whole registers] in f32; zeros where there is none
  const float* scale;  // [N, padded likewise] weight_scale; ones for float weights
  Range outputs;       // begins at a multiple of kBitmapUnit
  char* scratch;       // scratch_bytes of it, this thread's own
};

constexpr int64_t kBitmapUnit = 16;  // outputs: the widest register

struct BitmapKernel {
  const char* name;
  Isa isa;
  WeightType type;
  bool vbmi2;  // needs AVX512-VBMI2 beside `isa`
  void (*run)(const BitmapBlock&);
  int64_t (*scratch_bytes)(int64_t m, int64_t k);
};

// One array a file, a weight type an entry.
extern const BitmapKernel kBitmapScalar[3], kBitmapAvx2[3], kBitmapAvxVnni[1], kBitmapAvx512[3], kBitmapAvx512Vnni[1],
    kBitmapAvx512Vbmi2[2];

}  // namespace pycompress::sparse_linear
