// Short rows, a row a lane: what the sweeps pay once a row (sums over lanes, logarithms, calls) is paid once for kLanes
// rows here. Include after sweeps.h.
#pragma once

#include "distill_loss/sweeps.h"

namespace pycompress::distill_loss {
namespace {

using Columns = float (*)[kLanes];  // [V][lanes]

inline F positive_or_nan(F z, F x) {
  const M good = Vec::both(Vec::greater(z, Vec::zero()), Vec::greater(Vec::set1(kInfinity), z));
  return Vec::select(good, x, Vec::set1(__builtin_nanf("")));
}

inline F not_negative(F d) { return Vec::max(Vec::zero(), d); }  // NaN stays: max returns its second operand then

// base_of for a register: -infinity becomes 0
inline F bases_of(F max) { return Vec::zero_unless(Vec::not_less(max, Vec::set1(-3.4028235e38f)), max); }

struct LaneBuffers {
  alignas(64) float s[kShortVocab][kLanes], t[kShortVocab][kLanes];    // logits, then s' and t'
  alignas(64) float es[kShortVocab][kLanes], et[kShortVocab][kLanes];  // 2^s', 2^t'
  alignas(64) float hard[kShortVocab][kLanes];                         // exp(s - s_max), with Hard::own
  alignas(64) float row[kShortVocab];
};

void to_lanes(const void* rows, int64_t stride, const ShortRows& b, Dtype dtype, float* row, Columns lanes) {
  for (int r = 0; r < b.rows; ++r) {
    const char* from = static_cast<const char*>(rows) + r * stride * dtype_size(dtype);
    if (dtype == Dtype::f32) {
      for (int64_t v = 0; v < b.vocab; ++v) std::memcpy(&lanes[v][r], from + 4 * v, 4);
    } else {
      widen(from, dtype, b.vocab, row);
      for (int64_t v = 0; v < b.vocab; ++v) lanes[v][r] = row[v];
    }
  }
  for (int64_t v = 0; v < b.vocab && b.rows < kLanes; ++v) {
    for (int r = b.rows; r < kLanes; ++r) lanes[v][r] = 0;
  }
}

void from_lanes(const Columns lanes, const ShortRows& b, Dtype dtype, float* row) {
  for (int r = 0; r < b.rows; ++r) {
    char* to = static_cast<char*>(b.grad) + r * b.vocab * dtype_size(dtype);
    if (dtype == Dtype::f32) {
      for (int64_t v = 0; v < b.vocab; ++v) std::memcpy(to + 4 * v, &lanes[v][r], 4);
    } else {
      for (int64_t v = 0; v < b.vocab; ++v) row[v] = lanes[v][r];
      narrow(row, b.vocab, dtype, to);
    }
  }
}

inline F column_maxima(const Columns lanes, int64_t vocab) {
  F max = Vec::set1(-kInfinity);
  for (int64_t v = 0; v < vocab; ++v) max = Vec::max(Vec::load(lanes[v]), max);
  return bases_of(max);
}

// sum of the powers; lanes becomes the differences, powers their powers
inline F column_powers(const Columns lanes, Columns powers, int64_t vocab, F max, float scale) {
  F sum = Vec::zero();
  for (int64_t v = 0; v < vocab; ++v) {
    const F d = Vec::mul(Vec::sub(Vec::load(lanes[v]), max), Vec::set1(scale)), e = vexp2(d);
    Vec::store(lanes[v], d);
    Vec::store(powers[v], e);
    sum = Vec::add(sum, e);
  }
  return sum;
}

inline F natural_log(F z) { return Vec::mul(vlog2(z), Vec::set1(1.0f / kLog2E)); }

// log(a / b), exactly 0 where a = b
inline F log_ratio(F a, F b) { return Vec::mul(Vec::sub(vlog2(a), vlog2(b)), Vec::set1(1.0f / kLog2E)); }

// D in nats, and its gradient from the columns:
//   forward_kl        g = gain * (es - other * et)
//   reverse_kl, jsd   g = gain * es * (x - other), x left in l.et
struct LaneSoft {
  F divergence, gain, other;
};

inline LaneSoft forward_lanes(const LaneBuffers& l, int64_t vocab, F zs, F zt, F gain) {
  F cross = Vec::zero();
  for (int64_t v = 0; v < vocab; ++v) {
    const F et = Vec::load(l.et[v]), d = Vec::sub(Vec::load(l.t[v]), Vec::load(l.s[v]));
    cross = Vec::add_where(Vec::greater(et, Vec::zero()), cross, Vec::mul(et, d));
  }
  const F logs = log_ratio(zs, zt);
  const F d = Vec::fma(Vec::div(cross, zt), Vec::set1(1.0f / kLog2E), logs);
  return {not_negative(d), Vec::div(gain, zs), Vec::div(zs, zt)};
}

// x = log q - log p, 0 where the teacher masks.
inline LaneSoft reverse_lanes(LaneBuffers& l, int64_t vocab, F zs, F zt, F gain) {
  const F shift = log_ratio(zt, zs);
  F cross = Vec::zero(), unmatched = cross;
  for (int64_t v = 0; v < vocab; ++v) {
    const F es = Vec::load(l.es[v]), d = Vec::sub(Vec::load(l.s[v]), Vec::load(l.t[v]));
    const M finite = Vec::greater(Vec::set1(kInfinity), Vec::abs(d)), mass = Vec::greater(es, Vec::zero());
    const F ratio = Vec::zero_unless(finite, Vec::fma(d, Vec::set1(1.0f / kLog2E), shift));
    cross = Vec::fma(es, ratio, cross);
    unmatched = Vec::add_where(Vec::without(mass, finite), unmatched, es);
    Vec::store(l.et[v], ratio);
  }
  const F finite = not_negative(Vec::div(cross, zs));
  const F d = Vec::select(Vec::greater(unmatched, Vec::zero()), Vec::set1(kInfinity), finite);
  return {d, Vec::div(gain, zs), Vec::div(cross, zs)};
}

// x = (1 - beta) log(q / m), 0 where q is.
inline LaneSoft jsd_lanes(LaneBuffers& l, int64_t vocab, F zs, F zt, F gain, float beta) {
  // As in Terms: relative to zt.
  const F p_part = Vec::set1(beta), q_part = Vec::mul(Vec::set1(1 - beta), Vec::div(zt, zs));
  const F shift = Vec::sub(vlog2(zt), vlog2(zs));
  F p_sum = Vec::zero(), h_sum = p_sum;
  for (int64_t v = 0; v < vocab; ++v) {
    const F es = Vec::load(l.es[v]), et = Vec::load(l.et[v]);
    const F log2_m = log2_mixed(p_part, q_part, es, et);
    const F q_ratio = Vec::sub(Vec::add(Vec::load(l.s[v]), shift), log2_m);
    const F p_ratio = Vec::sub(Vec::load(l.t[v]), log2_m);
    p_sum = Vec::add_where(Vec::greater(et, Vec::zero()), p_sum, Vec::mul(et, p_ratio));
    const F h = Vec::zero_unless(Vec::greater(es, Vec::zero()), Vec::mul(q_ratio, Vec::set1((1 - beta) / kLog2E)));
    h_sum = Vec::fma(es, h, h_sum);
    Vec::store(l.et[v], h);
  }
  const F h_mean = Vec::div(h_sum, zs);
  const F d = Vec::fma(Vec::div(p_sum, zt), Vec::set1(beta / kLog2E), h_mean);
  return {not_negative(d), Vec::div(gain, zs), h_mean};
}

// The gradient, into l.es.
template <Soft S, Hard H>
void gradient_lanes(const Sweep& sweep, LaneBuffers& l, int64_t vocab, F hard_gain, const LaneSoft& soft) {
  for (int64_t v = 0; v < vocab; ++v) {
    const F es = Vec::load(l.es[v]);
    F g = Vec::zero();
    if constexpr (S == Soft::forward_kl) g = Vec::mul(soft.gain, Vec::fnma(Vec::load(l.et[v]), soft.other, es));
    if constexpr (S == Soft::reverse_kl || S == Soft::jsd) {
      g = Vec::mul(Vec::mul(es, soft.gain), Vec::sub(Vec::load(l.et[v]), soft.other));
    }
    if constexpr (H == Hard::power) g = Vec::fma(power_of(sweep, es), hard_gain, g);
    if constexpr (H == Hard::own) g = Vec::fma(Vec::load(l.hard[v]), hard_gain, g);
    Vec::store(l.es[v], g);
  }
}

// sum exp(s - s_max)
template <Hard H>
F hard_sum(const Sweep& sweep, LaneBuffers& l, int64_t vocab) {
  F z1 = Vec::zero();
  for (int64_t v = 0; v < vocab; ++v) {
    if constexpr (H == Hard::own) {
      const F e = vexp2(Vec::mul(Vec::load(l.s[v]), Vec::set1(kLog2E / sweep.scale)));  // s' / scale = s - s_max
      Vec::store(l.hard[v], e);
      z1 = Vec::add(z1, e);
    } else {
      z1 = Vec::add(z1, power_of(sweep, Vec::load(l.es[v])));
    }
  }
  return z1;
}

template <Soft S, Hard H>
void short_rows_as(const Sweep& sweep, const ShortRows& b) {
  LaneBuffers l;
  alignas(64) float label[kLanes] = {};
  const int64_t vocab = b.vocab;
  F hard_gain = Vec::zero();
  LaneSoft soft{hard_gain, hard_gain, hard_gain};
  to_lanes(b.s, b.s_stride, b, sweep.dtype, l.row, l.s);
  for (int r = 0; r < b.rows && H != Hard::none; ++r) label[r] = l.s[b.label[r]][r];
  const F s_max = column_maxima(l.s, vocab);
  const F zs = column_powers(l.s, l.es, vocab, s_max, sweep.scale);
  if constexpr (H != Hard::none) {
    const F z1 = hard_sum<H>(sweep, l, vocab);
    Vec::store(b.hard, positive_or_nan(z1, Vec::add(natural_log(z1), Vec::sub(s_max, Vec::load(label)))));
    hard_gain = Vec::div(Vec::load(b.hard_gain), z1);
  }
  if constexpr (S != Soft::student_only) {
    to_lanes(b.t, b.t_stride, b, sweep.dtype, l.row, l.t);
    const F zt = column_powers(l.t, l.et, vocab, column_maxima(l.t, vocab), sweep.scale);
    const F gain = Vec::load(b.soft_gain);
    if constexpr (S == Soft::forward_kl) soft = forward_lanes(l, vocab, zs, zt, gain);
    if constexpr (S == Soft::reverse_kl) soft = reverse_lanes(l, vocab, zs, zt, gain);
    if constexpr (S == Soft::jsd) soft = jsd_lanes(l, vocab, zs, zt, gain, sweep.beta);
    Vec::store(b.divergence, positive_or_nan(zs, positive_or_nan(zt, soft.divergence)));
  }
  if (b.grad == nullptr) return;
  gradient_lanes<S, H>(sweep, l, vocab, hard_gain, soft);
  for (int r = 0; r < b.rows && H != Hard::none; ++r) l.es[b.label[r]][r] -= b.hard_gain[r];
  from_lanes(l.es, b, sweep.dtype, l.row);
}

void short_rows(const Sweep& sweep, const ShortRows& b) {
  pick_soft<Dtype::f32>(sweep, [&](auto, auto soft, auto hard) { short_rows_as<soft.value, hard.value>(sweep, b); });
}

}  // namespace
}  // namespace pycompress::distill_loss
