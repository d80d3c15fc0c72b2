// What the sweeps do with some classes of a slot: N of each operand, in registers. The specification is
// kernel_scalar.cpp.
#pragma once

#include "distill_loss/cuda_row.cuh"

namespace pycompress::distill_loss {

// 2^s' into exp(s - s_max); base: what s is relative to
template <int N>
__device__ inline void hard_powers(const CudaFormula& f, const float (&s)[N], float base, float (&e)[N]) {
  if (f.squarings < 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] = cuda::exp2_fast(scaled(s[i], base, kLog2E));
    return;
  }
  for (int square = 0; square < f.squarings; ++square) {
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] *= e[i];
  }
}

// A slot into the sums of the classes that both vocabularies have.
template <Soft kSoft, int N>
__device__ inline void add_slot(const CudaFormula& f, const float (&s)[N], const float (&t)[N], RowSums32& x) {
  float s_max = x.s_max, t_max = x.t_max;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    s_max = fmaxf(s_max, s[i]);
    if constexpr (kSoft != Soft::student_only) t_max = fmaxf(t_max, t[i]);
  }
  if (s_max > x.s_max || t_max > x.t_max) rebase<kSoft>(f, s_max, t_max, x);
  const float s_base = base_of(s_max), t_base = base_of(t_max);
  float e[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s2 = scaled(s[i], s_base, f.scale);
    e[i] = cuda::exp2_fast(s2);
    x.zs += e[i];
    if constexpr (kSoft != Soft::student_only) {
      const float t2 = scaled(t[i], t_base, f.scale), et = cuda::exp2_fast(t2);
      x.zt += et;
      if constexpr (kSoft != Soft::jsd) {
        const bool reverse = kSoft == Soft::reverse_kl;
        const float weight = reverse ? e[i] : et, d = reverse ? s2 - t2 : t2 - s2;
        const bool finite = fabsf(d) < kInfinity;
        x.cross = finite ? fmaf(weight, d, x.cross) : x.cross;
        x.unmatched += finite ? 0.0f : weight;
      }
    }
  }
  if (!f.hard) return;
  hard_powers(f, s, s_base, e);
#pragma unroll
  for (int i = 0; i < N; ++i) x.z1 += e[i];
  if (f.smoothing == 0) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (s[i] > -kInfinity) {
      x.smooth += s[i] - s_base;
      x.count += 1;
    }
  }
}

// A slot into the sums of the student's classes beyond the teacher's.
template <int N>
__device__ inline void add_rest(const CudaFormula& f, const float (&s)[N], RowSums32& x) {
  float s_max = x.rest_max;
#pragma unroll
  for (int i = 0; i < N; ++i) s_max = fmaxf(s_max, s[i]);
  if (s_max > x.rest_max) rebase_rest(s_max, x);
  const float base = base_of(s_max);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x.rest_z1 += cuda::exp2_fast(scaled(s[i], base, kLog2E));
    if (f.smoothing > 0 && s[i] > -kInfinity) {
      x.rest_smooth += s[i] - base;
      x.rest_count += 1;
    }
  }
}

__device__ inline float log2_mixed(const Terms& terms, float es, float et) {
  return log2f(fmaxf(fmaf(terms.p_part, et, terms.q_part * es), kSmallest));
}

// jsd: sum 2^t' (log2 p - log2 m) into x, sum 2^s' (log2 q - log2 m) into y.
template <int N>
__device__ inline void add_moments(const CudaFormula& f, const float (&s)[N], const float (&t)[N], const Terms& terms,
                                   float2& x) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s2 = scaled(s[i], terms.s_max, f.scale), es = cuda::exp2_fast(s2);
    const float t2 = scaled(t[i], terms.t_max, f.scale), et = cuda::exp2_fast(t2);
    const float log_m = log2_mixed(terms, es, et);
    if (et > 0) x.x = fmaf(et, t2 - log_m, x.x);
    if (es > 0) x.y = fmaf(es, s2 + terms.shift - log_m, x.y);
  }
}

// The gradient of a slot but for the label's share. t: -infinity where the teacher has no such class.
template <Soft kSoft, int N>
__device__ inline void slot_gradient(const CudaFormula& f, const float (&s)[N], const float (&t)[N], const Terms& terms,
                                     float (&g)[N]) {
  float e[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s2 = scaled(s[i], terms.s_max, f.scale);
    const float es = e[i] = cuda::exp2_fast(s2);
    g[i] = 0;
    if constexpr (kSoft != Soft::student_only) {
      const float t2 = scaled(t[i], terms.t_max, f.scale);
      if constexpr (kSoft == Soft::forward_kl) {
        g[i] = terms.student * fmaf(-terms.teacher, cuda::exp2_fast(t2), es);
      } else if constexpr (kSoft == Soft::reverse_kl) {
        const float d = s2 - t2;
        g[i] = es * (fabsf(d) < kInfinity ? fmaf(terms.slope, d, terms.base) : terms.unmatched);
      } else if (es != 0) {
        const float log_q = s2 + terms.shift - log2_mixed(terms, es, cuda::exp2_fast(t2));
        g[i] = es * fmaf(terms.slope, log_q, terms.base);
      }
    }
  }
  if (!f.hard) return;
  hard_powers(f, s, terms.s_max, e);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    g[i] = fmaf(terms.hard, e[i], g[i]);
    if (f.smoothing > 0 && s[i] > -kInfinity) g[i] -= terms.smooth;
  }
}

// The same for a class beyond the teacher's: the hard term alone.
__device__ inline float rest_gradient(const CudaFormula& f, float s, const RowTerms& terms) {
  if (!f.hard) return 0;
  const float g = terms.rest_hard * cuda::exp2_fast(scaled(s, terms.rest_max, kLog2E));
  return f.smoothing > 0 && s > -kInfinity ? g - terms.common.smooth : g;
}

}  // namespace pycompress::distill_loss
