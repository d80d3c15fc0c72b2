// Elementwise functions over Vec. Include vec_avx2.h or vec_avx512.h first.
//
// Vec lives in an unnamed namespace, and so does everything here: each instruction-set file gets its own copy with
// internal linkage, so that the linker can never merge an AVX-512 copy into a path that an older CPU runs.
#pragma once

namespace pycompress {
namespace {

// exp(x), relative error below 2e-7 for x in [-87.3, 88.7]; x is clamped to that range, NaN stays NaN.
inline Vec::F vexp(Vec::F x) {
  x = Vec::min(Vec::set1(88.7f), Vec::max(Vec::set1(-87.3f), x));
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
  return Vec::mul(p, Vec::pow2(Vec::to_int(n)));
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

// x * Phi(x), with Phi(-|x|) = 0.5 erfc(z), z = |x| / sqrt 2, and erfc(z) exp(z^2) = t P(t), t = 1 / (1 + 0.44 z):
// minimax P of degree 7 over 0 <= z <= 10.5, relative error of erfc 1.9e-7. Because the small tail itself is
// approximated, negative x keep their relative accuracy, which 1 + erf(z) loses to cancellation.
inline Vec::F vgelu(Vec::F x) {
  const Vec::F z = Vec::mul(Vec::abs(x), Vec::set1(0.70710678119f));
  const Vec::F t = Vec::div(Vec::set1(1.0f), Vec::fma(z, Vec::set1(0.44f), Vec::set1(1.0f)));
  Vec::F p = Vec::set1(0.07133456319570541f);
  p = Vec::fma(p, t, Vec::set1(-0.2784329354763031f));
  p = Vec::fma(p, t, Vec::set1(0.29756611585617065f));
  p = Vec::fma(p, t, Vec::set1(-0.021034270524978638f));
  p = Vec::fma(p, t, Vec::set1(0.21629047393798828f));
  p = Vec::fma(p, t, Vec::set1(0.217159703373909f));
  p = Vec::fma(p, t, Vec::set1(0.24889737367630005f));
  p = Vec::fma(p, t, Vec::set1(0.24821914732456207f));
  const Vec::F gauss = vexp(Vec::mul(Vec::mul(x, x), Vec::set1(-0.5f)));
  const Vec::F tail = Vec::mul(Vec::mul(Vec::set1(0.5f), Vec::mul(p, t)), gauss);  // Phi(-|x|)
  return Vec::mul(x, Vec::if_negative(x, tail, Vec::sub(Vec::set1(1.0f), tail)));
}

// NaN stays NaN: max returns its second operand then.
inline Vec::F vrelu(Vec::F x) { return Vec::max(Vec::zero(), x); }

}  // namespace
}  // namespace pycompress
