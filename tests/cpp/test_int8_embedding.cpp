// Every kernel that this CPU has, against the formula of int8_embedding.h in float64, in buffers of exactly the size that
// the contract asks for: under the sanitizers a read or write beyond one stops the test.
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "common/check.h"
#include "int8_embedding/int8_embedding.h"
#include "int8_matmul_problem.h"

namespace ie = pycompress::int8_embedding;
using ie::Reduce;

namespace {

int failures = 0;

struct BagCase {
  int64_t v, d;
  Reduce reduce = Reduce::rows;
  Dtype dtype = Dtype::f32;
  bool wide = true;
  std::vector<int64_t> sizes;  // of the bags; for rows one size, the number of indices
  bool offsets = true;         // else the bags are equally large
  bool padding = false, weights = false;
  int threads = 1;
};

// Whole numbers in a buffer of their exact size, in either width.
class Whole {
 public:
  Whole(const std::vector<int64_t>& values, bool wide) : memory_(int64_t(values.size()) * (wide ? 8 : 4)), wide_(wide) {
    for (size_t i = 0; i < values.size(); ++i) set(int64_t(i), values[i]);
  }
  void set(int64_t i, int64_t value) {
    const auto narrow = int32_t(value);
    if (wide_) {
      std::memcpy(memory_.data() + i * 8, &value, 8);
    } else {
      std::memcpy(memory_.data() + i * 4, &narrow, 4);
    }
  }
  const void* data() const { return memory_.data(); }

 private:
  Exact<char> memory_;
  bool wide_;
};

std::vector<int64_t> starts(const BagCase& c) {
  std::vector<int64_t> at{0};
  for (int64_t size : c.sizes) at.push_back(at.back() + size);
  return at;
}

std::vector<int64_t> random_indices(const BagCase& c) {
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < starts(c).back(); ++i) indices.push_back(draw(0, c.v - 1));
  return indices;
}

struct BagProblem {
  BagCase c;
  std::vector<int64_t> start, indices;
  Exact<int8_t> table;
  Exact<float> scale, weight;
  Whole index, offset;
  int64_t outputs, padding;
  Exact<char> y;

  explicit BagProblem(const BagCase& given)
      : c(given),
        start(starts(c)),
        indices(random_indices(c)),
        table(c.v * c.d),
        scale(c.v),
        weight(c.weights ? start.back() : 0),
        index(indices, c.wide),
        offset({start.begin(), start.end() - 1}, c.wide),
        outputs(c.reduce == Reduce::rows ? start.back() : int64_t(c.sizes.size())),
        padding(c.padding && c.v > 0 ? draw(0, c.v - 1) : -1),
        y(outputs * c.d * pc::dtype_size(c.dtype)) {
    for (int64_t i = 0; i < table.count(); ++i) table[i] = int8_t(draw(-127, 127));
    for (int64_t i = 0; i < scale.count(); ++i) scale[i] = float(uniform(0.001, 0.1));
    for (int64_t i = 0; i < weight.count(); ++i) weight[i] = float(uniform(-2, 2));
  }

  ie::Args args() {
    ie::Args a;
    a.table = {table.data(), scale.data(), c.v, c.d};
    a.reduce = c.reduce;
    a.index = index.data();
    a.offset = c.reduce == Reduce::rows || !c.offsets ? nullptr : offset.data();
    a.bag_size = c.sizes.empty() ? 0 : c.sizes[0];
    a.wide = c.wide;
    a.count = start.back();
    a.padding = padding;
    a.weight = c.weights ? weight.data() : nullptr;
    a.y = y.data();
    a.dtype = c.dtype;
    a.outputs = outputs;
    a.threads = c.threads;
    return a;
  }

  // y[out,d] and the sum of the magnitudes that met in it.
  std::pair<double, double> expected(int64_t out, int64_t d) const {
    if (c.reduce == Reduce::rows) {
      const double v = term(out, d);
      return {v, std::fabs(v)};
    }
    double sum = 0, largest = -std::numeric_limits<double>::infinity(), magnitude = 0;
    int64_t terms = 0;
    for (int64_t i = start[size_t(out)]; i < start[size_t(out) + 1]; ++i) {
      if (indices[size_t(i)] == padding) continue;
      const double v = term(i, d) * (c.weights ? weight.data()[i] : 1.0);
      sum += v;
      largest = std::max(largest, v);
      magnitude += std::fabs(v);
      ++terms;
    }
    if (terms == 0) return {0, 0};
    if (c.reduce == Reduce::max) return {largest, std::fabs(largest)};
    return c.reduce == Reduce::mean ? std::pair{sum / double(terms), magnitude} : std::pair{sum, magnitude};
  }

 private:
  double term(int64_t i, int64_t d) const {
    const int64_t row = indices[size_t(i)];
    return double(scale.data()[row]) * table.data()[row * c.d + d];
  }
};

void fail(const BagCase& c, const char* isa, const std::string& detail) {
  std::printf("FAILED %s: V=%lld D=%lld reduce=%d dtype=%d wide=%d bags=%zu offsets=%d padding=%d weights=%d: %s\n",
              isa, (long long)c.v, (long long)c.d, int(c.reduce), int(c.dtype), c.wide, c.sizes.size(), c.offsets,
              c.padding, c.weights, detail.c_str());
  ++failures;
}

void test_case(const BagCase& c, const char* isa) {
  BagProblem p(c);
  ie::run(p.args());
  for (int64_t out = 0; out < p.outputs; ++out) {
    for (int64_t d = 0; d < c.d; ++d) {
      const auto [expected, magnitude] = p.expected(out, d);
      const float got = pc::load_float(p.y.data(), out * c.d + d, c.dtype);
      const double roundoff = c.dtype == Dtype::f32 ? 0x1p-24 : (c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11);
      const double terms = c.reduce == Reduce::rows ? 0 : double(c.sizes[size_t(out)]);
      const double allowed =
          0x1p-24 * (2 + 2 * std::sqrt(terms)) * magnitude + 2 * roundoff * std::fabs(expected) + 0x1p-25;
      if (std::fabs(got - expected) <= allowed) continue;
      return fail(c, isa,
                  "y[" + std::to_string(out) + "," + std::to_string(d) + "] = " + std::to_string(got) + ", expected " +
                      std::to_string(expected));
    }
  }
}

std::vector<BagCase> all_cases() {
  std::vector<BagCase> cases;
  int turn = 0;
  for (int64_t d : {1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 79, 100, 129, 384}) {
    for (int reduce = 0; reduce < 4; ++reduce) {
      for (const std::vector<int64_t>& sizes :
           std::vector<std::vector<int64_t>>{{0, 3, 0, 1, 17, 0}, {1}, {}, {5, 5}}) {
        BagCase c{1 + turn % 23, d, Reduce(reduce), Dtype(turn % 3), turn % 2 == 0, {}};
        c.sizes = reduce == 0 ? std::vector<int64_t>{int64_t(sizes.size()) * 7} : sizes;
        c.offsets = sizes.size() != 2;
        c.padding = turn % 4 == 1;
        c.weights = Reduce(reduce) == Reduce::sum && turn % 3 != 1;
        cases.push_back(c);
        ++turn;
      }
    }
  }
  for (int threads : {2, 3, 5}) {  // above kBytesAThread for each of them, with shares that are not equally large
    BagCase rows{50, 200, Reduce::rows, Dtype::f32, true, {3001}};
    BagCase bags{50, 200, Reduce::sum, Dtype::f32, true, {3000, 0, 1, 0, 0, 700, 9, 0}};
    rows.threads = bags.threads = threads;
    cases.push_back(rows);
    cases.push_back(bags);
  }
  cases.push_back({0, 8, Reduce::rows, Dtype::f32, true, {0}});
  cases.push_back({4, 0, Reduce::rows, Dtype::f32, true, {3}});
  cases.push_back({4, 0, Reduce::mean, Dtype::f32, true, {3}});
  return cases;
}

// ---- errors ----------------------------------------------------------------------------------------------------

template <class Error>
void expect_error(const std::string& message, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    if (std::string(error.what()).find(message) != std::string::npos) return;
    std::printf("FAILED '%s' does not say '%s'\n", error.what(), message.c_str());
    ++failures;
    return;
  }
  std::printf("FAILED no error '%s'\n", message.c_str());
  ++failures;
}

void test_index_errors() {
  for (bool wide : {false, true}) {
    for (int reduce = 0; reduce < 4; ++reduce) {
      const std::vector<int64_t> bad = {-1, 9, std::numeric_limits<int32_t>::min(),
                                        std::numeric_limits<int32_t>::max()};
      for (int64_t value : bad) {
        BagProblem p({9, 20, Reduce(reduce), Dtype::f32, wide, {40}});
        std::memset(p.y.data(), 7, size_t(p.y.count()));
        p.index.set(33, value);
        expect_error<pc::IndexError>("index " + std::to_string(value) +
                                         " (at position 33) is out of range for a table "
                                         "of V=9 rows",
                                     [&] { ie::run(p.args()); });
        for (int64_t i = 0; i < p.y.count(); ++i) {
          if (p.y[i] == 7) continue;
          fail(p.c, "index error", "y was written");
          break;
        }
      }
    }
  }
  BagProblem p({9, 20, Reduce::rows, Dtype::f32, true, {4}});
  for (int64_t value : {std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), int64_t(1) << 32}) {
    p.index.set(3, value);
    expect_error<pc::IndexError>("index " + std::to_string(value), [&] { ie::run(p.args()); });
  }
}

void test_argument_errors() {
  const std::pair<const char*, std::function<void(ie::Args&)>> changes[] = {
      {"[V=-1, D=20]", [](ie::Args& a) { a.table.v = -1; }},
      {"threads=0", [](ie::Args& a) { a.threads = 0; }},
      {"the indices are missing", [](ie::Args& a) { a.index = nullptr; }},
      {"the table or its scales are missing", [](ie::Args& a) { a.table.scale = nullptr; }},
      {"y is missing", [](ie::Args& a) { a.y = nullptr; }},
      {"weights belong to sum", [](ie::Args& a) { a.weight = a.table.scale; }},
      {"7 rows for 6 indices", [](ie::Args& a) { a.reduce = Reduce::rows, a.offset = nullptr, a.outputs = 7; }},
      {"2 bags of 4 are not 6 indices", [](ie::Args& a) { a.offset = nullptr, a.bag_size = 4; }},
      {"offsets[1]=4 is beyond the 3 indices", [](ie::Args& a) { a.count = 3; }},
  };
  for (const auto& [message, change] : changes) {
    BagProblem p({9, 20, Reduce::mean, Dtype::f32, true, {4, 2}});
    ie::Args a = p.args();
    change(a);
    expect_error<pc::ArgumentError>(message, [&] { ie::run(a); });
  }
  BagProblem p({9, 20, Reduce::mean, Dtype::f32, false, {4, 2}});
  p.offset.set(1, -3);
  expect_error<pc::ArgumentError>("offsets[1]=-3 is less than the one before it, 0", [&] { ie::run(p.args()); });
  p.offset.set(0, 1);
  expect_error<pc::ArgumentError>("offsets[0]=1, expected 0", [&] { ie::run(p.args()); });
}

}  // namespace

int main() {
  std::vector<std::string> isas;
  unsetenv("PYCOMPRESS_ISA");
  for (pc::Isa isa : pc::available_isas()) isas.emplace_back(pc::isa_name(isa));
  const std::vector<BagCase> cases = all_cases();
  for (const std::string& isa : isas) {
    setenv("PYCOMPRESS_ISA", isa.c_str(), 1);
    for (const BagCase& c : cases) test_case(c, isa.c_str());
    test_index_errors();
    std::printf("%-11s %-28s %zu cases\n", isa.c_str(), ie::best_kernel().name, cases.size());
  }
  unsetenv("PYCOMPRESS_ISA");
  test_argument_errors();
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
