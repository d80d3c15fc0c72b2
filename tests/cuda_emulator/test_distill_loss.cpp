// The loss on an emulated GPU, against the formula of distill_loss.h in double: every divergence, term, dtype and view;
// rows that a warp takes, that a block stages, that a group of blocks shares and that nobody can stage; edges; and the
// bytes of memory that it moves.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../cpp/distill_loss_problem.h"
#include "common/check.h"
#include "distill_loss/cuda.h"
#include "emulator.h"

namespace {

using namespace distill_loss_problem;
namespace cuda = pycompress::cuda;

int failures = 0;

void expect_none(const std::string& name, const std::string& wrong) {
  if (wrong.empty()) return;
  std::printf("FAILED %s: %s\n", name.c_str(), wrong.c_str());
  ++failures;
}

void expect(const std::string& name, bool holds) { expect_none(name, holds ? "" : "is not so"); }

// Multiprocessors, capability 8.0, shared memory of a block and of a multiprocessor.
constexpr cuda::DeviceInfo kLarge{4, 8, 0, 163 << 10, 164 << 10};
constexpr cuda::DeviceInfo kSmall{4, 8, 0, 9 << 10, 18 << 10};  // three blocks of 4 kB of logits
constexpr cuda::DeviceInfo kTiny{1, 8, 0, 3 << 10, 4 << 10};    // nearly nothing fits

// Memory that the kernels may touch, and no other, while it lives.
struct Known {
  const void* start;
  Known(const void* from, size_t bytes, const char* name, emulator::Access access) : start(from) {
    if (bytes > 0) emulator::register_buffer(start, bytes, name, access);
  }
  ~Known() { emulator::unregister_buffer(start); }
};

// One call's memory. Everything but the results is read-only.
struct Run {
  Problem& p;
  size_t values;
  emulator::Buffer<float> loss, hard, soft;
  emulator::Buffer<char> grad;
  dl::CudaArgs args;
  uint64_t seed = 1;
  dl::Plan plan;

  explicit Run(Problem& problem, bool with_grad = true)
      : p(problem),
        values(p.c.reduction == Reduction::none ? size_t(p.c.rows) : 1),
        loss(values, "loss"),
        hard(values, "hard"),
        soft(values, "soft"),
        grad(size_t(p.c.rows * p.c.vocab * pc::dtype_size(p.c.dtype)), "grad") {
    args = p.args<dl::CudaArgs>(loss.data(), hard.data(), soft.data(), with_grad ? grad.data() : nullptr);
  }

  void start(const cuda::DeviceInfo& info, int device = 0) {
    plan = dl::pick(args, info);
    emulator::Buffer<char> workspace(size_t(dl::workspace_bytes(plan)), "workspace");
    args.workspace = workspace.data();
    const auto known = [](const Logits& logits, const char* name) {
      return Known(logits.view.data, size_t(logits.extent * pc::dtype_size(logits.view.dtype)), name,
                   emulator::Access::kReadOnly);
    };
    const Known student = known(p.student, "student"), teacher = known(p.teacher, "teacher");
    const Known labels(p.labels.data(), p.labels.size() * 8, "labels", emulator::Access::kReadOnly);
    const Known weights(p.weights.data(), p.weights.size() * 4, "weights", emulator::Access::kReadOnly);
    emulator::Options options;
    options.seed = seed;
    emulator::run(options, [&] { dl::run_cuda(args, {device, nullptr}, plan); });
  }

  std::string name() const {
    return name_of(p.c) + " vectors=" + std::to_string(int(plan.vectors)) +
           " staged=" + std::to_string(int(plan.staged)) + " blocks=" + std::to_string(plan.blocks_per_row) +
           " threads=" + std::to_string(plan.threads) + " seed=" + std::to_string(seed);
  }
  void check() {
    expect_none(name(), wrong_values(p, "loss", loss.data(), p.loss));
    expect_none(name(), wrong_values(p, "hard", hard.data(), p.hard));
    expect_none(name(), wrong_values(p, "soft", soft.data(), p.soft));
    if (args.grad != nullptr) expect_none(name(), wrong_gradient(p, grad.data(), args.grad_factor));
  }
};

// Options are dealt in turn, each with a period of its own, so that the shapes meet every pair of them.
std::vector<Case> all_cases() {
  std::vector<Case> cases;
  int64_t turn = 0;
  const auto deal = [&](int64_t rows, int64_t vocab, int64_t teacher_vocab) {
    Case c{rows, vocab, teacher_vocab};
    c.dtype = Dtype(turn % 3);
    c.teacher_dtype = turn % 7 == 0 ? Dtype(turn / 3 % 3) : c.dtype;
    c.divergence = Divergence(turn / 2 % 3);
    c.reduction = Reduction(turn / 5 % 3);
    c.temperature = std::vector<double>{1, 2, 4, 0.7, 3}[size_t(turn % 5)];
    c.alpha = std::vector<double>{0.5, 0, 1, 0.3}[size_t(turn / 3 % 4)];
    c.beta = turn % 2 == 0 ? 0.5 : 0.1;
    c.smoothing = turn % 11 == 0 ? 0.1 : 0;
    c.view = turn % 3 == 0 ? int(turn / 4 % 5) : 0;
    c.masked = turn % 6 == 5;
    c.weighted = turn % 8 == 7;
    cases.push_back(c);
    ++turn;
  };
  for (int64_t rows : {1, 3, 5}) {
    for (int64_t vocab : {1, 2, 7, 8, 9, 31, 33, 64, 130}) deal(rows, vocab, vocab);
  }
  for (int64_t vocab : {1000, 1024, 2051, 4096, 6150}) {
    for (int64_t rows : {1, 3, 7}) deal(rows, vocab, vocab);
    deal(2, vocab, vocab + 17);
    deal(2, vocab + 17, vocab);
    deal(0, vocab, vocab);
  }
  for (int64_t other : {1, 10, 50, 64, 70}) deal(5, 60, other), deal(7, other, 60);
  return cases;
}

void test_cases() {
  int grouped = 0, reread = 0;
  uint64_t seed = 0;
  for (const Case& c : all_cases()) {
    Problem p(c);
    for (const cuda::DeviceInfo& info : {kLarge, kSmall, kTiny}) {
      Run run(p, seed % 4 != 3);
      run.seed = ++seed;
      run.start(info);
      run.check();
      grouped += run.plan.blocks_per_row > 1;
      reread += !run.plan.staged;
    }
  }
  std::printf("%d calls, of them %d with groups of blocks, %d that read rows again\n", int(seed), grouped, reread);
  expect("groups of blocks and rows read again were tried", grouped > 20 && reread > 20);
}

// The same bits at every seed, and right. The last kind: short rows, of more groups than a warp adds up in the end.
void test_seeds() {
  for (int kind = 0; kind < 5; ++kind) {
    const bool is_short = kind == 4;
    Case c = is_short ? Case{150, 20, 20} : Case{5, 2300, 2300};
    c.dtype = c.teacher_dtype = kind == 3 ? Dtype::f32 : Dtype::bf16;
    c.divergence = Divergence(kind % 3);
    Problem p(c);
    std::vector<char> first;
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      Run run(p);
      run.seed = seed;
      run.start(is_short ? kLarge : kSmall);
      run.check();
      expect(run.name() + ": groups", is_short ? run.plan.groups > 64 : run.plan.blocks_per_row > 1);
      std::vector<char> bits(sizeof(float) + run.grad.size());
      std::memcpy(bits.data(), run.loss.data(), sizeof(float));
      std::memcpy(bits.data() + sizeof(float), run.grad.data(), run.grad.size());
      if (first.empty()) first = bits;
      expect(run.name() + ": the same bits", bits == first);
    }
  }
}

// Blocks that wait for each other all fit onto the device, which gives out shared memory in units of 128 bytes.
void test_plans(const cuda::DeviceInfo& info) {
  const float none = 0;
  int misfits = 0;
  for (int64_t vocab = 1000; vocab < 300000; vocab += 61) {
    for (const int64_t rows : {1, 4000}) {
      dl::CudaArgs args;
      args.student = args.teacher = {&none, Dtype::bf16, rows, vocab, rows, 0, vocab, 1};
      const dl::Plan plan = dl::pick(args, info);
      const int by_shared = info.shared_per_multiprocessor / ((plan.shared_bytes + 1024 + 127) / 128 * 128);
      const int fit = std::min({by_shared, 16, 768 / plan.threads}) * info.multiprocessors;
      misfits += plan.blocks_per_row > 1 && plan.groups * plan.blocks_per_row > fit;
    }
  }
  expect("all blocks fit, misfits=" + std::to_string(misfits), misfits == 0);
}

bool is_nan_row(const Run& run, int64_t row) {
  for (int64_t v = 0; v < run.p.c.vocab; ++v) {
    if (!std::isnan(pc::load_float(run.grad.data(), row * run.p.c.vocab + v, run.p.c.dtype))) return false;
  }
  return true;
}

Case none_case(int64_t rows, int64_t vocab, Divergence divergence) {
  Case c{rows, vocab, vocab};
  c.reduction = Reduction::none;
  c.divergence = divergence;
  return c;
}

// What makes a row NaN, and nothing but that row: values that the CPU refuses, and logits that leave no distribution.
void test_bad_rows() {
  for (const cuda::DeviceInfo& info : {kLarge, kSmall}) {
    for (int which = 0; which < 3; ++which) {
      Problem p(none_case(9, which == 2 ? 3000 : 77, Divergence(which)));
      const auto row = [](int r) { return size_t(r); };
      p.weights[row(0)] = -1;
      p.weights[row(1)] = NAN;
      p.labels[row(2)] = p.c.vocab;
      p.labels[row(4)] = -1;
      p.student.set(5, 3, NAN);
      p.teacher.set(6, 3, kInfinity);
      for (int64_t v = 0; v < p.c.vocab; ++v) p.student.set(7, v, -kInfinity);
      p.weights[row(3)] = INFINITY;  // ignored all the same
      p.c.weighted = true;
      Run run(p);
      run.start(info);
      for (int64_t t = 0; t < 9; ++t) {
        const bool bad = t != 3 && t != 8;
        const std::string name = run.name() + " row " + std::to_string(t);
        expect(name + ": NaN or not", std::isnan(run.loss[row(int(t))]) == bad && is_nan_row(run, t) == bad);
      }
      expect(run.name() + ": an ignored token",
             run.loss[3] == 0 && pc::load_float(run.grad.data(), 3 * p.c.vocab, p.c.dtype) == 0);
    }
  }
}

// Equal logits: 0, for jsd but for the rounding of powers and logarithms. An infinite divergence: the gradient is
// finite. One class: 0.
void test_exact() {
  for (int which = 0; which < 3; ++which) {
    Case c = none_case(2, 300, Divergence(which));
    c.alpha = 0;
    c.temperature = 1.7;
    Problem p(c);
    for (int64_t v = 0; v < c.vocab; ++v) p.teacher.set(0, v, p.student.at(0, v));
    for (int64_t v = 0; v < c.vocab; v += 2) p.teacher.set(1, v, -kInfinity);
    for (int64_t v = 1; v < c.vocab; v += 4) p.student.set(1, v, -kInfinity);
    Run run(p);
    run.start(kLarge);
    const double allowed = which == 2 ? 0x1p-21 : 0;
    double largest = std::fabs(double(run.loss[0]));
    bool finite = true;
    for (int64_t v = 0; v < c.vocab; ++v) {
      largest = std::max(largest, std::fabs(double(pc::load_float(run.grad.data(), v, c.dtype))));
      finite = finite && std::isfinite(pc::load_float(run.grad.data(), c.vocab + v, c.dtype));
    }
    expect(run.name() + ": equal logits give 0", largest <= allowed);
    expect(run.name() + ": finite gradient", finite);
    expect(run.name() + ": infinite", which == 2 ? std::isfinite(run.loss[1]) : run.loss[1] == INFINITY);

    Case one = none_case(1, 1, Divergence(which));
    Problem single(one);
    Run alone(single);
    alone.start(kLarge);
    expect(alone.name() + ": one class", alone.loss[0] == 0 && pc::load_float(alone.grad.data(), 0, one.dtype) == 0);
  }
}

// The number of items on the device or given; numbers that are none; division left to who comes after.
void test_items() {
  Case c{4, 50, 50};
  Problem p(c);
  for (const double items : {2.0, 0.0, -1.0, double(NAN), double(INFINITY)}) {
    for (const bool ignored : {false, true}) {
      for (const bool normalize : {true, false}) {
        std::vector<int64_t> labels = p.labels;
        if (ignored) p.labels.assign(4, -100);
        emulator::Buffer<double> on_device(std::vector<double>{items}, "num_items");
        emulator::Buffer<float> scale(1, "grad_scale");
        Run run(p);
        run.args.num_items = on_device.data();
        run.args.normalize_grad = normalize;
        run.args.grad_scale = scale.data();
        run.start(kLarge);
        const bool good = items == 2;
        const float g = pc::load_float(run.grad.data(), 0, c.dtype);
        const std::string name = run.name() + " items=" + std::to_string(items);
        expect(name + ": grad_scale", scale[0] == (good ? 0.5f : 0.0f));
        expect(name + ": loss", ignored ? run.loss[0] == 0 : std::isnan(run.loss[0]) != good);
        expect(name + ": gradient", ignored ? g == 0 : std::isnan(g) != good);
        // Three valid tokens, so that the solution was divided by 3.
        if (good && !ignored) expect_none(name, wrong_gradient(p, run.grad.data(), normalize ? 1.5 : 3.0));
        if (good && !ignored)
          expect(name + ": value", std::fabs(run.hard[0] - 1.5 * (p.hard[0] + p.hard[1] + p.hard[2])) < 1e-5);
        p.labels = labels;
      }
    }
  }
}

// The gradient over the student's logits, factors, values that nobody wants.
void test_in_place() {
  for (const cuda::DeviceInfo& info : {kLarge, kSmall, kTiny}) {
    Case c{3, 3001, 3001};
    c.dtype = c.teacher_dtype = Dtype::bf16;
    Problem p(c);
    Run run(p);
    std::memcpy(run.grad.data(), p.student.view.data, run.grad.size());
    run.args.student.data = run.grad.data();
    run.start(info);
    run.check();
    Run factor(p);
    factor.args.grad_factor = 0.25;
    factor.args.loss = factor.args.hard = factor.args.soft = nullptr;
    factor.start(info);
    expect_none(factor.name(), wrong_gradient(p, factor.grad.data(), 0.25));
  }
}

void test_scale() {
  for (int which = 0; which < 3; ++which) {
    const Dtype dtype = Dtype(which);
    constexpr int64_t kRows = 5, kCols = 301;
    for (const int stride : {0, 1}) {
      emulator::Buffer<char> grad(size_t(kRows * kCols * pc::dtype_size(dtype)), "grad");
      for (int64_t i = 0; i < kRows * kCols; ++i) pc::store_float(grad.data(), i, dtype, float(i % 97));
      const std::vector<float> factors = stride == 1 ? std::vector<float>{1, 0.5f, 2, 1, 0} : std::vector<float>{0.5f};
      emulator::Buffer<float> factor(factors, "factor");
      emulator::run({}, [&] { dl::scale_cuda(grad.data(), dtype, kRows, kCols, factor.data(), stride, {}); });
      for (int64_t i = 0; i < kRows * kCols; ++i) {
        const float want = float(i % 97) * factors[size_t(stride * (i / kCols))];
        expect("scale", pc::load_float(grad.data(), i, dtype) == want);
      }
    }
    emulator::Buffer<char> grad(std::vector<char>(4096, 1), "grad");  // read-only: a factor of 1 moves nothing
    emulator::Buffer<float> one(std::vector<float>{1}, "one");
    emulator::run({}, [&] { dl::scale_cuda(grad.data(), dtype, 1, 1024 / 2, one.data(), 0, {}); });
    expect("a factor of 1 moves nothing", emulator::counters().stored_bytes == 0);
  }
}

// 6 bytes an element of bf16 with the gradient: both operands read once, one written. 5 % more are allowed.
void test_bytes(const char* what, int64_t rows, int64_t vocab, Divergence divergence, const cuda::DeviceInfo& info,
                bool wants_groups) {
  static const int device = emulator::add_device({8, 0, 132});
  Case c{rows, vocab, vocab};
  c.dtype = c.teacher_dtype = Dtype::bf16;
  c.divergence = divergence;
  Problem p(c);
  for (int64_t t = 3; t < rows; t += 5) p.labels[size_t(t)] = 0, p.student.set(t, vocab - 1, 0);  // none ignored
  std::fill(p.hard.begin(), p.hard.end(), 0.0);
  std::fill(p.grad.begin(), p.grad.end(), 0.0);
  p.items = 0;
  p.solve();
  Run run(p);
  run.start(info, device);
  run.check();
  const emulator::Counters n = emulator::counters();
  const double floor = 6.0 * double(rows * vocab);
  std::printf(
      "counted op=distill_loss kernel=distill_loss_rows case=%s,T=%d,V=%d,bf16,grad bytes=%lld sectors=%lld "
      "floor=%lld shared=%d threads=%d blocks_per_row=%d ratio=%.4f,%.4f\n",
      what, int(rows), int(vocab), (long long)n.requested_bytes(), (long long)n.moved_bytes(), (long long)floor,
      run.plan.shared_bytes, run.plan.threads, run.plan.blocks_per_row, double(n.requested_bytes()) / floor,
      double(n.moved_bytes()) / floor);
  expect(run.name() + ": bytes",
         double(n.requested_bytes()) <= 1.05 * floor && double(n.moved_bytes()) <= 1.05 * floor);
  expect(run.name() + ": groups of blocks or not", (run.plan.blocks_per_row > 1) == wants_groups);
}

void test_errors() {
  Case c{2, 10, 10};
  Problem p(c);
  Run run(p);
  run.args.temperature = 0;
  try {
    run.start(kLarge);
    expect("temperature=0 is refused", false);
  } catch (const pc::ArgumentError& error) {
    expect(error.what(), std::string(error.what()).find("temperature") != std::string::npos);
  }
}

}  // namespace

int main() {
  test_cases();
  test_seeds();
  test_plans({108, 8, 0, 163 << 10, 164 << 10});
  test_plans({128, 8, 9, 99 << 10, 100 << 10});
  test_plans({132, 9, 0, 227 << 10, 228 << 10});
  test_bad_rows();
  test_exact();
  test_items();
  test_in_place();
  test_scale();
  test_errors();
  // So few multiprocessors that these rows are as many to them as a batch is to a whole GPU.
  constexpr cuda::DeviceInfo kHopper{4, 9, 0, 227 << 10, 228 << 10}, kHalf{8, 9, 0, 227 << 10, 228 << 10};
  constexpr cuda::DeviceInfo kAda{8, 8, 9, 99 << 10, 100 << 10}, kOne{1, 9, 0, 227 << 10, 3 * (227 << 10)};
  test_bytes("block", 4, 32000, Divergence::forward_kl, kOne, false);
  test_bytes("group", 6, 32000, Divergence::forward_kl, kHopper, true);
  test_bytes("group_small_shared_memory", 6, 32000, Divergence::reverse_kl, kAda, true);
  test_bytes("group_misaligned_rows", 4, 50257, Divergence::reverse_kl, kHopper, true);
  test_bytes("group_two_exchanges", 3, 128256, Divergence::jsd, kHalf, true);
  test_bytes("warp", 400, 1000, Divergence::forward_kl, kHopper, false);
  std::printf(failures == 0 ? "passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
