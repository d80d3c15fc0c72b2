#include "distill_loss/row.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pycompress::distill_loss {
namespace {

constexpr double kLn2 = 0.693147180559945309, kLog2E = 1.44269504088896341;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A divergence is not negative; rounding may make it so. NaN stays.
double not_negative(double d) { return d < 0 ? 0 : d; }

bool positive(double z) { return z > 0 && z < kInfinity; }

// Whether powers relative to `ref` sum to something that counts next to the largest logit: less than 2^-126 of it is 0,
// as in the vector kernels.
bool has_mass(const Formula& f, double powers, float ref, float top) {
  return powers > 0 && std::log2(powers) - (double(top) - base_of(ref)) * f.scale() >= -126;
}

Sums relative_to(const Sweep& sweep, Sums x, float s_max, float t_max) {
  const bool s_empty = x.s_max == -kInfinity,
             t_empty = x.t_max == -kInfinity;  // its sums are 0, whatever they refer to
  const double s_shift = s_empty ? 0 : double(x.s_max) - s_max, t_shift = t_empty ? 0 : double(x.t_max) - t_max;
  x.s_max = s_max;
  x.t_max = t_max;
  if (s_shift == 0 && t_shift == 0) return x;
  const double s_bits = s_shift * sweep.scale, t_bits = t_shift * sweep.scale;
  const double s_factor = std::exp2(s_bits), t_factor = std::exp2(t_bits);
  if (sweep.soft == Soft::reverse_kl) {
    x.cross = s_factor * (x.cross + (x.zs - x.unmatched) * (s_bits - t_bits));
  } else {
    x.cross = t_factor * (x.cross + (x.zt - x.unmatched) * (t_bits - s_bits));
  }
  x.unmatched *= sweep.soft == Soft::reverse_kl ? s_factor : t_factor;
  x.zs *= s_factor;
  x.zt *= t_factor;
  x.z1 *= std::exp(s_shift);
  x.smooth += x.count * s_shift;
  return x;
}

}  // namespace

double Formula::scale() const { return kLog2E / temperature; }

void merge(const Sweep& sweep, Sums& a, const Sums& b) {
  const float s_max = std::max(a.s_max, b.s_max), t_max = std::max(a.t_max, b.t_max);
  a = relative_to(sweep, a, s_max, t_max);
  const Sums other = relative_to(sweep, b, s_max, t_max);
  a.zs += other.zs;
  a.z1 += other.z1;
  a.zt += other.zt;
  a.cross += other.cross;
  a.unmatched += other.unmatched;
  a.s_top = std::max(a.s_top, b.s_top);
  a.t_top = std::max(a.t_top, b.t_top);
  a.smooth += other.smooth;
  a.count += other.count;
}

void finish_hard(const Formula& f, const RowSums& sums, double label_logit, double gain, RowResult& row) {
  const Sums& a = sums.common;
  const double s_max = base_of(a.s_max);
  row.common.s_max = float(s_max);
  row.common.t_max = float(base_of(a.t_max));
  if (!f.hard) return;
  const Sums& b = sums.rest;
  const double rest_max = base_of(b.s_max), g = f.alpha * gain;
  double lse = s_max + std::log(a.z1);  // -infinity where the chunk holds nothing else
  if (sums.has_rest) {
    const double other = rest_max + std::log(b.z1), larger = std::max(lse, other);
    lse = larger + std::log(std::exp(lse - larger) + std::exp(other - larger));
  }
  // softmax = exp(s - s_max) * exp(s_max - lse)
  row.common.hard = float(sums.has_rest ? g * std::exp(s_max - lse) : g / a.z1);
  row.rest.s_max = float(rest_max);
  row.rest.hard = float(g * std::exp(rest_max - lse));
  row.hard = f.smoothing < 1 ? (1 - f.smoothing) * (lse - label_logit) : 0;  // the label may be masked
  row.label_gain = g * (1 - f.smoothing);
  if (!std::isfinite(lse)) row.hard = kNaN;
  if (f.smoothing > 0) {
    const double count = a.count + b.count;
    const double mean = (a.smooth + a.count * s_max + b.smooth + b.count * rest_max) / count;
    row.hard += f.smoothing * (lse - mean);
    row.common.smooth = row.rest.smooth = float(g * f.smoothing / count);
  }
}

void finish_soft(const Formula& f, const Sums& a, double gain, RowResult& row) {
  const double g = (1 - f.alpha) * f.temperature * gain, tau2 = f.temperature * f.temperature;
  Terms& terms = row.common;
  if (!positive(a.zs) || !positive(a.zt)) {
    row.soft = kNaN;
    return;
  }
  const double log_zs = std::log(a.zs), log_zt = std::log(a.zt);
  switch (f.divergence) {
    case Divergence::forward_kl: {
      const double finite = kLn2 * a.cross / a.zt + log_zs - log_zt;
      row.soft = has_mass(f, a.unmatched, a.t_max, a.t_top) ? kInfinity : tau2 * not_negative(finite);
      terms.student = float(g / a.zs);
      terms.teacher = float(a.zs / a.zt);
      return;
    }
    case Divergence::reverse_kl: {
      const double shift = log_zt - log_zs;
      const double finite = kLn2 * a.cross / a.zs + shift * (a.zs - a.unmatched) / a.zs;
      row.soft = has_mass(f, a.unmatched, a.s_max, a.s_top) ? kInfinity : tau2 * not_negative(finite);
      terms.slope = float(g / a.zs * kLn2);
      terms.base = float(g / a.zs * (shift - finite));
      terms.unmatched = float(g / a.zs * -finite);
      return;
    }
    case Divergence::jsd: {
      terms.shift = float((log_zt - log_zs) * kLog2E);
      terms.p_part = float(f.beta);
      terms.q_part = float((1 - f.beta) * (a.zt / a.zs));
      return;
    }
  }
}

void finish_jsd(const Formula& f, const Sums& a, const Moments& moments, double gain, RowResult& row) {
  if (row.soft != row.soft) return;  // NaN before
  const double g = (1 - f.alpha) * f.temperature * gain;
  const double p = kLn2 * moments.p / a.zt, h = (1 - f.beta) * kLn2 * moments.q / a.zs;
  row.soft = f.temperature * f.temperature * not_negative(f.beta * p + h);
  row.common.slope = float(g / a.zs * (1 - f.beta) * kLn2);
  row.common.base = float(g / a.zs * -h);
}

}  // namespace pycompress::distill_loss
