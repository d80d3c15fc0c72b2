// The distillation loss on a GPU: the formulas and edge cases of distill_loss.h, for a dense teacher. Here differently:
//
//   - Nothing is read back, so no value can be refused. A valid token with a weight that is negative or not finite, or
//     with a label outside the student's classes, gives NaN: in its loss, in its row of the gradient, in the sum and
//     the mean; no other row is touched. num_items that is not a positive number does the same to all valid tokens.
//   - An ignored token is 0 even if its weight is bad. The items that are counted are the finite weights of the others.
//   - Sums are f32, per thread at most a few hundred classes, then in a tree; the sums over the tokens are f64. The
//     same call gives the same bits again.
//
// Memory is read once and written once: a row waits in the shared memory of a block from its sums to its gradient, and
// a row that is too large for one block in that of several, which exchange their sums:
//
//   group 0, row r  | block 0: slots 0..n-1 | block 1: slots n..2n-1 | block 2: the rest |   blocks_per_row = 3
//   group 1, row r+1| block 3               | block 4                | block 5           |   then rows r+2, r+3, ...
//
// A slot is 16 bytes of each operand that begin at an address divisible by 16: 8 or 4 neighbouring classes. Where the
// operands do not line up so, or differ in dtype, a slot is one class, kept as f32.
#pragma once

#include <cstdint>

#include "common/cuda/launch.h"
#include "distill_loss/distill_loss.h"

namespace pycompress::distill_loss {

struct CudaArgs {
  Rows student, teacher;
  const int64_t* labels = nullptr;      // [T], or null
  const float* token_weight = nullptr;  // [T], or null
  int64_t label_classes = 0;            // labels lie below it; 0: the student's vocabulary

  Divergence divergence = Divergence::forward_kl;
  Reduction reduction = Reduction::mean;
  double temperature = 1, alpha = 0.5, beta = 0.5, label_smoothing = 0;
  int64_t ignore_index = -100;
  const double* num_items = nullptr;  // on the device; null: given_items
  double given_items = -1;            // negative: count

  float *loss = nullptr, *hard = nullptr, *soft = nullptr;  // [T] for none, else one value; all null: not wanted
  void* grad = nullptr;         // the student's dtype, contiguous [T,V], or null; it may be the student's own memory
  bool normalize_grad = true;   // false leaves the division by items out of grad
  double grad_factor = 1;       // multiplies grad
  float* grad_scale = nullptr;  // one value or null: 1 / items, for who divides later; 0 where that is no number
  void* workspace = nullptr;    // most_workspace_bytes(), aligned to 32
};

// How a call is spread over the device.
struct Plan {
  bool vectors = false;  // slots of 16 bytes, else of one class
  bool staged = true;    // rows wait in shared memory; else every sweep reads them again
  int threads = 32;
  int blocks_per_row = 1;  // more than 1: a cooperative launch
  int slots_per_block = 0;
  int groups = 0;  // blocks, or groups of blocks_per_row: each takes every groups-th row
  int shared_bytes = 0;
};

Plan pick(const CudaArgs& args, const cuda::DeviceInfo& info);

// Shared memory of a block of `threads` beside its slots: sums of the warps, and what is computed once a row.
constexpr int scratch_bytes(int threads) { return 128 + 64 * (threads / 32); }
constexpr int kPrepareBlocks = 32;  // each leaves a part of the counted items

// The workspace:  | items counted: kPrepareBlocks f64 | a group's loss, hard, soft: 3 f64 each |
//                 | a group's flag: 32 bytes each | a group's sums: 2 x blocks_per_row x kExchange f32 each |
constexpr int kExchange = 16, kFlagBytes = 32;
constexpr int64_t totals_at() { return kPrepareBlocks * 8; }
inline int64_t flags_at(const Plan& plan) { return totals_at() + (int64_t(plan.groups) * 24 + 31) / 32 * 32; }
inline int64_t exchange_at(const Plan& plan) { return flags_at(plan) + int64_t(plan.groups) * kFlagBytes; }
inline int64_t workspace_bytes(const Plan& plan) {
  const int64_t sums = plan.blocks_per_row > 1 ? int64_t(plan.groups) * 2 * plan.blocks_per_row * kExchange * 4 : 0;
  return exchange_at(plan) + sums;
}
// What every call with so many rows can do with, at most.
int64_t most_workspace_bytes(int64_t rows, int device);

void check_cuda_args(const CudaArgs& args);

// Checks the fields, starts the kernels and returns. Throws ArgumentError before, or cuda::CudaError.
void run_cuda(const CudaArgs& args, const cuda::Place& place);
void run_cuda(const CudaArgs& args, const cuda::Place& place, const Plan& plan);

// grad[r,:] *= factor[r * factor_stride], in place; grad contiguous [rows,cols]. A row of factor 1 is not touched.
void scale_cuda(void* grad, Dtype dtype, int64_t rows, int64_t cols, const float* factor, int factor_stride,
                const cuda::Place& place);

}  // namespace pycompress::distill_loss
