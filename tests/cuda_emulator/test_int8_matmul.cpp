// The CUDA kernels of int8_matmul, as they stand, on the emulated GPU: against the formula of int8_matmul.h in float64
// (int8_matmul_problem.h), and by the bytes that they move. `make cpp-test` runs it under the address and
// undefined-behaviour sanitizers.
#include <array>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../cpp/int8_matmul_problem.h"
#include "common/check.h"
#include "emulator.h"
#include "int8_matmul/cuda.h"

namespace {

using emulator::Buffer;
using im::CudaArgs;
using im::Plan;

int failures = 0;

std::string describe(const Case& c, const Plan& plan) {
  char text[300];
  std::snprintf(
      text, sizeof text,
      "M=%lld N=%lld K=%lld mode=%d dtype=%d activation=%d bias=%d view=%d; tokens=%d tile=%d vectors=%d fused=%d "
      "parts=%d splits=%lld slice=%lld",
      (long long)c.m, (long long)c.n, (long long)c.k, int(c.mode), int(c.dtype), int(c.activation), c.bias, c.view,
      plan.tokens, plan.tile, plan.vectors, plan.fused, plan.parts, (long long)plan.splits, (long long)plan.slice);
  return text;
}

void fail(const Case& c, const Plan& plan, const std::string& detail) {
  std::printf("FAILED %s: %s\n", describe(c, plan).c_str(), detail.c_str());
  ++failures;
}

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

// ---- a problem on the device --------------------------------------------------------------------------------------

template <class T>
std::vector<T> bytes_of(const void* data, int64_t count) {
  const auto* from = static_cast<const T*>(data);
  return std::vector<T>(from, from + count);
}

// What a call reads, in buffers of exactly their size. The weight may begin `shift` bytes behind an aligned address.
struct Device {
  Buffer<char> x, bias;
  Buffer<int8_t> weight;
  Buffer<float> weight_scale, input_scale;
  Buffer<int32_t> zero_point;
  Problem& p;
  int shift;

  explicit Device(Problem& problem, int weight_shift = 0)
      : x(bytes_of<char>(problem.x_memory.data(), problem.x_memory.count()), "x"),
        bias(bytes_of<char>(problem.bias_memory.data(), problem.bias_memory.count()), "bias"),
        weight(shifted(problem.weight, weight_shift), "weight"),
        weight_scale(bytes_of<float>(problem.weight_scale.data(), problem.weight_scale.count()), "weight_scale"),
        input_scale(std::vector<float>{problem.input_scale}, "input_scale"),
        zero_point(std::vector<int32_t>{problem.input_zero_point}, "zero_point"),
        p(problem),
        shift(weight_shift) {}

  static std::vector<int8_t> shifted(const Exact<int8_t>& weight, int shift) {
    std::vector<int8_t> bytes(static_cast<size_t>(shift), 77);
    bytes.insert(bytes.end(), weight.data(), weight.data() + weight.count());
    return bytes;
  }

  CudaArgs args(Buffer<char>& y, int64_t ldy) {
    CudaArgs a;
    static_cast<pc::LinearArgs&>(a) = p.args(y.data(), ldy);
    a.mode = p.c.mode;
    a.x = x.data() + p.x_offset * pc::dtype_size(p.c.dtype);
    a.weight = weight.data() + shift;
    a.weight_scale = weight_scale.data();
    a.bias = p.c.bias < 0 ? nullptr : bias.data();
    if (p.c.mode == Mode::static_) {
      a.input_scale = input_scale.data();
      a.input_zero_point = zero_point.data();
    }
    return a;
  }
};

// The bound of tests/oracle.py, as in tests/cpp/test_int8_matmul.cpp.
double allowed_error(const Problem& p, size_t at) {
  const double expected = std::fabs(p.expected[at]);
  const double terms = p.c.mode == Mode::weight_only ? double(p.c.k) : 0;
  const double roundoff = p.c.dtype == Dtype::f32 ? 0 : (p.c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11);
  return 0x1p-24 * (8 + 2 * std::sqrt(terms)) * (p.magnitude[at] + expected) + 2 * roundoff * expected + 0x1p-24;
}

// A NaN in `expected` stands for NaN. Between the rows of y every byte is 0xff still.
void compare(const Problem& p, const Plan& plan, const Buffer<char>& y, int64_t ldy) {
  const int64_t size = pc::dtype_size(p.c.dtype);
  for (int64_t m = 0; m < p.c.m && p.c.n > 0; ++m) {
    for (int64_t n = 0; n < p.c.n; ++n) {
      const float got = pc::load_float(y.data(), m * ldy + n, p.c.dtype);
      const auto at = size_t(m * p.c.n + n);
      const bool ok =
          std::isnan(p.expected[at]) ? std::isnan(got) : std::fabs(got - p.expected[at]) <= allowed_error(p, at);
      if (!ok) {
        return fail(p.c, plan,
                    "y[" + std::to_string(m) + "," + std::to_string(n) + "] = " + std::to_string(got) + ", expected " +
                        std::to_string(p.expected[at]));
      }
    }
    for (int64_t i = (m * ldy + p.c.n) * size; m + 1 < p.c.m && i < (m + 1) * ldy * size; ++i) {
      if (y.data()[i] != char(0xff)) return fail(p.c, plan, "wrote between the rows of y");
    }
  }
}

void run_plan(Device& device, const Plan& plan, uint64_t seed, int64_t gap) {
  const Case& c = device.p.c;
  const int64_t ldy = c.n + gap;
  Buffer<char> y(size_t(c.m * c.n == 0 ? 0 : ((c.m - 1) * ldy + c.n) * pc::dtype_size(c.dtype)), "y");
  CudaArgs args = device.args(y, ldy);
  Buffer<char> workspace(size_t(im::workspace_bytes(args, plan)), "workspace");
  args.workspace = workspace.data();
  args.workspace_bytes = int64_t(workspace.size());
  emulator::Options options;
  options.seed = seed;
  options.count = false;
  try {
    emulator::run(options, [&] { im::run_cuda(args, pc::cuda::Place{}, plan); });
    compare(device.p, plan, y, ldy);
  } catch (const std::exception& error) {
    fail(c, plan, error.what());
  }
}

// ---- plans: pick's, and every other that may run ------------------------------------------------------------------

Plan picked(Device& device) {
  Buffer<char> none(0);
  return im::pick(device.args(none, device.p.c.n), pc::cuda::device_info(0));
}

std::vector<Plan> all_plans(Device& device) {
  const Case& c = device.p.c;
  const Plan best = picked(device);
  std::vector<Plan> plans{best};
  const auto with_slice = [&](Plan plan, int64_t slice) {
    plan.slice = slice;
    plan.splits = std::max<int64_t>((c.k + slice - 1) / slice, 1);
    plan.fused = plan.fused && plan.splits == 1;
    plans.push_back(plan);
  };
  for (const int tile : {im::kWide, im::kNarrow}) {
    if (c.mode == Mode::weight_only) break;
    Plan plan = best;
    plan.tokens = 0, plan.parts = 1, plan.fused = false, plan.tile = tile;
    with_slice(plan, im::kMaxChunkK);
    if (c.k > im::kTileK) with_slice(plan, im::kTileK * (c.k > 4 * im::kTileK ? 3 : 1));
  }
  if (c.m > im::kMaxTokens) return plans;
  const int64_t whole = (c.k / im::kStreamStep + 1) * im::kStreamStep;
  for (const int parts : {1, 2, 8}) {
    Plan plan = best;
    plan.parts = parts, plan.fused = false;
    if (whole * plan.tokens <= 32768) with_slice(plan, whole);
    if (c.k > im::kStreamStep) with_slice(plan, im::kStreamStep);
  }
  return plans;
}

void test_case(const Case& c, uint64_t seed, bool all, int shift = 0) {
  Problem p(c);
  Device device(p, shift);
  int64_t gap = 0;
  for (const Plan& plan : all ? all_plans(device) : std::vector<Plan>{picked(device)}) {
    run_plan(device, plan, seed++, gap);
    gap = gap == 0 ? 3 : 0;
  }
}

// ---- cases --------------------------------------------------------------------------------------------------------

// Options in turn, each with a period of its own, so that a few dozen shapes meet every pair of them.
Case deal(int64_t m, int64_t n, int64_t k, int64_t turn) {
  Case c{m, n, k};
  c.mode = m > im::kMaxTokens ? Mode(turn % 2) : Mode(turn % 3);
  c.dtype = Dtype(turn / 3 % 3);
  c.activation = Activation(turn % 5);
  c.bias = int(turn % 4) - 1;
  c.view = int(turn % 7 == 6 ? 0 : turn % 8);
  return c;
}

void test_shapes() {
  int64_t turn = 0;
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{{0, 8, 8},
                                                                   {8, 0, 8},
                                                                   {3, 5, 0},
                                                                   {20, 5, 0},
                                                                   {1, 1, 1},
                                                                   {15, 17, 31},
                                                                   {65, 33, 127},
                                                                   {3, 5, 5001},
                                                                   {16, 9, 1040},
                                                                   {130, 136, 200},
                                                                   {1, 24, 1536}}) {
    for (int i = 0; i < 3; ++i, ++turn) test_case(deal(m, n, k, turn), uint64_t(turn), true);
  }
  for (int64_t m = 1; m <= 17; ++m, ++turn) test_case(deal(m, 2 * m + 3, 48 * m, turn), uint64_t(turn), true);
}

void test_options() {
  uint64_t seed = 0;
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (int activation = 0; activation < 5; ++activation) {
      for (int mode = 0; mode < 3; ++mode) {
        test_case({3, 13, 80, Mode(mode), Dtype(dtype), Activation(activation), (activation + mode) % 4 - 1}, seed++,
                  false);
      }
      test_case({18, 24, 96, Mode(activation % 2), Dtype(dtype), Activation(activation), dtype}, seed++, true);
    }
    for (int view = 0; view < 8; ++view) {
      test_case({5, 7, 133, Mode(view % 3), Dtype(dtype), Activation::none, 0, view}, seed++, false);
      test_case({19, 7, 133, Mode(view % 2), Dtype(dtype), Activation::none, 0, view}, seed++, false);
    }
  }
  for (const int shift : {1, 4, 8}) {  // rows of the weight that do not begin at multiples of 16 bytes
    for (int mode = 0; mode < 3; ++mode) test_case({4, 11, 64, Mode(mode)}, seed++, true, shift);
    test_case({21, 70, 160, Mode(shift % 2)}, seed++, true, shift);
  }
}

// Sums that leave int32 unless K is split, and ones that just do not. Every product has the same sign.
void test_large_k() {
  for (const auto mode : {Mode::dynamic_, Mode::static_}) {
    test_case({2, 3, im::kMaxChunkK + 64 * 1000, mode, Dtype::bf16, Activation::none, -1, 0, 1, true}, 5, false);
    test_case({17, 2, im::kMaxChunkK, mode, Dtype::bf16, Activation::none, -1, 5, 1, true}, 6, false);
    test_case({17, 2, im::kMaxChunkK + 1616, mode, Dtype::bf16, Activation::none, -1, 5, 1, true}, 7, false);
  }
  test_case({1, 2, 40000, Mode::weight_only, Dtype::bf16}, 8, false);
}

void test_not_finite() {
  uint64_t seed = 0;
  for (const int64_t m : {4, 20}) {
    for (const auto mode : {Mode::dynamic_, Mode::static_}) {
      Problem p({m, 9, 300, mode, Dtype(seed % 3), Activation(seed % 5)});
      for (const auto& [row, k, value] :
           std::vector<std::tuple<int64_t, int64_t, float>>{{1, 299, NAN}, {2, 0, INFINITY}, {3, 7, -INFINITY}}) {
        pc::store_float(p.x_memory.data(), p.index(row, k), p.c.dtype, value);
        for (int64_t n = 0; n < 9; ++n) p.expected[size_t(row * 9 + n)] = NAN;
      }
      Device device(p);
      for (const Plan& plan : all_plans(device)) run_plan(device, plan, seed++, 0);
    }
  }
}

// Other orders of threads and blocks, other arrivals of copies.
void test_seeds() {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    test_case({33, 70, 304, Mode(seed % 2), Dtype::bf16, Activation::silu, 0}, 100 * seed, true);
    test_case({3, 37, 1100, Mode(seed % 3), Dtype::f16, Activation::none, 1}, 100 * seed, true);
  }
}

// What pick gives fits every device that the kernels are compiled for.
void test_pick() {
  constexpr int kKilobyte = 1024;
  for (const auto& device : {pc::cuda::DeviceInfo{108, 8, 0, 163 * kKilobyte, 164 * kKilobyte},
                             pc::cuda::DeviceInfo{84, 8, 6, 99 * kKilobyte, 100 * kKilobyte},
                             pc::cuda::DeviceInfo{132, 9, 0, 227 * kKilobyte, 228 * kKilobyte}}) {
    for (const im::Tile& tile : im::kTiles) {
      const int blocks = device.shared_per_multiprocessor / (im::tile_shared_bytes(tile) + kKilobyte);
      expect(blocks >= 2, "two blocks of a tile share a multiprocessor");
    }
    for (int i = 0; i < 2000; ++i) {
      CudaArgs a;
      a.mode = Mode(i % 3);
      a.m = i % 2 == 0 || a.mode == Mode::weight_only ? draw(0, 16) : draw(0, 5000);
      a.n = draw(0, i % 5 == 0 ? 100 : 20000);
      a.k = draw(0, i % 7 == 0 ? 300000 : 10000) / (i % 4 + 1) * 4;
      const Plan plan = im::pick(a, device);
      const bool streams = a.m <= im::kMaxTokens;
      expect(plan.splits >= 1 && plan.slice * plan.splits >= a.k && plan.slice * (plan.splits - 1) <= a.k, "all of K");
      expect(a.mode == Mode::weight_only || plan.slice <= im::kMaxChunkK, "sums stay in int32");
      expect((plan.tokens != 0) == streams && (!streams || a.m <= plan.tokens), "few tokens stream the weight");
      if (streams) expect(im::stream_shared_bytes(a, plan) <= device.shared_bytes, "shared memory of stream_weight");
    }
  }
}

// ---- bytes --------------------------------------------------------------------------------------------------------

struct Counted {
  emulator::Counters all;
  std::vector<emulator::LaunchRecord> launches;
  double floor;  // weight, x, scales and y once each
};

Counted count(const Case& c) {
  Problem p(c);
  Device device(p);
  Plan plan = picked(device);
  Buffer<char> y(size_t(c.m * c.n * pc::dtype_size(c.dtype)), "y");
  CudaArgs args = device.args(y, c.n);
  Buffer<char> workspace(size_t(im::workspace_bytes(args, plan)), "workspace");
  args.workspace = workspace.data();
  args.workspace_bytes = int64_t(workspace.size());
  emulator::Options options;
  options.yield = 0;
  emulator::run(options, [&] { im::run_cuda(args, pc::cuda::Place{}, plan); });
  compare(p, plan, y, c.n);
  const double size = pc::dtype_size(c.dtype);
  return {emulator::counters(), emulator::launches(),
          double(c.n) * double(c.k) + double(c.m) * double(c.k) * size + 4.0 * double(c.n) +
              double(c.m) * double(c.n) * size};
}

// For docs/gpu.md: what each launch of a call moves.
void print_launches(const Case& c, const Counted& counted) {
  static const char* const kDtypes[] = {"f32", "bf16", "f16"};
  static const char* const kModes[] = {"dynamic", "static", "weight_only"};
  for (const auto& launch : counted.launches) {
    std::string name = launch.kernel.substr(0, launch.kernel.find('<'));
    const auto& n = launch.counters;
    std::printf(
        "counted op=int8_matmul kernel=%s case=M=%lld,K=%lld,N=%lld,%s,%s bytes=%llu sectors=%llu floor=%.0f "
        "shared=%zu threads=%u conflicts=%llu\n",
        name.c_str(), (long long)c.m, (long long)c.k, (long long)c.n, kDtypes[int(c.dtype)], kModes[int(c.mode)],
        (unsigned long long)n.requested_bytes(), (unsigned long long)n.moved_bytes(), counted.floor,
        launch.shared_bytes, launch.block.x, (unsigned long long)(n.matrix_conflicts + n.shared_conflicts));
  }
}

void test_bytes() {
  for (const Case& c :
       {Case{1, 4096, 4096, Mode::dynamic_, Dtype::bf16}, Case{16, 4096, 4096, Mode::dynamic_, Dtype::bf16},
        Case{4, 1024, 2048, Mode::weight_only, Dtype::bf16}}) {
    const Counted counted = count(c);
    print_launches(c, counted);
    const double ratio = double(counted.all.moved_bytes()) / counted.floor;
    expect(ratio <= 1.05, "stream_weight moves " + std::to_string(ratio) + " of the floor");
  }
  const Case tile{512, 1024, 1024, Mode::dynamic_, Dtype::bf16};
  const Counted counted = count(tile);
  print_launches(tile, counted);
  expect(counted.all.matrix_phases > 0 && counted.all.matrix_conflicts == 0, "ldmatrix has bank conflicts");
  expect(counted.all.shared_phases > 0 && counted.all.shared_conflicts == 0, "shared memory has bank conflicts");
}

// ---- errors -------------------------------------------------------------------------------------------------------

void test_errors() {
  Problem p({17, 8, 32, Mode::weight_only});
  Device device(p);
  Buffer<char> y(17 * 8 * 4);
  const auto message = [&](const CudaArgs& args) -> std::string {
    try {
      im::run_cuda(args, pc::cuda::Place{});
    } catch (const pc::ArgumentError& error) {
      return error.what();
    }
    return "";
  };
  CudaArgs args = device.args(y, 8);
  expect(message(args).find("at most 16 tokens") != std::string::npos, "weight_only with 17 tokens ran");
  args.mode = Mode::dynamic_;
  expect(message(args).find("workspace of 0 bytes") != std::string::npos, "ran without a workspace");
  args.mode = Mode::static_;
  expect(message(args).find("needs both") != std::string::npos, "static ran without a scale");
  args = device.args(y, 7);
  args.mode = Mode::dynamic_;
  expect(message(args).find("ldy=7") != std::string::npos, "rows of y that overlap");
}

}  // namespace

int main() {
  test_errors();
  test_shapes();
  test_options();
  test_large_k();
  test_not_finite();
  test_seeds();
  test_pick();
  test_bytes();
  if (failures == 0) std::printf("int8_matmul on the emulated GPU: all passed\n");
  return failures == 0 ? 0 : 1;
}
