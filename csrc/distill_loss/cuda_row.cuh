// The arithmetic of one row that is not a sweep: sums of threads put together, the loss, the constants of the gradient.
// As row.cpp, in f32: the differences that cancel are taken before the logarithms, and sums of a thread are short.
#pragma once

#include "distill_loss/cuda_params.cuh"

namespace pycompress::distill_loss {

// What powers are relative to.
__device__ inline float base_of(float max) { return max == -kInfinity ? 0.0f : max; }

// What a class is scaled to. One rounding for the product: fused with the difference of two such, equal logits would
// not differ by exactly 0.
__device__ inline float scaled(float x, float base, float scale) { return __fmul_rn(x - base, scale); }

// Sums of a thread, a warp, a block or a row; see distill_loss.h. rest: the student's classes that the teacher lacks.
struct alignas(16) RowSums32 {
  float s_max = -kInfinity, t_max = -kInfinity, rest_max = -kInfinity;
  float zs = 0, z1 = 0, zt = 0, cross = 0, unmatched = 0, smooth = 0, count = 0;
  float rest_z1 = 0, rest_smooth = 0, rest_count = 0;
};

// What blocks exchange: kExchange floats at element i.
__device__ inline void store_sums(Global<float> to, int64_t i, const RowSums32& x) {
  using Four = cuda::Pack<float, 4>;
  to.store_as<Four>(i, {{x.s_max, x.t_max, x.rest_max, x.zs}});
  to.store_as<Four>(i + 4, {{x.z1, x.zt, x.cross, x.unmatched}});
  to.store_as<Four>(i + 8, {{x.smooth, x.count, x.rest_z1, x.rest_smooth}});
  to.store(i + 12, x.rest_count);
}

__device__ inline RowSums32 load_sums(Global<float> from, int64_t i) {
  using Four = cuda::Pack<float, 4>;
  const Four a = from.load_as<Four>(i), b = from.load_as<Four>(i + 4), c = from.load_as<Four>(i + 8);
  RowSums32 x;
  x.s_max = a.value[0], x.t_max = a.value[1], x.rest_max = a.value[2], x.zs = a.value[3];
  x.z1 = b.value[0], x.zt = b.value[1], x.cross = b.value[2], x.unmatched = b.value[3];
  x.smooth = c.value[0], x.count = c.value[1], x.rest_z1 = c.value[2], x.rest_smooth = c.value[3];
  x.rest_count = from.load(i + 12);
  return x;
}

// x's sums relative to other maxima. A factor of 0 ends the share, however far away its logarithm is. One rounding for
// each product: were it fused with the sum that comes next, the two lanes of an exchange would not get the same bits,
// nor would both operands' sums of equal logits.
template <Soft kSoft>
__device__ inline void rebase(const CudaFormula& f, float s_max, float t_max, RowSums32& x) {
  const float s_shift = x.s_max == -kInfinity ? 0.0f : x.s_max - s_max;  // empty sums are 0, whatever they refer to
  x.s_max = s_max;
  const float s_bits = fmaxf(s_shift * f.scale, -3.4e38f), s_factor = cuda::exp2_fast(s_bits);
  if constexpr (kSoft != Soft::student_only) {
    const float t_shift = x.t_max == -kInfinity ? 0.0f : x.t_max - t_max;
    x.t_max = t_max;
    const float t_bits = fmaxf(t_shift * f.scale, -3.4e38f), t_factor = cuda::exp2_fast(t_bits);
    if constexpr (kSoft == Soft::reverse_kl) {
      x.cross = s_factor > 0 ? __fmul_rn(s_factor, fmaf(x.zs - x.unmatched, s_bits - t_bits, x.cross)) : 0;
      x.unmatched = __fmul_rn(x.unmatched, s_factor);
    } else if constexpr (kSoft == Soft::forward_kl) {
      x.cross = t_factor > 0 ? __fmul_rn(t_factor, fmaf(x.zt - x.unmatched, t_bits - s_bits, x.cross)) : 0;
      x.unmatched = __fmul_rn(x.unmatched, t_factor);
    }
    x.zt = __fmul_rn(x.zt, t_factor);
  }
  x.zs = __fmul_rn(x.zs, s_factor);
  if (f.hard) {
    x.z1 = __fmul_rn(x.z1, cuda::exp2_fast(s_shift * kLog2E));
    x.smooth = x.count > 0 ? fmaf(x.count, s_shift, x.smooth) : 0;
  }
}

__device__ inline void rebase_rest(float rest_max, RowSums32& x) {
  const float shift = x.rest_max == -kInfinity ? 0.0f : x.rest_max - rest_max;
  x.rest_max = rest_max;
  x.rest_z1 = __fmul_rn(x.rest_z1, cuda::exp2_fast(shift * kLog2E));
  x.rest_smooth = x.rest_count > 0 ? fmaf(x.rest_count, shift, x.rest_smooth) : 0;
}

// b into a
template <Soft kSoft>
__device__ inline void merge(const CudaFormula& f, RowSums32 b, RowSums32& a) {
  const float s_max = fmaxf(a.s_max, b.s_max), t_max = fmaxf(a.t_max, b.t_max), rest = fmaxf(a.rest_max, b.rest_max);
  rebase<kSoft>(f, s_max, t_max, a);
  rebase<kSoft>(f, s_max, t_max, b);
  rebase_rest(rest, a);
  rebase_rest(rest, b);
  a.zs += b.zs;
  a.z1 += b.z1;
  a.zt += b.zt;
  a.cross += b.cross;
  a.unmatched += b.unmatched;
  a.smooth += b.smooth;
  a.count += b.count;
  a.rest_z1 += b.rest_z1;
  a.rest_smooth += b.rest_smooth;
  a.rest_count += b.rest_count;
}

// The sums of all lanes' x, in every lane.
template <Soft kSoft>
__device__ inline void merge_lanes(const CudaFormula& f, RowSums32& x) {
  const float s_max = cuda::warp_max(x.s_max);
  rebase<kSoft>(f, s_max, kSoft == Soft::student_only ? 0.0f : cuda::warp_max(x.t_max), x);
  x.zs = cuda::warp_sum(x.zs);
  if constexpr (kSoft != Soft::student_only) x.zt = cuda::warp_sum(x.zt);
  if constexpr (kSoft == Soft::forward_kl || kSoft == Soft::reverse_kl) {
    x.cross = cuda::warp_sum(x.cross);
    x.unmatched = cuda::warp_sum(x.unmatched);
  }
  if (f.hard) x.z1 = cuda::warp_sum(x.z1);
  if (f.smoothing > 0) {
    x.smooth = cuda::warp_sum(x.smooth);
    x.count = cuda::warp_sum(x.count);
  }
  if (!f.has_rest) return;
  rebase_rest(cuda::warp_max(x.rest_max), x);
  x.rest_z1 = cuda::warp_sum(x.rest_z1);
  x.rest_smooth = cuda::warp_sum(x.rest_smooth);
  x.rest_count = cuda::warp_sum(x.rest_count);
}

// ---- the row --------------------------------------------------------------------------------------------------------

// What the gradient of a row needs, Terms of distill_loss.h and: the same for the rest, what the label's class loses.
struct RowTerms {
  Terms common;
  float rest_max = 0, rest_hard = 0, label_gain = 0;
  float valid = 1;
};

struct RowValue {
  float hard = 0, soft = 0;  // NaN where the logits leave no distribution
};

__device__ inline bool positive(float z) { return z > 0 && z < kInfinity; }
__device__ inline float not_negative(float d) { return d < 0 ? 0.0f : d; }  // NaN stays

// gain: what the row's gradient is multiplied by, w / items
__device__ inline void finish_hard(const CudaFormula& f, const RowSums32& x, float label_logit, float gain,
                                   RowTerms& terms, RowValue& value) {
  terms.common.s_max = base_of(x.s_max);
  terms.common.t_max = base_of(x.t_max);
  if (!f.hard) return;
  const float g = f.hard_gain * gain, base = base_of(x.s_max), rest_base = base_of(x.rest_max);
  const float reference = base_of(fmaxf(x.s_max, x.rest_max));  // the logarithm of z is relative to it
  float z = x.z1, factor = 1, rest_factor = 0;
  if (f.has_rest) {
    factor = x.z1 > 0 ? expf(base - reference) : 0;
    rest_factor = x.rest_z1 > 0 ? expf(rest_base - reference) : 0;
    z = factor * x.z1 + rest_factor * x.rest_z1;
    if (x.z1 != x.z1 || x.rest_z1 != x.rest_z1) z = kNaN;
  }
  const float log_z = logf(z);
  terms.common.hard = g * factor / z;
  terms.rest_hard = g * rest_factor / z;
  terms.rest_max = rest_base;
  terms.label_gain = g * f.no_smoothing;
  if (f.smoothing < 1) value.hard = f.no_smoothing * (log_z + (reference - label_logit));  // the label may be masked
  if (f.smoothing > 0) {
    const float count = x.count + x.rest_count;
    const float mean =
        (fmaf(x.count, base - reference, x.smooth) + fmaf(x.rest_count, rest_base - reference, x.rest_smooth)) / count;
    value.hard += f.smoothing * (log_z - mean);
    terms.common.smooth = g * f.smoothing / count;
  }
  if (!positive(z)) value.hard = kNaN;
}

// The soft term; for jsd the constants that its second sweep needs, and finish_jsd after it.
template <Soft kSoft>
__device__ inline void finish_soft(const CudaFormula& f, const RowSums32& x, float gain, RowTerms& terms,
                                   RowValue& value) {
  if constexpr (kSoft == Soft::student_only) return;
  if (!positive(x.zs) || !positive(x.zt)) {
    value.soft = kNaN;
    return;
  }
  const float g = f.soft_gain * gain, ratio = x.zt / x.zs;
  if constexpr (kSoft == Soft::forward_kl) {
    const float finite = kLn2 * x.cross / x.zt - logf(ratio);
    value.soft = x.unmatched >= kSmallest ? kInfinity : f.tau2 * not_negative(finite);
    terms.common.student = g / x.zs;
    terms.common.teacher = x.zs / x.zt;
  } else if constexpr (kSoft == Soft::reverse_kl) {
    const float shift = logf(ratio), finite = (kLn2 * x.cross + shift * (x.zs - x.unmatched)) / x.zs;
    value.soft = x.unmatched >= kSmallest ? kInfinity : f.tau2 * not_negative(finite);
    terms.common.slope = g / x.zs * kLn2;
    terms.common.base = g / x.zs * (shift - finite);
    terms.common.unmatched = g / x.zs * -finite;
  } else {
    terms.common.shift = log2f(ratio);
    terms.common.p_part = f.beta;
    terms.common.q_part = f.no_beta * ratio;
  }
}

// moments: sum 2^t' (log2 p - log2 m) and sum 2^s' (log2 q - log2 m)
__device__ inline void finish_jsd(const CudaFormula& f, const RowSums32& x, float2 moments, float gain, RowTerms& terms,
                                  RowValue& value) {
  if (value.soft != value.soft) return;  // NaN before
  const float g = f.soft_gain * gain, p = kLn2 * moments.x / x.zt, h = f.no_beta * kLn2 * moments.y / x.zs;
  value.soft = f.tau2 * not_negative(f.beta * p + h);
  terms.common.slope = g / x.zs * f.no_beta * kLn2;
  terms.common.base = g / x.zs * -h;
}

}  // namespace pycompress::distill_loss
