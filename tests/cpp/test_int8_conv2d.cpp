// Every kernel that this CPU has, against the formula of int8_conv2d.h in float64. `make cpp-test` runs it under the
// address and undefined-behaviour sanitizers, and so x, y and the weights have exactly the size that the contract asks
// for: one element read or written beyond them stops the test. What lies between strided elements of x is NaN.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "int8_conv2d_problem.h"

namespace {

int failures = 0;

// ---- comparing -------------------------------------------------------------------------------------------------

void fail(const Case& c, const char* isa, const std::string& detail) {
  std::printf(
      "FAILED %s: N=%lld C=%lld %lldx%lld O=%lld kernel %lldx%lld groups=%lld mode=%d dtype=%d last=%d threads=%d: "
      "%s\n",
      isa, (long long)c.n, (long long)c.c, (long long)c.h, (long long)c.w, (long long)c.out, (long long)c.kh,
      (long long)c.kw, (long long)c.groups, int(c.mode), int(c.dtype), c.channels_last, c.threads, detail.c_str());
  ++failures;
}

void compare(const Problem& p, const char* isa, const Exact& y, int64_t bad_image = -1) {
  const Case& c = p.c;
  const int64_t pixels = c.out_h() * c.out_w();
  const double roundoff = c.dtype == Dtype::f32 ? 0 : (c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11);
  for (int64_t i = 0; i < c.y_count(); ++i) {
    const int64_t n = i / (c.out * pixels), o = i / pixels % c.out, pixel = i % pixels;
    const float got = pc::load_float(y.data(), c.channels_last ? (n * pixels + pixel) * c.out + o : i, c.dtype);
    const double expected = p.expected[size_t(i)], size = std::fabs(expected);
    const double allowed = 0x1p-24 * 8 * (p.magnitude[size_t(i)] + size) + 2 * roundoff * size + 0x1p-24;
    if (n == bad_image ? !std::isnan(got) : !(std::fabs(got - expected) <= allowed)) {
      return fail(c, isa,
                  "y[" + std::to_string(i) + "] = " + std::to_string(got) + ", expected " +
                      (n == bad_image ? "NaN" : std::to_string(expected)));
    }
  }
}

void test_case(const Problem& p, const std::vector<std::string>& isas, int64_t bad_image = -1) {
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    const cv::Layout& layout = cv::best_kernel().layout;
    Exact packed(cv::packed_bytes(layout, p.shape())), y(p.c.y_count() * pc::dtype_size(p.c.dtype));
    cv::pack(layout, p.weight.data(), p.shape(), packed.data());
    std::vector<int8_t> back(p.weight.size());
    cv::unpack(cv::open_packed(packed.data(), packed.bytes()), back.data());
    if (back != p.weight) fail(p.c, isa.c_str(), "unpack is not what was packed");
    cv::run(p.args(y.data()), cv::prepare(packed.data(), packed.bytes()));
    compare(p, isa.c_str(), y, bad_image);
  }
}

// ---- cases -----------------------------------------------------------------------------------------------------

// Options are dealt in turn, each with a period of its own, so that they meet each other.
void deal(Case& c, int64_t turn) {
  c.mode = Mode(turn % 2);
  c.dtype = Dtype(turn / 2 % 3);
  c.activation = Activation(turn % 5);
  c.bias = int(turn % 4) - 1;
  c.channels_last = turn % 3 == 1;
  c.gaps = turn % 7 >= 4;
  c.threads = turn % 11 == 10 ? 3 : 1;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  int64_t turn = 0;
  for (int64_t channels : {1, 2, 3, 4, 5, 16, 33, 64, 70}) {
    for (int64_t out : {1, 7, 16, 17, 40, 64, 65, 130}) {
      Case c{2, channels, 5, 6, out, 1 + turn % 3, 1 + turn / 3 % 3};
      c.pad_top = turn % 3;
      c.pad_left = turn % 2;
      c.pad_right = turn % 4;
      deal(c, turn++);
      cases.push_back(c);
    }
  }
  for (int64_t stride = 1; stride <= 3; ++stride) {
    for (int64_t dilation = 1; dilation <= 3; ++dilation) {
      for (int64_t pad = 0; pad <= 4; ++pad) {
        for (int64_t kernel : {1, 3}) {
          Case c{1, 6, 11, 13, 5, kernel, kernel, stride, 4 - stride, pad, 4 - pad, pad, pad, dilation, 4 - dilation};
          deal(c, turn++);
          cases.push_back(c);
        }
      }
    }
  }
  for (int64_t groups : {2, 3, 12}) {
    for (int i = 0; i < 8; ++i) {
      Case c{2, 12, 7, 7, groups == 3 ? 9 : 24, 3, 2, 1 + i % 2, 1, 1, 1, 0, 1, 1, 1 + i / 2 % 2, groups};
      deal(c, turn++);
      cases.push_back(c);
    }
  }
  for (int64_t size : {1, 7, 8, 9, 14, 20}) {  // blocks of outputs and their remainders
    Case c{3, 8, size, size, 20, 1, 1};
    deal(c, turn++);
    cases.push_back(c);
  }
  return cases;
}

std::vector<Case> large_cases() {
  std::vector<Case> cases;
  for (int turn = 0; turn < 8; ++turn) {  // enough work for threads: alone, together, in more than one wave
    Case c{1 + 2 * (turn % 4), 64, 12, 12, 96, 3, 3, 1, 1, 1, 1, 1, 1};
    deal(c, turn);
    c.threads = 2 + turn / 4;
    cases.push_back(c);
  }
  Case wide{2, 32, 300, 260, 8, 1, 1};  // an image that threads share: above kSoloBytes
  wide.threads = 2;
  cases.push_back(wide);
  for (Mode mode : {Mode::dynamic_, Mode::static_}) {
    Case edge{1, 7272, 3, 3, 3, 3, 3};  // 65448 terms, all at their extremes
    edge.mode = mode;
    edge.extreme = true;
    cases.push_back(edge);
  }
  return cases;
}

std::vector<Case> empty_cases() {
  std::vector<Case> cases;
  cases.push_back({0, 3, 4, 4, 5, 3, 3});
  cases.push_back({2, 3, 4, 4, 0, 3, 3});
  cases.push_back({2, 0, 4, 4, 5, 3, 3});
  Case only_padding{2, 3, 0, 4, 5, 3, 3};
  only_padding.pad_top = only_padding.pad_bottom = 2;
  cases.push_back(only_padding);
  return cases;
}

void test_bad_images(const std::vector<std::string>& isas) {
  for (int turn = 0; turn < 12; ++turn) {
    Case c{4, 9, 6, 6, 20, 1, 1, 2, 2};  // an image is bad even where no window reads the value
    deal(c, turn);
    Problem p(c);
    const float bad = turn % 3 == 0 ? NAN : turn % 3 == 1 ? INFINITY : -INFINITY;
    pc::store_float(p.x.data(), p.at(1, 8, turn % 2, 3), c.dtype, bad);
    test_case(p, isas, 1);
  }
}

// ---- errors ----------------------------------------------------------------------------------------------------

void expect_error(const char* name, const std::string& message, const std::function<void()>& call) {
  try {
    call();
  } catch (const pc::ArgumentError& error) {
    if (std::string(error.what()).find(message) != std::string::npos) return;
    std::printf("FAILED %s: '%s' does not say '%s'\n", name, error.what(), message.c_str());
    ++failures;
    return;
  }
  std::printf("FAILED %s: no error\n", name);
  ++failures;
}

void test_errors() {
  const Problem p({2, 6, 5, 5, 8, 3, 3});
  const cv::Layout& layout = cv::best_kernel().layout;
  const int64_t bytes = cv::packed_bytes(layout, p.shape());
  Exact packed(bytes), y(p.c.y_count() * 4);
  cv::pack(layout, p.weight.data(), p.shape(), packed.data());
  for (int64_t i = 0; i < 2 * int64_t(sizeof(cv::PackedHeader)); ++i) {  // its header, and the first group's
    for (int bit = 0; bit < 8; ++bit) {
      packed.data()[i] = char(packed.data()[i] ^ (1 << bit));
      expect_error("header bit", "pack it again", [&] { cv::prepare(packed.data(), bytes); });
      packed.data()[i] = char(packed.data()[i] ^ (1 << bit));
    }
  }
  for (int64_t size : {int64_t(0), int64_t(63), int64_t(64), bytes - 1}) {
    Exact part(size);
    std::memcpy(part.data(), packed.data(), size_t(size));
    expect_error("truncated", "pack it again", [&] { cv::prepare(part.data(), size); });
  }
  expect_error("terms", "above 65472", [&] { cv::packed_bytes(layout, {1, 7276, 3, 3, 1}); });
  expect_error("groups", "is no weight", [&] { cv::packed_bytes(layout, {3, 1, 3, 3, 2}); });

  const cv::Prepared prepared = cv::prepare(packed.data(), bytes);
  static const float zero_scale = 0.0f, one = 1.0f;
  static const int32_t too_large = 256, zero = 0;
  const std::pair<const char*, std::function<void(cv::Args&)>> changes[] = {
      {"N=-1", [](cv::Args& a) { a.n = -1; }},
      {"threads=0", [](cv::Args& a) { a.threads = 0; }},
      {"x has C=7 but weight has 6", [](cv::Args& a) { a.c = 7; }},
      {"stride 0", [](cv::Args& a) { a.stride_h = 0; }},
      {"padding -1", [](cv::Args& a) { a.pad_left = -1; }},
      {"x is missing", [](cv::Args& a) { a.x = nullptr; }},
      {"y or weight_scale is missing", [](cv::Args& a) { a.y = nullptr; }},
      {"neither the channels nor the columns", [](cv::Args& a) { a.x_stride_w = 2; }},
      {"belong to static mode", [](cv::Args& a) { a.input_scale = &one; }},
      {"needs input_scale", [](cv::Args& a) { a.mode = Mode::static_; }},
      {"multiplies in float", [](cv::Args& a) { a.mode = Mode::weight_only; }},
      {"a positive normal number",
       [](cv::Args& a) { a.mode = Mode::static_, a.input_scale = &zero_scale, a.input_zero_point = &zero; }},
      {"expected 0 to 255",
       [](cv::Args& a) { a.mode = Mode::static_, a.input_scale = &one, a.input_zero_point = &too_large; }},
  };
  for (const auto& [message, change] : changes) {
    cv::Args a = p.args(y.data());
    change(a);
    expect_error(message, message, [&] { cv::run(a, prepared); });
  }
}

}  // namespace

int main() {
  std::vector<std::string> isas;
  unsetenv("PYCOMPRESS_ISA");
  for (pc::Isa isa : pc::available_isas()) isas.emplace_back(pc::isa_name(isa));
  size_t count = 0;
  for (const auto& cases : {all_cases(), large_cases(), empty_cases()}) {
    for (const Case& c : cases) test_case(Problem(c), isas);
    count += cases.size();
  }
  test_bad_images(isas);
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    test_errors();
    std::printf("%-11s %-28s %zu cases\n", isa.c_str(), cv::best_kernel().name, count);
  }
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
