// The index form of sparse_linear: what each case is packed into, and every kernel that this CPU has, against the
// formula of sparse_linear.h in float64. `make cpp-test` runs it under the address and undefined-behaviour sanitizers;
// see test_sparse_linear.cpp, the test of the bitmap form, for how buffers are laid out.
#include <array>
#include <limits>
#include <thread>

#include "sparse_index_form.h"

namespace {

struct KernelFile {
  const sl::IndexKernel* kernels;
  int count;
};

const KernelFile kKernelFiles[] = {
    {sl::kIndexScalar, 3},
#ifdef PYCOMPRESS_HAVE_AVX2
    {sl::kIndexAvx2, 3},
#endif
#ifdef PYCOMPRESS_HAVE_AVXVNNI
    {sl::kIndexAvxVnni, 1},
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    {sl::kIndexAvx512, 3},
#endif
#ifdef PYCOMPRESS_HAVE_AVX512VNNI
    {sl::kIndexAvx512Vnni, 1},
#endif
};

// Those of this CPU, and of PYCOMPRESS_ISA where it is set, the scalar one first.
std::vector<const sl::IndexKernel*> usable_kernels() {
  std::vector<const sl::IndexKernel*> kernels;
  for (const KernelFile& file : kKernelFiles) {
    for (const sl::IndexKernel* kernel = file.kernels; kernel < file.kernels + file.count; ++kernel) {
      if (pc::isa_usable(kernel->isa)) kernels.push_back(kernel);
    }
  }
  return kernels;
}

std::vector<const sl::IndexKernel*> usable_kernels(WeightType type) {
  std::vector<const sl::IndexKernel*> kernels;
  for (const sl::IndexKernel* kernel : usable_kernels()) {
    if (kernel->layout.type == type) kernels.push_back(kernel);
  }
  return kernels;
}

// ---- the kernels ---------------------------------------------------------------------------------------------------

// A packed weight is padded, and run_index() takes its scratch from a buffer rounded up to pages: the sanitizer sees no
// overrun. Here every array has exactly the size that IndexWeight and IndexBlock promise.
class ExactWeight {
 public:
  explicit ExactWeight(const sl::IndexWeight& w)
      : strips_(w.strips, strip_count(w.n) + 1),
        row_init_(w.row_init, strip_count(w.n) * sl::kStrip),
        lists_(w.lists, w.strips[strip_count(w.n)].list),
        values_(w.values, w.strips[strip_count(w.n)].value * sl::value_bytes(*w.layout)),
        weight_(w) {
    weight_.strips = strips_.data();
    weight_.row_init = row_init_.data();
    weight_.lists = lists_.data();
    weight_.values = values_.data();
  }
  const sl::IndexWeight& weight() const { return weight_; }

 private:
  Exact<sl::Strip> strips_;
  Exact<int32_t> row_init_;
  Exact<uint16_t> lists_;
  Exact<char> values_;
  sl::IndexWeight weight_;
};

// run_index() with one thread, in `parts` * `parts` blocks.
void run_exact(const sl::IndexKernel& kernel, const sl::Args& a, const sl::IndexWeight& weight, int64_t parts) {
  const int64_t strips = strip_count(a.n), padded = strips * sl::kStrip;
  Exact<float> scale(padded), bias(padded);
  for (int64_t n = 0; n < padded; ++n) {
    scale[n] = n < a.n && a.weight_scale != nullptr ? a.weight_scale[n] : 0.0f;
    bias[n] = n < a.n && a.bias != nullptr ? pc::load_float(a.bias, n, a.bias_dtype) : 0.0f;
  }
  const int64_t registers = (a.m + kernel.lanes - 1) / kernel.lanes;
  for (int64_t i = 0; i < parts * parts; ++i) {
    const pc::Range part = pc::split(registers, parts, i / parts);
    const pc::Range tokens{part.begin * kernel.lanes, std::min(part.end * kernel.lanes, a.m)};
    Exact<char> scratch(kernel.scratch_bytes(a, weight));
    if (part.begin < part.end) {
      kernel.run({&a, &weight, bias.data(), scale.data(), tokens, pc::split(strips, parts, i % parts), scratch.data()});
    }
  }
}

// Integer sums are exact, and the epilogue rounds the same everywhere: with s8 every kernel of both forms agrees with
// the scalar one in every bit, as far as its activation does.
bool has_exact_bits(const SparseCase& c) {
  return c.type == WeightType::s8 && (c.activation == Activation::none || c.activation == Activation::relu);
}

void compare_bits(const SparseProblem& p, const char* what, const sl::IndexKernel& kernel, const Exact<char>& y,
                  int64_t ldy, const Exact<char>& expected) {
  const int64_t size = pc::dtype_size(p.c.dtype);
  for (int64_t m = 0; m < p.c.m; ++m) {
    const char *got = y.data() + m * ldy * size, *row = expected.data() + m * p.c.n * size;
    if (std::memcmp(got, row, size_t(p.c.n * size)) == 0) continue;
    return fail(p, what, kernel.name, "row " + std::to_string(m) + " differs in bits from the bitmap form");
  }
}

void test_kernels(SparseProblem& p) {
  const SparseCase& c = p.c;
  Exact<char> by_bitmap(y_bytes(c, c.n));
  sl::run_bitmap(p.args(by_bitmap.data(), c.n), p.bitmap());
  const auto check = [&](const char* what, const sl::IndexKernel& kernel, Exact<char>& y, int64_t ldy) {
    compare(p, what, kernel.name, y, ldy);
    if (has_exact_bits(c)) compare_bits(p, what, kernel, y, ldy, by_bitmap);
  };
  for (const sl::IndexKernel* kernel : usable_kernels(c.type)) {
    const Packed packed(kernel->layout, p.bitmap());
    Exact<char> apart(y_bytes(c, c.n + 3));
    mark_all(apart, c.dtype);
    sl::run_index(p.args(apart.data(), c.n + 3), packed.weight, *kernel);
    check("run_index", *kernel, apart, c.n + 3);
    if (c.m * c.n == 0) continue;
    const ExactWeight exact(packed.weight);
    for (int64_t parts : {1, 2}) {
      Exact<char> y(y_bytes(c, c.n));
      mark_all(y, c.dtype);
      run_exact(*kernel, p.args(y.data(), c.n), exact.weight(), parts);
      check(parts == 1 ? "exact" : "exact, in four blocks", *kernel, y, c.n);
    }
  }
}

void test_case(const SparseCase& c) {
  SparseProblem p(c);
  for (const sl::IndexLayout* layout : kLayouts) {
    if (layout->type == c.type) test_form(p, *layout, Packed(*layout, p.bitmap()).weight);
  }
  test_kernels(p);
}

// ---- cases -----------------------------------------------------------------------------------------------------

SparseCase deal_blocks(int64_t m, int64_t n, int64_t k, int64_t turn) {
  SparseCase c = deal(m, n, k, turn);
  constexpr int kBlocks[][2] = {{1, 1}, {4, 1}, {1, 4}, {1, 1}, {4, 4}};
  c.block_rows = kBlocks[turn / 2 % 5][0];
  c.block_columns = kBlocks[turn / 2 % 5][1];
  return c;
}

std::vector<SparseCase> all_cases() {
  std::vector<SparseCase> cases;
  int64_t turn = 0;
  constexpr int64_t kOutputs[] = {1, 2, 3, 4, 5, 7, 12, 15, 16, 17, 31, 33, 48, 65, 130};
  constexpr int64_t kColumns[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 67, 100, 129, 191};
  for (int64_t m = 1; m <= 71; ++m) {
    for (int i = 0; i < 4; ++i, ++turn) {
      cases.push_back(deal_blocks(m == 71 ? 130 : m, kOutputs[turn * 4 % 15], kColumns[turn * 5 % 19], turn));
    }
  }
  for (int64_t n : kOutputs) {
    for (int64_t k : kColumns) {
      cases.push_back(deal_blocks(turn * 3 % 19 + 1, n, k, turn));
      ++turn;
    }
  }
  for (int type = 0; type < 3; ++type) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (int activation = 0; activation < 5; ++activation) {
        for (int bias = -1; bias < 3; ++bias) {
          cases.push_back({18, 35, 42, WeightType(type), 0.4, true, Dtype(dtype), Activation(activation), bias});
        }
      }
      for (int view = 0; view < 8; ++view) {
        cases.push_back({35, 20, 133, WeightType(type), 0.3, true, Dtype(dtype), Activation::none, 0, view});
      }
    }
    for (int64_t zero = 0; zero < 3; ++zero) {
      cases.push_back({zero == 0 ? 0 : 5, zero == 1 ? 0 : 20, zero == 2 ? 0 : 30, WeightType(type)});
    }
    for (double kept : {0.0, 1.0}) cases.push_back({20, 40, 90, WeightType(type), kept, false});
    for (int threads : {2, 3, 5}) {
      for (const auto& shape : {std::array<int64_t, 3>{1, 500, 300}, {150, 17, 120}, {70, 150, 100}, {16, 3, 900}}) {
        SparseCase c{shape[0], shape[1], shape[2], WeightType(type)};
        c.threads = threads;
        cases.push_back(c);
        c.kept = 0.2;
        c.block_rows = 4;
        cases.push_back(c);
      }
    }
    // panels of 4, 2 and 1 registers: more units than stay in L2
    const int64_t unit = type == int(WeightType::s8) ? 4 : 1;
    if (unit == 1) cases.push_back({3, 2, sl::kMaxUnits, WeightType(type), 1.0, false});
    for (int64_t units : {2560, 2561, 5121, 10241}) cases.push_back({70, 4, units * unit, WeightType(type), 0.5});
  }
  for (int64_t m : {1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 130}) {  // gathered
    for (int64_t k : {61, 62, 63, 64, 65, 130}) {
      SparseCase c = deal(m, kOutputs[turn * 4 % 15], k, turn);
      c.type = WeightType::s8;
      c.kept = 0.25;
      c.block_rows = 4;
      cases.push_back(c);
      ++turn;
    }
  }
  SparseCase edge{2, 4, sl::kMaxUnits, WeightType::s8, 0.2, false};  // gathered: as many columns as a list can name
  edge.block_rows = 4;
  cases.push_back(edge);
  edge = {2, 4, sl::kMaxRowCount, WeightType::s8, 1.0, false};  // sums at the edge of the integers
  edge.extreme = true;
  cases.push_back(edge);
  return cases;
}

// ---- errors ----------------------------------------------------------------------------------------------------

void test_run_errors() {
  SparseProblem p({2, 20, 30, WeightType::s8}), floats({2, 20, 30, WeightType::f32});
  const sl::IndexKernel& kernel = sl::best_index_kernel(WeightType::s8);
  const sl::IndexKernel& float_kernel = sl::best_index_kernel(WeightType::f32);
  const Packed packed(kernel.layout, p.bitmap()), float_packed(float_kernel.layout, floats.bitmap());
  Exact<char> y(2 * 20 * 4);
  mark_all(y, Dtype::f32);
  const sl::Args good = p.args(y.data(), 20);
  expect_argument_errors(good, [&](const sl::Args& a) { sl::run_index(a, packed.weight, kernel); });
  expect_error("scale of floats", "belongs to an int8 weight",
               [&] { sl::run_index(good, float_packed.weight, float_kernel); });
  for (int64_t i = 0; i < 2 * 20; ++i) {
    if (pc::load_float(y.data(), i, Dtype::f32) == kMark) continue;
    return fail(p, "run_index", kernel.name, "wrote before it threw");
  }
}

// A layout is read by the kernels that PYCOMPRESS_ISA allows, and by no other.
void test_lookup(const char* isa) {
  for (int type = 0; type < 3; ++type) {
    const sl::IndexKernel& best = sl::best_index_kernel(WeightType(type));
    expect(best.layout.type == WeightType(type) && pc::isa_usable(best.isa), isa, "not the best kernel");
    expect(sl::find_index_kernel(best.layout) == &best, isa, "the best kernel is not found again");
  }
  for (const sl::IndexLayout* layout : kLayouts) {
    const std::string where = std::string(isa) + ", " + layout_name(*layout);
    const sl::IndexKernel* expected = nullptr;
    for (const sl::IndexKernel* kernel : usable_kernels()) {
      if (kernel->layout.id == layout->id) expected = kernel;
    }
    expect(sl::find_index_kernel(*layout) == expected, where, "found another kernel");
    SparseProblem p({0, 4, 4, layout->type});
    const Packed packed(*layout, p.bitmap());
    if (expected != nullptr) {
      expect(&sl::index_kernel_for(packed.weight) == expected, where, "another kernel for its weight");
      continue;
    }
    expect_error("another ISA's layout", "another instruction set than " + std::string(isa),
                 [&] { sl::index_kernel_for(packed.weight); });
    expect_error("another ISA's layout", kRemedy, [&] { sl::index_kernel_for(packed.weight); });
  }
}

// ---- NaN and Inf, callers in parallel --------------------------------------------------------------------------

// A bad element of x reaches the outputs that keep a weight there, and no other row; with s8 it takes its whole row. The
// last row is the one that lanes without a token repeat.
void test_bad_row(SparseProblem& p, int64_t bad_row, int64_t at, const sl::IndexKernel& kernel) {
  const Packed packed(kernel.layout, p.bitmap());
  Exact<char> y(y_bytes(p.c, p.c.n));
  sl::run_index(p.args(y.data(), p.c.n), packed.weight, kernel);
  for (int64_t i = 0; i < p.c.m * p.c.n; ++i) {
    const float got = pc::load_float(y.data(), i, p.c.dtype);
    bool right = std::fabs(got - p.expected[size_t(i)]) <= allowed_error(p, size_t(i));
    if (i / p.c.n == bad_row && p.c.type == WeightType::s8) right = std::isnan(got);
    if (i / p.c.n == bad_row && p.c.type != WeightType::s8) {
      right = std::isfinite(got) != p.keeps(i % p.c.n, at);  // the values without it are another test's matter
    }
    if (!right) return fail(p, "bad row", kernel.name, "y[" + std::to_string(i) + "] = " + std::to_string(got));
  }
}

void test_bad_rows() {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY}) {
    for (int turn = 0; turn < 18; ++turn) {  // each type of weight, each dtype of x, both rows
      SparseCase c{20, 38, 70, WeightType(turn % 3), 0.4, true, Dtype(turn / 3 % 3)};
      c.block_rows = turn % 2 == 0 ? 4 : 1;
      SparseProblem p(c);
      const int64_t row = turn < 9 ? 3 : 19, at = turn % 2 == 0 ? 0 : 69;
      pc::store_float(p.x_memory.data(), p.index(row, at), c.dtype, bad);
      for (const sl::IndexKernel* kernel : usable_kernels(c.type)) test_bad_row(p, row, at, *kernel);
    }
  }
}

void test_callers_in_parallel(const sl::IndexKernel& kernel) {
  SparseCase c{70, 120, 150, kernel.layout.type};
  c.threads = 2;
  SparseProblem p(c);
  const Packed packed(kernel.layout, p.bitmap());
  Exact<char> y0(c.m * c.n * 4), y1(c.m * c.n * 4), y2(c.m * c.n * 4);
  Exact<char>* const results[] = {&y0, &y1, &y2};
  std::vector<std::thread> callers;
  for (Exact<char>* y : results) {
    callers.emplace_back([&, y] {
      for (int i = 0; i < 5; ++i) sl::run_index(p.args(y->data(), c.n), packed.weight, kernel);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (Exact<char>* y : results) compare(p, "callers in parallel", kernel.name, *y, c.n);
}

// An empty tensor has no memory.
void test_no_memory() {
  for (const sl::IndexKernel* kernel : usable_kernels()) {
    SparseProblem p({20, 40, 0, kernel->layout.type});
    const sl::Bitmap bitmap{p.c.type, p.c.n, 0, nullptr, nullptr, p.row_start.data()};
    const Packed packed(kernel->layout, bitmap);
    Exact<char> y(y_bytes(p.c, 40));
    mark_all(y, p.c.dtype);
    sl::Args a = p.args(y.data(), 40);
    a.x = nullptr;
    sl::run_index(a, packed.weight, *kernel);
    compare(p, "no memory", kernel->name, y, 40);
  }
}

}  // namespace

int main() {
  unsetenv("PYCOMPRESS_ISA");
  const std::vector<SparseCase> cases = all_cases();
  for (const SparseCase& c : cases) test_case(c);
  test_bad_rows();
  test_no_memory();
  for (const sl::IndexKernel* kernel : usable_kernels()) {
    test_callers_in_parallel(*kernel);
    std::printf("%-11s %-36s layout %-2d %zu cases\n", pc::isa_name(kernel->isa), kernel->name, kernel->layout.id,
                cases.size());
  }
  const std::vector<pc::Isa> isas = pc::available_isas();
  for (pc::Isa isa : isas) {
    setenv("PYCOMPRESS_ISA", pc::isa_name(isa), 1);
    test_lookup(pc::isa_name(isa));
    test_run_errors();
  }
  unsetenv("PYCOMPRESS_ISA");
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
