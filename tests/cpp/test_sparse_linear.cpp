// Every kernel that this CPU has, against the formula of sparse_linear.h in float64. `make cpp-test` runs it under the
// address and undefined-behaviour sanitizers, and so every buffer has exactly the size that the contract asks for: one
// element read or written beyond it stops the test. What may not be read inside a buffer (gaps between strided rows) is
// NaN, and what may not be written keeps a mark.
#include <array>
#include <limits>
#include <thread>

#include "sparse_linear_check.h"

namespace {

// ---- the bitmap form -------------------------------------------------------------------------------------------

struct KernelFile {
  pc::Isa isa;
  const sl::BitmapKernel* kernels;
  int count;
};

const KernelFile kKernelFiles[] = {
    {pc::Isa::scalar, sl::kBitmapScalar, 3},
#ifdef PYCOMPRESS_HAVE_AVX2
    {pc::Isa::avx2, sl::kBitmapAvx2, 3},
#endif
#ifdef PYCOMPRESS_HAVE_AVXVNNI
    {pc::Isa::avxvnni, sl::kBitmapAvxVnni, 1},
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    {pc::Isa::avx512, sl::kBitmapAvx512, 3},
#endif
#ifdef PYCOMPRESS_HAVE_AVX512VNNI
    {pc::Isa::avx512vnni, sl::kBitmapAvx512Vnni, 1},
#endif
#ifdef PYCOMPRESS_HAVE_AVX512VBMI2
    {pc::Isa::avx512vnni, sl::kBitmapAvx512Vbmi2, 2},
#endif
};

bool runs_here(const sl::BitmapKernel& kernel) {
  return pc::isa_usable(kernel.isa) && (!kernel.vbmi2 || pc::cpu_has_vbmi2());
}

// run_bitmap() takes its scratch from a buffer rounded up to pages, where the sanitizer sees no overrun: this is the
// same with one thread and every array of exactly the size that BitmapBlock promises. Also the way to kernels that
// run_bitmap() would not choose on this CPU.
void run_exact(const sl::BitmapKernel& kernel, const sl::Args& a, const sl::Bitmap& weight) {
  const int64_t padded = (a.n + sl::kBitmapUnit - 1) / sl::kBitmapUnit * sl::kBitmapUnit;
  Exact<float> scale(padded), bias(padded);
  for (int64_t n = 0; n < padded; ++n) {
    scale[n] = n >= a.n ? 0.0f : a.weight_scale == nullptr ? 1.0f : a.weight_scale[n];
    bias[n] = n < a.n && a.bias != nullptr ? pc::load_float(a.bias, n, a.bias_dtype) : 0.0f;
  }
  Exact<char> scratch(kernel.scratch_bytes(a.m, a.k));
  kernel.run({&a, &weight, bias.data(), scale.data(), {0, a.n}, scratch.data()});
}

void test_case(const SparseCase& c, const std::vector<std::string>& isas) {
  SparseProblem p(c);
  Exact<int64_t> scanned(c.n + 1);
  const int64_t nnz = sl::scan_bitmap(p.bits.data(), c.n, c.k, scanned.data());
  if (nnz != p.nnz || std::memcmp(scanned.data(), p.row_start.data(), size_t(c.n + 1) * 8) != 0) {
    fail(p, "any", "scan_bitmap", "counted " + std::to_string(nnz) + " of " + std::to_string(p.nnz));
  }
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    const int64_t ldy = c.n + 3;
    Exact<char> y(y_bytes(c, ldy));
    mark_all(y, c.dtype);
    sl::run_bitmap(p.args(y.data(), ldy), p.bitmap());
    compare(p, isa.c_str(), sl::bitmap_kernel_name(c.type), y, ldy);
  }
  unsetenv("PYCOMPRESS_ISA");
  if (c.m * c.n == 0) return;
  for (const KernelFile& file : kKernelFiles) {
    for (const sl::BitmapKernel* kernel = file.kernels; kernel < file.kernels + file.count; ++kernel) {
      if (kernel->type != c.type || !runs_here(*kernel)) continue;
      Exact<char> y(y_bytes(c, c.n));
      mark_all(y, c.dtype);
      run_exact(*kernel, p.args(y.data(), c.n), p.bitmap());
      compare(p, "exact", kernel->name, y, c.n);
    }
  }
}

// ---- cases -----------------------------------------------------------------------------------------------------

std::vector<SparseCase> all_cases() {
  std::vector<SparseCase> cases;
  int64_t turn = 0;
  for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 19}) {
    for (int64_t n : {1, 3, 4, 15, 16, 17, 31, 63, 64, 65, 130}) {
      for (int64_t k : {1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 191, 200}) cases.push_back(deal(m, n, k, turn++));
    }
  }
  for (int type = 0; type < 3; ++type) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (int activation = 0; activation < 5; ++activation) {
        for (int bias = -1; bias < 3; ++bias) {
          cases.push_back({3, 83, 75, WeightType(type), 0.4, true, Dtype(dtype), Activation(activation), bias});
        }
      }
      for (int view = 0; view < 8; ++view) {
        cases.push_back({9, 40, 133, WeightType(type), 0.3, true, Dtype(dtype), Activation::none, 0, view});
      }
    }
    for (int64_t m = 1; m <= 8; ++m) {
      for (double kept : {0.5, 0.1}) cases.push_back({m, 150, 800, WeightType(type), kept});
    }
    for (int64_t zero = 0; zero < 3; ++zero) {
      cases.push_back({zero == 0 ? 0 : 5, zero == 1 ? 0 : 20, zero == 2 ? 0 : 30, WeightType(type)});
    }
    for (int threads : {2, 3, 5}) {
      for (const auto& shape : {std::array<int64_t, 3>{1, 900, 700}, {2, 70, 5000}, {9, 300, 600}}) {
        SparseCase c{shape[0], shape[1], shape[2], WeightType(type)};
        c.threads = threads;
        cases.push_back(c);
      }
    }
    for (int64_t k : {im::kMaxChunkK - 1, im::kMaxChunkK, im::kMaxChunkK + 1, 2 * im::kMaxChunkK + 5}) {
      SparseCase c{2, 18, k, WeightType(type)};
      cases.push_back(c);
      c.extreme = type == int(WeightType::s8);
      c.kept = 1;
      c.m = 1;
      cases.push_back(c);
    }
  }
  return cases;
}

// ---- errors ----------------------------------------------------------------------------------------------------

void test_bitmap_errors() {
  SparseProblem p({2, 20, 30, WeightType::s8});
  Exact<char> y(2 * 20 * 4);
  const sl::Args good = p.args(y.data(), 20);
  expect_argument_errors(good, [&](const sl::Args& a) { sl::run_bitmap(a, p.bitmap()); });
  const std::pair<const char*, std::function<void(sl::Bitmap&)>> changes[] = {
      {"belongs to an int8 weight", [](sl::Bitmap& w) { w.type = WeightType::f32; }},
      {"row_start is missing", [](sl::Bitmap& w) { w.row_start = nullptr; }},
      {"weight_bitmap is missing", [](sl::Bitmap& w) { w.bits = nullptr; }},
      {"weight_values is missing", [](sl::Bitmap& w) { w.values = nullptr; }},
  };
  for (const auto& [message, change] : changes) {
    sl::Bitmap w = p.bitmap();
    change(w);
    expect_error(message, message, [&, &w = w] { sl::run_bitmap(good, w); });
  }
  for (int64_t k : {1, 7, 9, 30}) {
    Exact<uint8_t> bits((k + 7) / 8 * 3);
    std::fill(bits.data(), bits.data() + bits.count(), uint8_t(0));
    bits[bits.count() - 1] = uint8_t(1 << (k % 8));
    Exact<int64_t> starts(4);
    expect_error("stray bit", "in row 2", [&, k = k] { sl::scan_bitmap(bits.data(), 3, k, starts.data()); });
  }
}

// ---- NaN and Inf, callers in parallel --------------------------------------------------------------------------

// A bad element of x reaches the outputs that keep a weight there, and no other row; with s8 it takes its whole row.
void test_bad_rows(const char* isa) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY}) {
    for (int turn = 0; turn < 9; ++turn) {  // each type of weight, each dtype of x
      SparseProblem p({8, 70, 100, WeightType(turn % 3), 0.5, true, Dtype(turn / 3)});
      const int64_t at = turn % 2 == 0 ? 0 : 99;
      pc::store_float(p.x_memory.data(), p.index(3, at), p.c.dtype, bad);
      Exact<char> y(y_bytes(p.c, 70));
      sl::run_bitmap(p.args(y.data(), 70), p.bitmap());
      for (int64_t i = 0; i < 8 * 70; ++i) {
        const float got = pc::load_float(y.data(), i, p.c.dtype);
        bool right = std::fabs(got - p.expected[size_t(i)]) <= allowed_error(p, size_t(i));
        if (i / 70 == 3 && p.c.type == WeightType::s8) right = std::isnan(got);
        if (i / 70 == 3 && p.c.type != WeightType::s8) {
          right = std::isfinite(got) != p.keeps(i % 70, at);  // the values without it are another test's matter
        }
        if (!right) {
          fail(p, isa, "bad row", "y[" + std::to_string(i) + "] = " + std::to_string(got));
          break;
        }
      }
    }
  }
}

void test_callers_in_parallel(const char* isa) {
  SparseCase c{5, 400, 700};
  c.threads = 2;
  SparseProblem p(c);
  Exact<char> y0(c.m * c.n * 4), y1(c.m * c.n * 4), y2(c.m * c.n * 4);
  Exact<char>* const results[] = {&y0, &y1, &y2};
  std::vector<std::thread> callers;
  for (Exact<char>* y : results) {
    callers.emplace_back([&, y] {
      for (int i = 0; i < 20; ++i) sl::run_bitmap(p.args(y->data(), c.n), p.bitmap());
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (Exact<char>* y : results) compare(p, isa, "callers in parallel", *y, c.n);
}

// The integer sums are exact, and the epilogue rounds the same everywhere: so do all kernels, bit for bit.
void test_same_bits() {
  SparseProblem p({5, 133, 1111, WeightType::s8, 0.3});
  Exact<char> first(y_bytes(p.c, 133)), y(y_bytes(p.c, 133));
  run_exact(sl::kBitmapScalar[2], p.args(first.data(), 133), p.bitmap());
  for (const KernelFile& file : kKernelFiles) {
    const sl::BitmapKernel& kernel = file.kernels[file.count - 1];
    if (!runs_here(kernel)) continue;
    run_exact(kernel, p.args(y.data(), 133), p.bitmap());
    if (std::memcmp(first.data(), y.data(), size_t(y.count())) != 0) fail(p, "exact", kernel.name, "differs in bits");
  }
}

}  // namespace

int main() {
  std::vector<std::string> isas;
  unsetenv("PYCOMPRESS_ISA");
  for (pc::Isa isa : pc::available_isas()) isas.emplace_back(pc::isa_name(isa));

  const std::vector<SparseCase> cases = all_cases();
  for (const SparseCase& c : cases) test_case(c, isas);
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    test_bad_rows(isa.c_str());
    test_callers_in_parallel(isa.c_str());
    for (int type = 0; type < 3; ++type) {
      std::printf("%-11s %-36s %zu cases\n", isa.c_str(), sl::bitmap_kernel_name(WeightType(type)), cases.size());
    }
  }
  unsetenv("PYCOMPRESS_ISA");
  test_same_bits();
  test_bitmap_errors();
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
