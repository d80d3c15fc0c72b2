// The sweeps over a chunk, written once over Vec. Include vec_avx2.h or vec_avx512.h first; everything is in an unnamed
// namespace, as vec_math.h explains. Start with `sums`; the others have the same shape.
#pragma once

#include "common/vec_math.h"
#include "distill_loss/distill_loss.h"

namespace pycompress::distill_loss {
namespace {

using F = Vec::F;
using M = Vec::M;
constexpr int kLanes = Vec::kLanes;
constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = __builtin_inff();
constexpr float kSmallest = 1.17549435e-38f;  // FLT_MIN

// GCC would call the body of a loop that it also finds in the tail.
#define PYCOMPRESS_INLINE inline __attribute__((always_inline))
#define PYCOMPRESS_INLINE_LAMBDA __attribute__((always_inline))

template <Dtype D>
constexpr int kSize = D == Dtype::f32 ? 4 : 2;

template <Dtype D>
const char* at(const void* base, int64_t i) {
  return static_cast<const char*>(base) + i * kSize<D>;
}

// body(s, t, i, count) for every register of the chunk, the last one filled up with -infinity, which has no mass; t
// repeats s where there is no teacher.
template <Dtype D, bool TEACHER, class Body>
PYCOMPRESS_INLINE void for_each(const void* s, const void* t, int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F sv = Vec::load_as<D>(at<D>(s, i));
    body(sv, TEACHER ? Vec::load_as<D>(at<D>(t, i)) : sv, i, kLanes);
  }
  if (i == n) return;
  const int rest = int(n - i);
  const F sv = Vec::load_first<D>(at<D>(s, i), rest);
  body(sv, TEACHER ? Vec::load_first<D>(at<D>(t, i), rest) : sv, i, rest);
}

// Two running maxima each, so that the loop does not wait for the latency of one. NaN is passed over: the sums see it.
template <Dtype D, bool TEACHER>
void maxima(const void* s, const void* t, int64_t n, float& s_max, float& t_max) {
  F s0 = Vec::set1(s_max), s1 = s0, t0 = Vec::set1(t_max), t1 = t0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    s0 = Vec::max(Vec::load_as<D>(at<D>(s, i)), s0);
    s1 = Vec::max(Vec::load_as<D>(at<D>(s, i + kLanes)), s1);
    if constexpr (TEACHER) {
      t0 = Vec::max(Vec::load_as<D>(at<D>(t, i)), t0);
      t1 = Vec::max(Vec::load_as<D>(at<D>(t, i + kLanes)), t1);
    }
  }
  for_each<D, TEACHER>(at<D>(s, i), TEACHER ? at<D>(t, i) : nullptr, n - i,
                       [&](F sv, F tv, int64_t, int) PYCOMPRESS_INLINE_LAMBDA {
                         s0 = Vec::max(sv, s0);
                         if constexpr (TEACHER) t0 = Vec::max(tv, t0);
                       });
  s_max = Vec::largest(Vec::max(s0, s1));
  t_max = Vec::largest(Vec::max(t0, t1));
}

// Nothing but -infinity so far: relative to 0 its powers are 0, relative to itself they would be NaN.
inline float base_of(float max) { return max == -kInfinity ? 0 : max; }

// es^tau, for tau = 1, 2, 4
PYCOMPRESS_INLINE F power_of(const Sweep& sweep, F es) {
  if (sweep.squarings > 0) es = Vec::mul(es, es);
  if (sweep.squarings > 1) es = Vec::mul(es, es);
  return es;
}

// exp(s - s_max) of the hard term
template <Hard H>
PYCOMPRESS_INLINE F hard_exp(const Sweep& sweep, F es, F sv, F s_max) {
  if constexpr (H == Hard::own) return vexp2(Vec::mul(Vec::sub(sv, s_max), Vec::set1(kLog2E)));
  return power_of(sweep, es);
}

// Powers of up to 2^kHeadroom are summed before the reference is moved: a maximum that is known beforehand would cost a
// sweep of its own.
constexpr float kHeadroom = 40;
constexpr int64_t kProbe = 256;  // classes that the first reference of a row is taken from

// s_ref, t_ref: what the powers are relative to. CAREFUL: infinities may meet each other. Returns the maxima.
template <Dtype D, Soft S, Hard H, bool CAREFUL>
void sums_from(const Sweep& sweep, const void* s, const void* t, int64_t n, float s_from, float t_from, Sums& out) {
  constexpr bool kTeacher = S != Soft::student_only;
  const F s_ref = Vec::set1(s_from), t_ref = Vec::set1(t_from), scale = Vec::set1(sweep.scale);
  const F infinity = Vec::set1(kInfinity), lowest = Vec::set1(-kInfinity);
  F zs = Vec::zero(), z1 = zs, zt = zs, cross = zs, unmatched = zs, smooth = zs, count = zs;
  F s_top = lowest, t_top = lowest;
  const bool smoothing = sweep.smoothing;
  for_each<D, kTeacher>(s, t, n, [&](F sv, F tv, int64_t i, int lanes) PYCOMPRESS_INLINE_LAMBDA {
    // The loop is long enough for the next chunk, or the next row, to arrive meanwhile. A prefetch cannot fault.
    __builtin_prefetch(at<D>(s, i + kChunk), 0, 2);
    if constexpr (kTeacher) __builtin_prefetch(at<D>(t, i + kChunk), 0, 2);
    s_top = Vec::max(sv, s_top);
    const F s2 = Vec::mul(Vec::sub(sv, s_ref), scale), es = vexp2(s2);
    zs = Vec::add(zs, es);
    if constexpr (H != Hard::none) z1 = Vec::add(z1, hard_exp<H>(sweep, es, sv, s_ref));
    if constexpr (H == Hard::own) {
      if (smoothing) {
        const M in = Vec::greater(sv, lowest);
        smooth = Vec::add_where(in, smooth, Vec::sub(sv, s_ref));
        count = Vec::add_where(in, count, Vec::set1(1));
      }
    }
    if constexpr (kTeacher) {
      t_top = Vec::max(tv, t_top);
      const F t2 = Vec::mul(Vec::sub(tv, t_ref), scale), et = vexp2(t2);
      zt = Vec::add(zt, et);
      const F weight = S == Soft::reverse_kl ? es : et;
      const F d = S == Soft::reverse_kl ? Vec::sub(s2, t2) : Vec::sub(t2, s2);
      if (CAREFUL || lanes < kLanes) {  // what fills the last register is -infinity in both
        const M matched = Vec::greater(infinity, Vec::abs(d)), mass = Vec::greater(weight, Vec::zero());
        cross = Vec::add_where(matched, cross, Vec::mul(weight, d));
        unmatched = Vec::add_where(Vec::without(mass, matched), unmatched, weight);
      } else {
        cross = Vec::fma(weight, d, cross);
      }
    }
  });
  out.s_top = Vec::largest(s_top);
  out.t_top = Vec::largest(t_top);
  out.s_max = out.s_top == -kInfinity ? -kInfinity : s_from;
  out.t_max = out.t_top == -kInfinity ? -kInfinity : t_from;
  out.zs = Vec::sum(zs);
  out.z1 = Vec::sum(z1);
  out.zt = Vec::sum(zt);
  out.cross = Vec::sum(cross);
  out.unmatched = Vec::sum(unmatched);
  out.smooth = Vec::sum(smooth);
  out.count = Vec::sum(count);
}

template <Dtype D, Soft S, Hard H>
void sums(const Sweep& sweep, const void* s, const void* t, int64_t n, float s_floor, float t_floor, Sums& out) {
  constexpr bool kTeacher = S != Soft::student_only;
  if (s_floor == -kInfinity || (kTeacher && t_floor == -kInfinity)) {
    const int64_t probe = n < kProbe ? n : kProbe;
    maxima<D, kTeacher>(s, t, probe, s_floor, t_floor);
    const bool found = s_floor > -kInfinity && (!kTeacher || t_floor > -kInfinity);
    if (!found) maxima<D, kTeacher>(s, t, n, s_floor, t_floor);
  }
  sums_from<D, S, H, false>(sweep, s, t, n, base_of(s_floor), base_of(t_floor), out);
  // In bits, of the soft and of the hard term's powers.
  const float steepest = H != Hard::none && sweep.scale < kLog2E ? kLog2E : sweep.scale;
  const bool moved = !((out.s_top - base_of(s_floor)) * steepest <= kHeadroom) ||
                     (kTeacher && !((out.t_top - base_of(t_floor)) * sweep.scale <= kHeadroom));
  const bool clash = kTeacher && !(__builtin_fabs(out.cross) < double(kInfinity));
  if (!moved && !clash) return;
  s_floor = out.s_top > s_floor ? out.s_top : s_floor;
  t_floor = out.t_top > t_floor ? out.t_top : t_floor;
  sums_from<D, S, H, true>(sweep, s, t, n, base_of(s_floor), base_of(t_floor), out);
}

// Underflow to m = 0 needs p = q = 0, where the result is dropped.
PYCOMPRESS_INLINE F log2_mixed(F p_part, F q_part, F es, F et) {
  return vlog2(Vec::max(Vec::set1(kSmallest), Vec::fma(et, p_part, Vec::mul(es, q_part))));
}

// q: log2 q - log2 m. p: log2 p - log2 m.
struct Ratios {
  F es, et, q, p;
};

PYCOMPRESS_INLINE Ratios jsd_ratios(const Terms& terms, F s2, F t2) {
  Ratios r;
  r.es = vexp2(s2);
  r.et = vexp2(t2);
  const F log2_m = log2_mixed(Vec::set1(terms.p_part), Vec::set1(terms.q_part), r.es, r.et);
  r.q = Vec::sub(Vec::add(s2, Vec::set1(terms.shift)), log2_m);
  r.p = Vec::sub(t2, log2_m);
  return r;
}

template <Dtype D>
void moments(const Sweep& sweep, const void* s, const void* t, int64_t n, const Terms& terms, Moments& out) {
  const F s_max = Vec::set1(terms.s_max), t_max = Vec::set1(terms.t_max), scale = Vec::set1(sweep.scale);
  F p = Vec::zero(), q = p;
  for_each<D, true>(s, t, n, [&](F sv, F tv, int64_t, int) PYCOMPRESS_INLINE_LAMBDA {
    const Ratios r = jsd_ratios(terms, Vec::mul(Vec::sub(sv, s_max), scale), Vec::mul(Vec::sub(tv, t_max), scale));
    q = Vec::add_where(Vec::greater(r.es, Vec::zero()), q, Vec::mul(r.es, r.q));
    p = Vec::add_where(Vec::greater(r.et, Vec::zero()), p, Vec::mul(r.et, r.p));
  });
  out.p = Vec::sum(p);
  out.q = Vec::sum(q);
}

template <Dtype D, Soft S, Hard H>
PYCOMPRESS_INLINE F gradient_of(const Sweep& sweep, const Terms& terms, F sv, F tv) {
  const F s_max = Vec::set1(terms.s_max), scale = Vec::set1(sweep.scale);
  const F s2 = Vec::mul(Vec::sub(sv, s_max), scale);
  F es, g;
  if constexpr (S == Soft::jsd) {
    const Ratios r = jsd_ratios(terms, s2, Vec::mul(Vec::sub(tv, Vec::set1(terms.t_max)), scale));
    es = r.es;
    g = Vec::mul(es, Vec::fma(Vec::set1(terms.slope), r.q, Vec::set1(terms.base)));
    g = Vec::zero_unless(Vec::not_less(es, Vec::set1(kSmallest)), g);  // 0 * infinity where es is 0; NaN is kept
  } else {
    es = vexp2(s2);
    if constexpr (S == Soft::reverse_kl) {
      const F d = Vec::sub(s2, Vec::mul(Vec::sub(tv, Vec::set1(terms.t_max)), scale));
      const F bracket = Vec::fma(Vec::set1(terms.slope), d, Vec::set1(terms.base));
      const M finite = Vec::greater(Vec::set1(kInfinity), Vec::abs(d));
      g = Vec::mul(es, Vec::select(finite, bracket, Vec::set1(terms.unmatched)));
    } else {
      g = es;
      if constexpr (S == Soft::forward_kl) {
        const F et = vexp2(Vec::mul(Vec::sub(tv, Vec::set1(terms.t_max)), scale));
        g = Vec::fnma(et, Vec::set1(terms.teacher), g);
      }
      g = Vec::mul(g, Vec::set1(terms.student));
    }
  }
  if constexpr (H != Hard::none) g = Vec::fma(hard_exp<H>(sweep, es, sv, s_max), Vec::set1(terms.hard), g);
  if constexpr (H == Hard::own) {
    if (sweep.smoothing) {
      g = Vec::add_where(Vec::greater(sv, Vec::set1(-kInfinity)), g, Vec::set1(-terms.smooth));
    }
  }
  return g;
}

template <Dtype D, Soft S, Hard H>
void gradient(const Sweep& sweep, const void* s, const void* t, int64_t n, const Terms& terms, void* grad,
              bool stream) {
  constexpr bool kTeacher = S != Soft::student_only;
  // Copies that the stores to grad cannot change, so that they stay in registers.
  const Terms row = terms;
  const Sweep how = sweep;
  const auto one = [&](F sv, F tv, int64_t i, int count) PYCOMPRESS_INLINE_LAMBDA {
    const F g = gradient_of<D, S, H>(how, row, sv, tv);
    char* to = static_cast<char*>(grad) + i * kSize<D>;
    count == kLanes ? Vec::store_as<D>(to, g) : Vec::store_as<D>(to, g, count);
  };
  if (!stream) {
    for_each<D, kTeacher>(s, t, n, one);
    return;
  }
  // A streaming store is aligned to its size: the classes before and behind go through the cache.
  constexpr int kBytes = kLanes * kSize<D>;
  const int64_t head = (kBytes - reinterpret_cast<uintptr_t>(grad) % kBytes) % kBytes / kSize<D>;
  const int64_t first = head < n ? head : n, body = (n - first) / kLanes * kLanes;
  const auto shifted = [&](int64_t from, int64_t count) {
    for_each<D, kTeacher>(at<D>(s, from), kTeacher ? at<D>(t, from) : nullptr, count,
                          [&](F sv, F tv, int64_t i, int lanes)
                              PYCOMPRESS_INLINE_LAMBDA { one(sv, tv, from + i, lanes); });
  };
  shifted(0, first);
  for (int64_t i = first; i < first + body; i += kLanes) {
    const F sv = Vec::load_as<D>(at<D>(s, i));
    const F g = gradient_of<D, S, H>(how, row, sv, kTeacher ? Vec::load_as<D>(at<D>(t, i)) : sv);
    Vec::stream_as<D>(static_cast<char*>(grad) + i * kSize<D>, g);
  }
  shifted(first + body, n - first - body);
}

// ---- from the values of a Sweep to the instantiation ---------------------------------------------------------------

// found(constant<dtype>, constant<soft>, constant<hard>)
template <auto V>
struct Constant {
  static constexpr auto value = V;
};

template <Dtype D, Soft S, class Found>
void pick_hard(const Sweep& sweep, const Found& found) {
  switch (sweep.hard) {
    case Hard::none: return found(Constant<D>{}, Constant<S>{}, Constant<Hard::none>{});
    case Hard::power: return found(Constant<D>{}, Constant<S>{}, Constant<Hard::power>{});
    case Hard::own: return found(Constant<D>{}, Constant<S>{}, Constant<Hard::own>{});
  }
}

template <Dtype D, class Found>
void pick_soft(const Sweep& sweep, const Found& found) {
  switch (sweep.soft) {
    case Soft::forward_kl: return pick_hard<D, Soft::forward_kl>(sweep, found);
    case Soft::reverse_kl: return pick_hard<D, Soft::reverse_kl>(sweep, found);
    case Soft::jsd: return pick_hard<D, Soft::jsd>(sweep, found);
    case Soft::student_only: return pick_hard<D, Soft::student_only>(sweep, found);
  }
}

template <class Found>
void pick(const Sweep& sweep, const Found& found) {
  switch (sweep.dtype) {
    case Dtype::f32: return pick_soft<Dtype::f32>(sweep, found);
    case Dtype::bf16: return pick_soft<Dtype::bf16>(sweep, found);
    case Dtype::f16: return pick_soft<Dtype::f16>(sweep, found);
  }
}

void any_sums(const Sweep& sweep, const void* s, const void* t, int64_t n, float s_floor, float t_floor, Sums& out) {
  pick(sweep, [&](auto d, auto soft, auto hard) {
    constexpr Soft kSoft = soft.value == Soft::jsd ? Soft::forward_kl : soft.value;  // jsd needs the same sums
    sums<d.value, kSoft, hard.value>(sweep, s, t, n, s_floor, t_floor, out);
  });
}

void any_moments(const Sweep& sweep, const void* s, const void* t, int64_t n, const Terms& terms, Moments& out) {
  switch (sweep.dtype) {
    case Dtype::f32: return moments<Dtype::f32>(sweep, s, t, n, terms, out);
    case Dtype::bf16: return moments<Dtype::bf16>(sweep, s, t, n, terms, out);
    case Dtype::f16: return moments<Dtype::f16>(sweep, s, t, n, terms, out);
  }
}

void any_gradient(const Sweep& sweep, const void* s, const void* t, int64_t n, const Terms& terms, void* grad,
                  bool stream) {
  pick(sweep, [&](auto d, auto soft, auto hard) {
    gradient<d.value, soft.value, hard.value>(sweep, s, t, n, terms, grad, stream);
  });
}

template <Dtype D>
void widen_as(const void* from, int64_t n, float* to) {
  for_each<D, false>(from, nullptr, n, [&](F v, F, int64_t i, int count) {
    count == kLanes ? Vec::store(to + i, v) : Vec::store_as<Dtype::f32>(to + i, v, count);
  });
}

void widen(const void* from, Dtype dtype, int64_t n, float* to) {
  switch (dtype) {
    case Dtype::f32: return widen_as<Dtype::f32>(from, n, to);
    case Dtype::bf16: return widen_as<Dtype::bf16>(from, n, to);
    case Dtype::f16: return widen_as<Dtype::f16>(from, n, to);
  }
}

template <Dtype D>
void narrow_as(const float* from, int64_t n, void* to) {
  for_each<Dtype::f32, false>(from, nullptr, n, [&](F v, F, int64_t i, int count) {
    char* p = static_cast<char*>(to) + i * kSize<D>;
    count == kLanes ? Vec::store_as<D>(p, v) : Vec::store_as<D>(p, v, count);
  });
}

void narrow(const float* from, int64_t n, Dtype dtype, void* to) {
  switch (dtype) {
    case Dtype::f32: return narrow_as<Dtype::f32>(from, n, to);
    case Dtype::bf16: return narrow_as<Dtype::bf16>(from, n, to);
    case Dtype::f16: return narrow_as<Dtype::f16>(from, n, to);
  }
}

}  // namespace
}  // namespace pycompress::distill_loss
