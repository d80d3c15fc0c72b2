// CUDA's functions on the CPU: the 16-bit formats over all their values, bits, conversions, exp2_fast.
#include <cmath>
#include <limits>

#include "check.h"
#include "faults.h"

namespace emulator_tests {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Every value there and back; half way between neighbours goes to the even one, a little more or less to the nearer.
template <class T, class FromBits, class ToBits>
void test_format(FromBits from_bits, ToBits to_bits, uint16_t infinity) {
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1);
    const float x = static_cast<float>(from_bits(low));
    CHECK(to_bits(T(x)) == low);
    CHECK(to_bits(T(-x)) == (low | 0x8000));
    if (high == infinity) continue;
    const auto half_way = static_cast<float>((double{x} + static_cast<float>(from_bits(high))) / 2);
    CHECK(to_bits(T(half_way)) == (bits % 2 == 0 ? low : high));
    CHECK(to_bits(T(std::nextafter(half_way, kInf))) == high);
    CHECK(to_bits(T(-std::nextafter(half_way, 0.0f))) == (low | 0x8000));
  }
  CHECK(to_bits(T(kInf)) == infinity);
  CHECK(to_bits(T(-kInf)) == (infinity | 0x8000));
  CHECK(static_cast<float>(from_bits(infinity)) == kInf);
  CHECK(to_bits(T(std::numeric_limits<float>::max())) == infinity);
  CHECK(to_bits(T(std::numeric_limits<float>::quiet_NaN())) == 0x7fff);
  CHECK(std::isnan(static_cast<float>(from_bits(static_cast<uint16_t>(infinity + 1)))));
}

void test_formats() {
  test_format<__half>(__ushort_as_half, __half_as_ushort, 0x7c00);
  test_format<__nv_bfloat16>(__ushort_as_bfloat16, __bfloat16_as_ushort, 0x7f80);
  CHECK(__half_as_ushort(__float2half_rn(65519.0f)) == 0x7bff);  // the largest
  CHECK(__half_as_ushort(__float2half_rn(65520.0f)) == 0x7c00);
  CHECK(__half_as_ushort(__float2half_rn(0x1p-25f)) == 0);
  CHECK(__half_as_ushort(__float2half_rn(0x1.000002p-25f)) == 1);
  CHECK(__half2float(__ushort_as_half(1)) == 0x1p-24f);
  const float2 two = __bfloat1622float2(__float22bfloat162_rn(make_float2(1.5f, -2.0f)));
  CHECK(two.x == 1.5f && two.y == -2.0f);
  const __half2 pair = __floats2half2_rn(3.0f, 4.0f);
  CHECK(__low2float(pair) == 3.0f && __high2float(pair) == 4.0f);
}

void test_bits() {
  CHECK(__popc(0xf0f0u) == 8 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31 && __clz(0) == 32);
  CHECK(__brev(1) == 0x80000000u && __brev(0x0000f0f0u) == 0x0f0f0000u);
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7410) == 0x77441100u);
  CHECK(__byte_perm(0x00800080u, 0, 0x9888) == 0x00ffffffu);
  CHECK(__funnelshift_l(0x89abcdefu, 0x01234567u, 8) == 0x23456789u);
  CHECK(__funnelshift_r(0x89abcdefu, 0x01234567u, 8) == 0x6789abcdu);
  CHECK(__funnelshift_l(1, 2, 0) == 2 && __funnelshift_r(1, 2, 0) == 1);
  CHECK(__umulhi(0x80000000u, 6) == 3 && __mulhi(-1, 1) == -1);
}

void test_integers() {
  CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 && __float2int_rn(-2.5f) == -2);
  CHECK(__float2int_rn(3e9f) == 2147483647 && __float2int_rn(-kInf) == -2147483647 - 1);
  CHECK(__float2int_rn(std::nanf("")) == 0 && __float2int_rz(-1.9f) == -1);
  CHECK(pycompress::cuda::dp4a(0x7f80ff01u, 0x7f800203u, 10) == 10 + 127 * 127 + 128 * 128 - 2 + 3);
  CHECK(pycompress::cuda::dp4a(0x01010101u, 0x01010101u, 2147483647) == -2147483647 - 1 + 3);
  CHECK(max(3u, 5) == 5u && min(-1, 2) == -1);
  CHECK(max(1.0f, std::nanf("")) == 1.0f && max(std::nanf(""), 1.0f) == 1.0f && min(std::nanf(""), 1.0f) == 1.0f);
}

void test_exp2() {
  using pycompress::cuda::exp2_fast;
  bool ever_off = false;
  for (int i = -126 * 64; i < 127 * 64; ++i) {
    const float x = static_cast<float>(i) / 64 + 0.001f, near = exp2_fast(x);
    const auto exact = static_cast<double>(std::exp2(double{x}));
    const double ulp = std::nextafter(static_cast<float>(exact), kInf) - static_cast<float>(exact);
    CHECK(std::fabs(near - exact) <= 2.51 * ulp);
    ever_off = ever_off || std::fabs(near - exact) > ulp;
    CHECK(near == exp2_fast(x));
  }
  CHECK(ever_off);
  CHECK(exp2_fast(0.0f) == 1.0f && exp2_fast(-kInf) == 0.0f && exp2_fast(kInf) == kInf);
  CHECK(exp2_fast(-126.5f) == 0.0f && exp2_fast(-1000.0f) == 0.0f && std::isnan(exp2_fast(std::nanf(""))));
}

}  // namespace

void test_arithmetic() {
  test_formats();
  test_bits();
  test_integers();
  test_exp2();
}

}  // namespace emulator_tests
