// Elementwise functions over Vec. Include vec_avx2.h or vec_avx512.h first.
//
// Vec lives in an unnamed namespace, and so does everything here: each instruction-set file gets its own copy with
// internal linkage, so that the linker can never merge an AVX-512 copy into a path that an older CPU runs.
#pragma once

namespace pycompress {
namespace {

// exp(x), relative error below 2e-7 for x in [-87.3, 88.3]. Below, x is taken as -87.3; above, the result becomes
// infinity, from 89 on everywhere. NaN stays NaN.
inline Vec::F vexp(Vec::F x) {
  x = Vec::min(Vec::set1(89.0f), Vec::max(Vec::set1(-87.3f), x));
  const Vec::F n = Vec::round(Vec::mul(x, Vec::set1(1.44269504f)));
  Vec::F r = Vec::fnma(n, Vec::set1(0.693359375f), x);  // ln 2 in two parts; the first product is exact
  r = Vec::fnma(n, Vec::set1(-2.12194440e-4f), r);
  Vec::F p = Vec::set1(1.9875691500e-4f);  // Cephes expf
  p = Vec::fma(p, r, Vec::set1(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set1(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set1(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set1(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set1(5.0000001201e-1f));
  p = Vec::fma(Vec::mul(r, r), p, Vec::add(r, Vec::set1(1.0f)));
  return Vec::times_pow2(p, n);
}

// 2^y for y <= 0: relative error below 2e-7 for y >= -126, and exactly 0 below, -infinity included. NaN stays NaN.
// A minimax polynomial of degree 5 over [-1/2, 1/2] (9.1e-8), 1 at 0. For softmax: half the cost of vexp.
inline Vec::F vexp2(Vec::F y) {
  const Vec::F n = Vec::round(y);
  const Vec::F f = Vec::sub(y, n);
  Vec::F p = Vec::set1(1.326472384e-3f);
  p = Vec::fma(p, f, Vec::set1(9.671512707e-3f));
  p = Vec::fma(p, f, Vec::set1(5.550733755e-2f));
  p = Vec::fma(p, f, Vec::set1(2.402224208e-1f));
  p = Vec::fma(p, f, Vec::set1(6.931469776e-1f));
  p = Vec::fma(p, f, Vec::set1(1.0f));
  return Vec::zero_unless(Vec::not_less(y, Vec::set1(-126.0f)), Vec::times_pow2(p, n));
}

// log2(x) for positive normal x: error below 1.5e-7 max(1, |log2 x|). The polynomial is Cephes logf's, over
// [sqrt(1/2), sqrt(2)].
inline Vec::F vlog2(Vec::F x) {
  Vec::F m = Vec::mantissa(x), e = Vec::exponent(x);
  const Vec::M upper = Vec::greater(m, Vec::set1(1.41421356f));
  m = Vec::select(upper, Vec::mul(m, Vec::set1(0.5f)), m);
  e = Vec::add_where(upper, e, Vec::set1(1.0f));
  const Vec::F f = Vec::sub(m, Vec::set1(1.0f)), square = Vec::mul(f, f);
  Vec::F p = Vec::set1(7.0376836292e-2f);
  p = Vec::fma(p, f, Vec::set1(-1.1514610310e-1f));
  p = Vec::fma(p, f, Vec::set1(1.1676998740e-1f));
  p = Vec::fma(p, f, Vec::set1(-1.2420140846e-1f));
  p = Vec::fma(p, f, Vec::set1(1.4249322787e-1f));
  p = Vec::fma(p, f, Vec::set1(-1.6668057665e-1f));
  p = Vec::fma(p, f, Vec::set1(2.0000714765e-1f));
  p = Vec::fma(p, f, Vec::set1(-2.4999993993e-1f));
  p = Vec::fma(p, f, Vec::set1(3.3333331174e-1f));
  // ln m = f - f^2 / 2 + f^3 P(f)
  const Vec::F natural = Vec::add(f, Vec::mul(square, Vec::fma(p, f, Vec::set1(-0.5f))));
  return Vec::fma(natural, Vec::set1(1.44269504f), e);
}

// x / (1 + exp(-z)) = x * sigmoid(z)
inline Vec::F times_sigmoid(Vec::F x, Vec::F z) {
  return Vec::div(x, Vec::add(Vec::set1(1.0f), vexp(Vec::sub(Vec::zero(), z))));
}

inline Vec::F vsilu(Vec::F x) { return times_sigmoid(x, x); }

// 0.5 x (1 + tanh u) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
inline Vec::F vgelu_tanh(Vec::F x) {
  const Vec::F cubic = Vec::fma(Vec::mul(x, x), Vec::set1(0.044715f), Vec::set1(1.0f));
  return times_sigmoid(x, Vec::mul(Vec::mul(x, cubic), Vec::set1(1.5957691216f)));
}

// x * Phi(x) = x / 2 + |x| h(|x|), with h(a) = Phi(a) - 1/2 = a P(a^2), P a minimax polynomial in t = 2 a^2 / 5.2^2 - 1
// over 0 <= a <= 5.2, and h = 1/2 exactly beyond. The error is below 1.2e-7 |x| (torch's float32 GELU: 3.5e-7 |x|), at a
// third of the cost of the formula with exp and a division.
inline Vec::F vgelu(Vec::F x) {
  constexpr float kEnd = 5.2f;
  constexpr float kCoefficients[] = {// highest power first
                                     2.023888228e-04f, -5.622901372e-04f, 6.007630727e-04f, -9.785164148e-04f,
                                     2.662438201e-03f, -5.067367107e-03f, 8.010092191e-03f, -1.235335972e-02f,
                                     1.813392155e-02f, -2.476345003e-02f, 3.196232393e-02f, -3.992539644e-02f,
                                     5.002611130e-02f, -6.774380803e-02f, 1.359499842e-01f};
  const Vec::F a = Vec::abs(x);
  const Vec::F square = Vec::min(Vec::set1(kEnd * kEnd), Vec::mul(x, x));
  const Vec::F t = Vec::fma(square, Vec::set1(2.0f / (kEnd * kEnd)), Vec::set1(-1.0f));
  Vec::F p = Vec::set1(kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 15; ++i) p = Vec::fma(p, t, Vec::set1(kCoefficients[i]));
  const Vec::F h = Vec::min(Vec::set1(0.5f), Vec::mul(a, p));
  return Vec::fma(a, h, Vec::mul(Vec::set1(0.5f), x));
}

// NaN stays NaN: max returns its second operand then.
inline Vec::F vrelu(Vec::F x) { return Vec::max(Vec::zero(), x); }

}  // namespace
}  // namespace pycompress
