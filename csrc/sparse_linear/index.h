// The index form of a pruned weight, for many tokens: what is packed, and what a kernel file provides.
//
// Tokens lie in lanes. x is transposed into a panel of up to 64 tokens, one 32-bit *unit* a token: one f32, or four (two)
// neighbouring columns quantised to 8 (16) bits:
//
//   panel:   | unit 0: t0 t1 ... t63 | unit 1: t0 t1 ... t63 | ...
//
// A weight is broadcast and meets 16 tokens (AVX-512) in one instruction. The outputs go in *strips* of 16, the width at
// which the sums are transposed back, and these in *groups* of 1, 2 or 4 outputs. A group lists for each *pattern*, each
// non-empty set p of its rows (bit r: row r), the units where exactly these rows have weights: a unit of x is loaded once
// for all the rows that want it, and nothing is decided inside a loop. Blocks of 4 x 1 are lists of pattern 15.
//
//   lists   u16:  rows | count of p = 1, 2, ... 2^rows - 1 | units of p = 1 | units of p = 2 | ...     a group
//   values        per unit of a list, per row of its pattern, low bit first: f32, bf16, 4 x s8 or 2 x s16
//
// With `gather` (4 x 1 blocks of s8) lists hold columns, padded to a multiple of 4 with zero weights; the panel holds
// bytes, and the kernel interleaves any four columns into a register of quads.
#pragma once

#include "sparse_linear/sparse_linear.h"

namespace pycompress::sparse_linear {

constexpr int kStrip = 16;                // outputs
constexpr int kPanelTokens = 64;          // at most
constexpr int64_t kMaxUnits = 65535;      // what a u16 can name and count
constexpr int64_t kMaxRowCount = 130000;  // s8: 127 * 127 * this stays below 2^31; sums may wrap on the way

struct IndexLayout {
  int id;
  WeightType type;
  int unit;       // columns of a unit
  int max_group;  // rows that share lists: limited by the registers for their sums
  int offset;     // added to quantised x, to make it unsigned: the sum of a row's weights undoes it
  bool may_gather;
};

constexpr IndexLayout kFloats1{0, WeightType::f32, 1, 1, 0, false};   // scalar
constexpr IndexLayout kFloats2{1, WeightType::f32, 1, 2, 0, false};   // avx2
constexpr IndexLayout kFloats4{2, WeightType::f32, 1, 4, 0, false};   // avx512
constexpr IndexLayout kHalves1{3, WeightType::bf16, 1, 1, 0, false};  // likewise
constexpr IndexLayout kHalves2{4, WeightType::bf16, 1, 2, 0, false};
constexpr IndexLayout kHalves4{5, WeightType::bf16, 1, 4, 0, false};
constexpr IndexLayout kQuads1{6, WeightType::s8, 4, 1, 0, false};    // scalar
constexpr IndexLayout kPairs2{7, WeightType::s8, 2, 2, 0, false};    // avx2
constexpr IndexLayout kQuads2{8, WeightType::s8, 4, 2, 128, false};  // avxvnni
constexpr IndexLayout kPairs4{9, WeightType::s8, 2, 4, 0, false};    // avx512
constexpr IndexLayout kQuads4{10, WeightType::s8, 4, 4, 128, true};  // avx512vnni

// Bytes of the value of one row at one unit.
static inline int value_bytes(const IndexLayout& layout) { return layout.type == WeightType::bf16 ? 2 : 4; }

// Start of every packed weight, followed by Strip [strips + 1], s32 row_init [strips * 16], the lists, the values, each
// 64-byte aligned.
struct IndexHeader {
  uint32_t magic;    // "pcsi"
  uint16_t version;  // kIndexVersion
  uint16_t layout;   // IndexLayout::id
  int64_t n, k, nnz;
  int64_t list_count, value_count;
  int64_t total_bytes;
  uint32_t gather;
  uint32_t unused;
  uint64_t checksum;  // of the bytes before it
  uint8_t padding[56];
};
static_assert(sizeof(IndexHeader) == 128, "what follows must stay aligned to 64 bytes");

constexpr uint32_t kIndexMagic = 0x69736370;
constexpr uint16_t kIndexVersion = 1;

struct Strip {  // where its part begins, in elements
  int64_t list, value;
};

struct IndexWeight {
  const IndexLayout* layout;
  bool gather;
  int64_t n, k, nnz;
  const Strip* strips;      // [strips + 1]
  const int32_t* row_init;  // [strips * 16] what a sum begins with: -offset * (sum of the row's weights)
  const uint16_t* lists;
  const char* values;
};

// ---- what a kernel file provides -------------------------------------------------------------------------------

// One thread's share: the tokens in `tokens` times the outputs of `strips`.
struct IndexBlock {
  const Args* args;
  const IndexWeight* weight;
  const float* bias;   // [N, padded to strips] in f32; zeros where there is none
  const float* scale;  // [N, padded likewise] weight_scale; float weights have none
  Range tokens, strips;
  char* scratch;  // scratch_bytes of it, this thread's own
};

struct IndexKernel {
  const char* name;
  Isa isa;
  IndexLayout layout;
  int lanes;  // tokens of a register
  void (*run)(const IndexBlock&);
  int64_t (*scratch_bytes)(const Args& args, const IndexWeight& weight);
};

// One array a file, a weight type an entry.
extern const IndexKernel kIndexScalar[3], kIndexAvx2[3], kIndexAvxVnni[1], kIndexAvx512[3], kIndexAvx512Vnni[1];

// ---- index.cpp -------------------------------------------------------------------------------------------------

const IndexKernel& best_index_kernel(WeightType type);

// The kernel that reads this layout, or null where this CPU, or PYCOMPRESS_ISA, has none.
const IndexKernel* find_index_kernel(const IndexLayout& layout);

// The same; throws ArgumentError where there is none.
const IndexKernel& index_kernel_for(const IndexWeight& weight);

// Checks every field, then computes. Throws ArgumentError before any work.
void run_index(const Args& args, const IndexWeight& weight, const IndexKernel& kernel);

}  // namespace pycompress::sparse_linear
