// What the kernel of the loss is told, and what it asks once a token.
#pragma once

#include "common/cuda/device.h"
#include "distill_loss/cuda.h"

namespace pycompress::distill_loss {

using cuda::Global;

constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kSmallest = 1.17549435e-38f;  // FLT_MIN: less, relative to the row's largest, has no mass

// Rows, with addresses in bytes; `first` is the place of row 0 in its slot, in elements.
struct Operand {
  Global<const char> data;
  Dtype dtype = Dtype::f32;
  int first = 0;
  int64_t inner_rows = 1, outer_stride = 0, row_stride = 0, col_stride = 1;

  __device__ int64_t offset(int64_t row) const {
    if (row < inner_rows) return row * row_stride;  // mostly so, and a division of 64 bits takes a hundred instructions
    return row / inner_rows * outer_stride + row % inner_rows * row_stride;
  }
};

// What the rows of a call have in common.
struct CudaFormula {
  bool hard, soft;             // which terms are computed
  bool has_rest;               // the student has classes beyond the teacher's, and a hard term
  int squarings;               // exp(s - s_max) is 2^s' squared so often; -1: it needs an exponential of its own
  float scale;                 // log2(e) / tau
  float hard_gain, soft_gain;  // of the gradient: alpha and (1 - alpha) tau, times grad_factor
  float tau2, beta, no_beta;   // no_beta: 1 - beta
  float smoothing, no_smoothing;
  double alpha, no_alpha;
};

enum class Items : int { one, counted, given, on_device };

struct CudaParams {
  Operand student, teacher;
  Global<char> grad;  // null: no gradient
  int64_t tokens;
  int vocab;        // the student's classes
  int common;       // those that the teacher has too; without a soft term all
  int student_end;  // those whose logits count: with a hard term all, else the common ones

  Global<const int64_t> labels;
  Global<const float> token_weight;
  int64_t ignore_index, label_classes;
  CudaFormula formula;

  Items items;
  double given_items;
  Global<const double> num_items;  // on_device
  Global<double> counted;          // kPrepareBlocks parts
  bool normalize_grad;

  Global<float> loss, hard, soft;  // a value a token, or null
  Global<double> totals;           // 3 a group, or null

  bool staged;
  int blocks_per_row, slots_per_block, groups, scratch_bytes;
  Global<uint32_t> flags;
  Global<float> exchange;
};

// ---- tokens ------------------------------------------------------------------------------------------------------

// A token's label is a class of the student, or one of these. Without a hard term all valid tokens have kNoLabel.
constexpr int kNoLabel = -1, kIgnored = -2, kBad = -3;

__device__ inline bool is_valid(int label) { return label >= kNoLabel; }

__device__ inline float weight_of(const CudaParams& p, int64_t row) {
  return p.token_weight.is_null() ? 1.0f : p.token_weight.load(row);
}

// Called by whole warps: one lane asks, all know.
__device__ inline float weight_of_token(const CudaParams& p, int64_t row) {
  if (p.token_weight.is_null()) return 1.0f;
  const float weight = static_cast<int>(threadIdx.x) % cuda::kWarp == 0 ? p.token_weight.load(row) : 0.0f;
  return __shfl_sync(cuda::kAllLanes, weight, 0);
}

__device__ inline int load_label(const CudaParams& p, int64_t row) {
  int label = kNoLabel;
  if (static_cast<int>(threadIdx.x) % cuda::kWarp == 0) {
    const int64_t given = p.labels.is_null() ? 0 : p.labels.load(row);
    const float weight = weight_of(p, row);
    if (!p.labels.is_null() && given == p.ignore_index) {
      label = kIgnored;
    } else if (!(weight >= 0 && weight < kInfinity)) {
      label = kBad;
    } else if (!p.labels.is_null() && (given < 0 || given >= p.label_classes)) {
      label = kBad;
    } else if (weight == 0 || !(p.formula.hard || p.formula.soft)) {
      label = kIgnored;
    } else if (p.formula.hard) {
      label = static_cast<int>(given);
    }
  }
  return __shfl_sync(cuda::kAllLanes, label, 0);
}

// What a token adds to the number of items; a label that is out of range counts.
__device__ inline double items_of_token(const CudaParams& p, int64_t row) {
  if (!p.labels.is_null() && p.labels.load(row) == p.ignore_index) return 0;
  const float weight = weight_of(p, row);
  return weight > 0 && weight < kInfinity ? weight : 0;
}

// 1 / items, NaN where that is no number; called by whole warps.
__device__ inline double inverse_of_items(const CudaParams& p) {
  double items = 1;
  if (p.items == Items::given) items = p.given_items;
  if (p.items == Items::on_device) items = p.num_items.load(0);
  if (p.items == Items::counted) {
    static_assert(kPrepareBlocks == cuda::kWarp, "a part a lane");
    items = cuda::warp_sum(p.counted.load(static_cast<int>(threadIdx.x) % cuda::kWarp));
  }
  return items > 0 && items < static_cast<double>(kInfinity) ? 1 / items : static_cast<double>(kNaN);
}

}  // namespace pycompress::distill_loss
