// The sweeps in plain C++: the specification of the vector kernels, for every processor.
#include <cmath>

#include "distill_loss/distill_loss.h"

namespace pycompress::distill_loss {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;
constexpr float kSmallest = 1.17549435e-38f;  // FLT_MIN

float base_of(float max) { return max == -kInfinity ? 0 : max; }

// 2^y as the vector kernels have it: 0 below their range. NaN stays.
float power(float y) { return y < -126 ? 0 : std::exp2(y); }

float hard_exp(const Sweep& sweep, float es, float s, float s_max) {
  if (sweep.hard == Hard::own) return power((s - s_max) * kLog2E);
  for (int i = 0; i < sweep.squarings; ++i) es *= es;
  return es;
}

void sums(const Sweep& sweep, const void* s, const void* t, int64_t n, float s_floor, float t_floor, Sums& out) {
  const bool teacher = sweep.soft != Soft::student_only;
  out = {};
  out.s_max = s_floor;
  out.t_max = t_floor;
  for (int64_t i = 0; i < n; ++i) {
    const float sv = load_float(s, i, sweep.dtype), tv = teacher ? load_float(t, i, sweep.dtype) : t_floor;
    if (sv > out.s_max) out.s_max = sv;
    if (tv > out.t_max) out.t_max = tv;
  }
  out.s_top = out.s_max;
  out.t_top = out.t_max;
  const float s_max = base_of(out.s_max), t_max = base_of(out.t_max);
  for (int64_t i = 0; i < n; ++i) {
    const float sv = load_float(s, i, sweep.dtype);
    const float s2 = (sv - s_max) * sweep.scale, es = power(s2);
    out.zs += es;
    if (sweep.hard != Hard::none) out.z1 += hard_exp(sweep, es, sv, s_max);
    if (sweep.smoothing && sv > -kInfinity) {
      out.smooth += sv - s_max;
      out.count += 1;
    }
    if (!teacher) continue;
    const float t2 = (load_float(t, i, sweep.dtype) - t_max) * sweep.scale, et = power(t2);
    out.zt += et;
    const bool reverse = sweep.soft == Soft::reverse_kl;
    const float weight = reverse ? es : et, d = reverse ? s2 - t2 : t2 - s2;
    if (std::fabs(d) < kInfinity) {
      out.cross += weight * d;
    } else if (weight > 0) {
      out.unmatched += weight;
    }
  }
}

float log2_mixed(const Terms& terms, float es, float et) {
  const float m = terms.p_part * et + terms.q_part * es;
  return std::log2(m > kSmallest ? m : kSmallest);
}

void moments(const Sweep& sweep, const void* s, const void* t, int64_t n, const Terms& terms, Moments& out) {
  out = {};
  for (int64_t i = 0; i < n; ++i) {
    const float s2 = (load_float(s, i, sweep.dtype) - terms.s_max) * sweep.scale, es = power(s2);
    const float t2 = (load_float(t, i, sweep.dtype) - terms.t_max) * sweep.scale, et = power(t2);
    const float log2_m = log2_mixed(terms, es, et);
    if (es > 0) out.q += es * (s2 + terms.shift - log2_m);
    if (et > 0) out.p += et * (t2 - log2_m);
  }
}

float gradient_of(const Sweep& sweep, const Terms& terms, float sv, float tv) {
  const float s2 = (sv - terms.s_max) * sweep.scale, es = power(s2), t2 = (tv - terms.t_max) * sweep.scale;
  float g = 0;
  switch (sweep.soft) {
    case Soft::forward_kl: g = terms.student * (es - terms.teacher * power(t2)); break;
    case Soft::student_only: g = terms.student * es; break;
    case Soft::reverse_kl:
      g = es * (std::fabs(s2 - t2) < kInfinity ? terms.slope * (s2 - t2) + terms.base : terms.unmatched);
      break;
    case Soft::jsd:
      if (es != 0) g = es * (terms.slope * (s2 + terms.shift - log2_mixed(terms, es, power(t2))) + terms.base);
      break;
  }
  if (sweep.hard != Hard::none) g += terms.hard * hard_exp(sweep, es, sv, terms.s_max);
  return sweep.smoothing && sv > -kInfinity ? g - terms.smooth : g;
}

void gradient(const Sweep& sweep, const void* s, const void* t, int64_t n, const Terms& terms, void* grad, bool) {
  const bool teacher = sweep.soft != Soft::student_only;
  for (int64_t i = 0; i < n; ++i) {
    const float tv = teacher ? load_float(t, i, sweep.dtype) : 0;
    store_float(grad, i, sweep.dtype, gradient_of(sweep, terms, load_float(s, i, sweep.dtype), tv));
  }
}

void widen(const void* from, Dtype dtype, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load_float(from, i, dtype);
}

void narrow(const float* from, int64_t n, Dtype dtype, void* to) {
  for (int64_t i = 0; i < n; ++i) store_float(to, i, dtype, from[i]);
}

}  // namespace

const Kernel kScalar{"distill_loss_scalar", Isa::scalar, sums, moments, gradient, widen, narrow, 0, nullptr};

}  // namespace pycompress::distill_loss
