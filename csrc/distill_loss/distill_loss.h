// Softmax-KL distillation loss and its gradient, in one call and one pass over memory.
//
//   loss[t] = w[t] / items * (alpha * hard[t] + (1 - alpha) * soft[t])
//   hard[t] = (1 - e) * (lse(s[t]) - s[t,y]) + e * mean_v (lse(s[t]) - s[t,v])     e = label_smoothing
//   soft[t] = tau^2 * D(p, q),   p = softmax(teacher[t,:C] / tau),   q = softmax(s[t,:C] / tau)
//
//   forward_kl   D = sum_v p (log p - log q)                   dD/d(s/tau) = q - p
//   reverse_kl   D = sum_v q (log q - log p)                   dD/d(s/tau) = q (log q - log p - D)
//   jsd          D = beta KL(p|m) + (1 - beta) KL(q|m)         dD/d(s/tau) = q (h - sum q h)
//                m = beta p + (1 - beta) q                     h = (1 - beta) log(q / m)
//
// C = min(student vocabulary, teacher vocabulary): classes beyond it take no part in the soft term. The mean of the
// smoothing is over the classes that are not -inf. A part whose weight is 0 is not computed and is reported as 0.
//
// Valid tokens have a label other than ignore_index (or there are no labels) and w > 0. The others give 0 in every
// output, whatever their logits hold. items: for mean, num_items where it is given, else the sum of w over the valid
// tokens; 1 for sum and none. No valid token: everything is 0.
//
// -inf is a masked class: no mass, 0 log 0 = 0. Where D is infinite (the student, or for reverse_kl the teacher, masks
// what the other does not) the loss is +inf and the gradient finite: reverse_kl then takes log q - log p as 0 at those
// classes and D without them. A row with NaN, +inf or nothing but -inf is NaN, and no other row is.
//
// Top-k teacher: teacher[t,0..k) are the logits of the classes indices[t,0..k). With logsumexp[t] = log sum_v
// exp(teacher[t,v] / tau) over the whole vocabulary, the classes left out are one more class of both distributions;
// without it the teacher has no mass there.
//
// Logits: f32, bf16 or f16 [T,V], any strides. grad: the student's dtype, contiguous [T,V]; it may be the student's own
// memory. Arithmetic is f32 on differences to the row's maximum, sums are f32 within kChunk classes and f64 beyond.
// Nothing of size T x V is allocated.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace pycompress::distill_loss {

enum class Divergence : int { forward_kl = 0, reverse_kl, jsd };
enum class Reduction : int { mean = 0, sum, none };

// Element (m, v) lies at (m / inner_rows) * outer_stride + (m % inner_rows) * row_stride + v * col_stride. Two levels of
// rows, so that a slice of a batch x time x vocabulary tensor needs no copy. Strides count elements.
struct Rows {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t rows = 0, cols = 0;
  int64_t inner_rows = 1, outer_stride = 0, row_stride = 0, col_stride = 1;

  int64_t offset(int64_t m) const { return m / inner_rows * outer_stride + m % inner_rows * row_stride; }
};

struct Args {
  Rows student, teacher;                  // top-k: the teacher has k columns
  const int64_t* topk_indices = nullptr;  // [T,k], or null for a dense teacher
  const float* topk_logsumexp = nullptr;  // [T], or null
  const int64_t* labels = nullptr;        // [T], or null
  const float* token_weight = nullptr;    // [T], or null

  Divergence divergence = Divergence::forward_kl;
  Reduction reduction = Reduction::mean;
  double temperature = 1, alpha = 0.5, beta = 0.5, label_smoothing = 0;
  int64_t ignore_index = -100;
  double num_items = -1;  // negative: count

  float *loss = nullptr, *hard = nullptr, *soft = nullptr;  // [T] for none, else one value; all but loss may be null
  void* grad = nullptr;                                     // or null
  bool normalize_grad = true;  // false leaves the division by items out of grad, so that f16 does not underflow
  int threads = 1;
};

// Checks every field and every label, weight and index, then computes. Throws ArgumentError before any work.
// Returns items.
double run(const Args& args);

const char* kernel_name();

// ---- what a kernel file provides -------------------------------------------------------------------------------
//
// A kernel works on one chunk: at most kChunk neighbouring classes of one row, contiguous, s and t of one dtype. It is
// vector code only; rows, threads, sums over chunks and the constants of a row are elsewhere (problem.h, row.h).
// Logits enter as s' = (s - s_max) * scale, scale = log2(e) / tau, so that 2^s' = exp((s - s_max) / tau); t' likewise.

constexpr int64_t kChunk = 4096;  // s, t and the gradient of a chunk fit the first-level cache

// What a sweep has to sum: the teacher's part in it, and where exp(s - s_max) of the hard term comes from.
enum class Soft : int { forward_kl = 0, reverse_kl, jsd, student_only };
enum class Hard : int {
  none = 0,
  power,  // (2^s')^tau for tau = 1, 2, 4: squared `squarings` times, no exponential of its own
  own,    // its own exponential; the only one that smooths labels
};

struct Sweep {
  Dtype dtype = Dtype::f32;  // of s, t and grad
  Soft soft = Soft::student_only;
  Hard hard = Hard::none;
  int squarings = 0;
  float scale = 1;
  float beta = 0.5f;
  bool smoothing = false;  // only with Hard::own
};

// Sums over a chunk: sum 2^s', sum exp(s - s_max), sum 2^t', and
//   forward_kl, jsd   cross = sum 2^t' (t' - s') over s > -inf;  unmatched = sum 2^t' over s = -inf
//   reverse_kl        cross = sum 2^s' (s' - t') over t > -inf;  unmatched = sum 2^s' over t = -inf
// and for smoothing the sum of s - s_max and the count, over the classes with s > -inf.
// s_max is the largest logit or one a little below it, whatever suits the kernel; s_top is the largest. Both are
// -infinity, and s_max counts as 0, where all are; t_max and t_top likewise.
struct Sums {
  float s_max = -__builtin_inff(), t_max = s_max, s_top = s_max, t_top = s_max;
  double zs = 0, z1 = 0, zt = 0, cross = 0, unmatched = 0, smooth = 0, count = 0;
};

// What the gradient (and for jsd the second sweep) of a row needs. With E = exp(s - s_max):
//   forward_kl    g = hard E + student (2^s' - teacher 2^t') - smooth          exactly 0 where p = q
//   reverse_kl    g = hard E + 2^s' (slope (s' - t') + base) - smooth,   or unmatched for the bracket where t = -inf
//   jsd           g = hard E + 2^s' (slope (s' + shift - log2 m) + base) - smooth,   m = p_part 2^t' + q_part 2^s'
//                 p_part = beta, q_part = (1 - beta) zt / zs, shift = log2(zt / zs): relative to zt, so that the only
//                 logarithm that is rounded for the whole row is the one that is near 0 where p is near q
//   student_only  g = hard E + student 2^s' - smooth
struct Terms {
  float s_max = 0, t_max = 0;
  float hard = 0, student = 0, teacher = 0, smooth = 0;
  float slope = 0, base = 0, unmatched = 0;
  float shift = 0, p_part = 0, q_part = 0;
};

// jsd, second sweep: sum 2^t' (log2 p - log2 m) and sum 2^s' (log2 q - log2 m).
struct Moments {
  double p = 0, q = 0;
};

// Up to `Kernel::lanes` short rows at once, a row a lane. Not for label smoothing, top-k or unequal vocabularies.
constexpr int64_t kShortVocab = 64;
struct ShortRows {
  int rows;
  int64_t vocab;               // <= kShortVocab
  const void *s, *t;           // of Sweep::dtype, classes next to each other
  int64_t s_stride, t_stride;  // from row to row, in elements
  const int64_t* label;        // [rows], any class where the token is ignored; null without a hard term
  // [lanes] each: alpha * g and (1 - alpha) * tau * g with g = w / items; the cross-entropy; D
  const float *hard_gain, *soft_gain;
  float *hard, *divergence;  // NaN where the row is
  void* grad;                // [rows,V] or null
};

struct Kernel {
  const char* name;
  Isa isa;
  // Sums over n classes; s_floor and t_floor are the s_max and t_max of the chunks before, or -infinity.
  void (*sums)(const Sweep&, const void* s, const void* t, int64_t n, float s_floor, float t_floor, Sums& out);
  void (*moments)(const Sweep&, const void* s, const void* t, int64_t n, const Terms&, Moments& out);
  // stream: store past the cache
  void (*gradient)(const Sweep&, const void* s, const void* t, int64_t n, const Terms&, void* grad, bool stream);
  void (*widen)(const void* from, Dtype dtype, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, Dtype dtype, void* to);
  int lanes;  // 0: no short_rows
  void (*short_rows)(const Sweep&, const ShortRows&);
};

// kAvx512Bf16 needs avx512bf16 beside its isa.
extern const Kernel kScalar, kAvx2, kAvx512, kAvx512Bf16;

}  // namespace pycompress::distill_loss
