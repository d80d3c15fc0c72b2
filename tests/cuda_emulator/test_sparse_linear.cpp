// The CUDA kernels of sparse_linear, run by the emulator, against the formula of sparse_linear.h in float64: both forms,
// every type, several orders of threads and copies. Every buffer has exactly the size that the contract asks for, what
// may not be read is NaN, and what may not be written keeps a mark. Then the bytes and the bank conflicts are counted.
#include <limits>

#include "../cpp/sparse_linear_check.h"
#include "emulator.h"
#include "sparse_linear/cuda.h"

namespace {

namespace cuda = pc::cuda;
using emulator::Buffer;

enum class Form { bitmap, two_to_four };
const char* name_of(Form form) { return form == Form::bitmap ? "bitmap" : "2:4"; }

// ---- the 2:4 form, as cuda.h draws it ------------------------------------------------------------------------------

struct Packed {
  Exact<uint32_t> metadata;
  Exact<char> tiles;

  static int64_t tile_count(const SparseCase& c) {
    const int64_t step = sl::tile_step(c.type);
    return (c.n + sl::kTileRows - 1) / sl::kTileRows * ((c.k + step - 1) / step);
  }
  explicit Packed(SparseProblem& p)
      : metadata(tile_count(p.c) * sl::tile_words(p.c.type)), tiles(tile_count(p.c) * sl::kTileBytes) {
    const SparseCase& c = p.c;
    const int size = sl::weight_size(c.type), step = sl::tile_step(c.type), words = sl::tile_words(c.type);
    const int64_t steps = (c.k + step - 1) / step;
    std::fill(tiles.data(), tiles.data() + tiles.count(), char(0));
    std::fill(metadata.data(), metadata.data() + metadata.count(), 0u);
    for (int64_t n = 0; n < (c.n + 15) / 16 * 16; ++n) {
      int64_t next = n < c.n ? p.row_start[n] : 0;
      for (int64_t k = 0; k < steps * step; k += 4) {
        int kept[2], count = 0;
        int64_t value[2] = {-1, -1};
        for (int j = 0; j < 4; ++j) {
          if (n < c.n && k + j < c.k && p.keeps(n, k + j)) {
            kept[count] = j;
            value[count++] = next++;
          }
        }
        for (int j = 0; count < 2; ++j) {  // the first columns that are free
          if (count == 1 && kept[0] == j) continue;
          const bool before = count == 1 && j < kept[0];
          if (before) kept[1] = kept[0], value[1] = value[0];
          kept[before ? 0 : count] = j;
          value[before ? 0 : count] = -1;
          ++count;
        }
        const int64_t tile = n / 16 * steps + k / step;
        const int row = int(n % 16), column = int(k % step);
        for (int i = 0; i < 2; ++i) {
          const int byte = (column / 2 + i) * size;  // of the row's 32 bytes of kept elements
          const int lane = row % 8 * 4 + byte % 16 / 4, place = byte / 16 * 2 + row / 8;
          char* to = tiles.data() + tile * sl::kTileBytes + lane * 16 + place * 4 + byte % 4;
          if (value[i] >= 0) std::memcpy(to, p.values.data() + value[i] * size, size_t(size));
        }
        const uint32_t nibble = uint32_t(kept[0] | kept[1] << 2);
        if (size == 2) {
          metadata[tile * words + row % 8 * 2 + column / 16] |= nibble << (row / 8 * 16 + column % 16);
        } else {
          metadata[tile * words + row % 8 * 4 + column / 32 * 2 + row / 8] |= nibble << (column % 32);
        }
      }
    }
  }
};

// ---- runs --------------------------------------------------------------------------------------------------------

struct Device {
  const char* name;
  cuda::Place place;
};

// Of their shared memory: an A100 has 163 KB a block; of sm_86 99 KB, so that less of x fits; an H100 227 KB.
std::vector<Device> devices() {
  std::vector<Device> all;
  all.push_back({"sm_80", {emulator::add_device({8, 0, 4}), nullptr}});
  all.push_back({"sm_86", {emulator::add_device({8, 6, 3}), nullptr}});
  all.push_back({"sm_90", {emulator::add_device({9, 0, 2}), nullptr}});
  return all;
}

void launch(SparseProblem& p, Form form, const Device& device, Exact<char>& y, int64_t ldy, uint64_t seed) {
  sl::CudaArgs args;
  static_cast<sl::Args&>(args) = p.args(y.data(), ldy);
  emulator::Options options;
  options.seed = seed;
  options.count = false;
  const auto run = [&](const auto& weight, const auto& call) {
    Exact<char> workspace(sl::workspace_bytes(args, weight));
    args.workspace = workspace.data();
    args.workspace_bytes = workspace.count();
    std::fill(workspace.data(), workspace.data() + workspace.count(), char(0xff));
    emulator::run(options, [&] { call(args, weight, device.place); });
  };
  if (form == Form::bitmap) {
    run(sl::CudaBitmap{p.c.type, p.c.n, p.c.k, p.nnz, p.bits.data(), p.values.data(), p.row_start.data()},
        sl::run_bitmap_cuda);
  } else {
    Packed packed(p);
    run(sl::Cuda2to4{p.c.type, p.c.n, p.c.k, packed.metadata.data(), packed.tiles.data()}, sl::run_2to4_cuda);
  }
}

int cases_run = 0;

void test_case(const SparseCase& c, Form form, const Device& device, int seeds) {
  SparseProblem p(c);
  const int64_t ldy = c.n + cases_run % 2 * 3;
  for (int seed = 0; seed < seeds; ++seed) {
    Exact<char> y(y_bytes(c, ldy));
    mark_all(y, c.dtype);
    try {
      launch(p, form, device, y, ldy, uint64_t(cases_run + 1000 * seed));
    } catch (const std::exception& error) {
      fail(p, device.name, name_of(form), error.what());
      return;
    }
    compare(p, device.name, name_of(form), y, ldy);
  }
  ++cases_run;
}

// ---- cases -------------------------------------------------------------------------------------------------------

constexpr int64_t kShapes[][3] = {{0, 8, 8},     {1, 0, 8},    {1, 1, 1},   {1, 40, 1024}, {15, 17, 31},
                                  {8, 33, 127},  {3, 5, 5001}, {2, 20, 0},  {4, 19, 512},  {5, 70, 1030},
                                  {1, 33, 2055}, {9, 18, 64},  {8, 65, 33}, {1, 130, 9},   {7, 4, 3000}};

WeightType type_of(int64_t turn) { return WeightType(turn % 4); }

void test_bitmap(const std::vector<Device>& all) {
  int64_t turn = 0;
  for (int round = 0; round < 4; ++round) {
    for (const auto& shape : kShapes) {
      SparseCase c = deal(shape[0], shape[1], shape[2], turn);
      c.type = type_of(turn + round);
      c.dtype = Dtype(turn / 2 % 3);
      c.kept = turn % 3 == 0 ? 0.1 : turn % 3 == 1 ? 0.5 : c.kept;
      test_case(c, Form::bitmap, all[size_t(turn % 3)], 1);
      ++turn;
    }
  }
  for (int type = 0; type < 4; ++type) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (const int64_t m : {1, 3, 8}) {
        test_case({m, 37, 1100, WeightType(type), 0.3, true, Dtype(dtype), Activation(turn++ % 5), dtype}, Form::bitmap,
                  all[0], 2);
      }
    }
    for (int view = 0; view < 8; ++view) {
      test_case({9, 12, 133, WeightType(type), 0.3, true, Dtype(view % 3), Activation::none, 0, view}, Form::bitmap,
                all[0], 1);
    }
    // x in parts: more than shared memory holds
    test_case({8, 20, 7001, WeightType(type), 0.3, true, Dtype::f32}, Form::bitmap, all[1], 1);
    test_case({8, 7, 15000, WeightType(type), 0.5, true, Dtype::bf16}, Form::bitmap, all[1], 1);
    test_case({1, 11, 120001, WeightType(type), 0.02, true, Dtype::f32}, Form::bitmap, all[0], 1);
  }
  SparseCase edge{1, 3, 200001, WeightType::s8, 1.0, false};  // sums that int32 cannot hold
  edge.extreme = true;
  test_case(edge, Form::bitmap, all[0], 1);
}

void test_2to4(const std::vector<Device>& all) {
  constexpr WeightType kTypes[] = {WeightType::bf16, WeightType::f16, WeightType::s8};
  constexpr int64_t kMore[][3] = {{17, 64, 200}, {33, 130, 97}, {130, 140, 160}, {64, 20, 1000}, {129, 300, 70}};
  int64_t turn = 0;
  const auto run = [&](int64_t m, int64_t n, int64_t k, int view) {
    for (const WeightType type : kTypes) {
      SparseCase c = deal(m, n, k, turn);
      c.type = type;
      c.two_of_four = true;
      c.dtype = type == WeightType::s8 ? Dtype(turn % 3) : float_dtype(type);
      c.view = view;
      c.kept = turn % 4 == 3 ? 0.3 : 0.8;
      test_case(c, Form::two_to_four, all[size_t(turn % 3)], 1 + int(turn % 2));
      ++turn;
    }
  };
  for (const auto& shape : kShapes) run(shape[0], shape[1], shape[2], int(turn % 8));
  for (const auto& shape : kMore) run(shape[0], shape[1], shape[2], 0);
  for (int view = 0; view < 8; ++view) run(18, 33, 136, view);
  run(140, 1100, 64, 0);  // enough blocks for the wide shape
}

// ---- NaN, infinity, damage, errors -----------------------------------------------------------------------------------

// A bad element of x stays in its row and reaches the outputs that keep a weight there; as a bitmap no others.
void test_bad_rows(const Device& device, Form form) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY}) {
    for (int turn = 0; turn < 12; ++turn) {
      SparseCase c{8, 40, 100, WeightType(turn % 4), 0.5, true, Dtype(turn / 4)};
      if (form == Form::two_to_four) {
        if (c.type == WeightType::f32) continue;
        c.two_of_four = true;
        c.dtype = c.type == WeightType::s8 ? c.dtype : float_dtype(c.type);
      }
      SparseProblem p(c);
      const int64_t at = turn % 2 == 0 ? 0 : 99;
      pc::store_float(p.x_memory.data(), p.index(3, at), p.c.dtype, bad);
      Exact<char> y(y_bytes(p.c, 40));
      launch(p, form, device, y, 40, uint64_t(turn));
      for (int64_t i = 0; i < 8 * 40; ++i) {
        const float got = pc::load_float(y.data(), i, p.c.dtype);
        bool right = std::fabs(got - p.expected[size_t(i)]) <= allowed_error(p, size_t(i));
        if (i / 40 == 3 && c.type == WeightType::s8) {
          right = std::isnan(got);
        } else if (i / 40 == 3 && p.keeps(i % 40, at)) {  // one infinite term gives infinity, no NaN
          right = form == Form::two_to_four || std::isnan(bad) ? !std::isfinite(got) : std::isinf(got);
        } else if (i / 40 == 3) {
          right = right || form == Form::two_to_four;
        }
        if (!right) {
          fail(p, device.name, "bad row", "y[" + std::to_string(i) + "] = " + std::to_string(got));
          break;
        }
      }
    }
  }
}

// Whatever row_start says, nothing is read or written out of bounds (the sanitizer would stop the test).
void test_damaged_row_start(const Device& device) {
  for (const WeightType type : {WeightType::f32, WeightType::bf16, WeightType::s8}) {
    for (const int64_t wrong : {int64_t(-1000000), int64_t(-1), int64_t(7), int64_t(1) << 62}) {
      for (const int64_t k : {int64_t(700), int64_t(60000)}) {
        SparseProblem p({2, 9, k, type, 0.5});
        for (int64_t n = 0; n <= 9; ++n) p.row_start[n] += n % 2 == 0 ? wrong : -wrong;
        Exact<char> y(y_bytes(p.c, 9));
        launch(p, Form::bitmap, device, y, 9, 1);
      }
    }
  }
}

void test_errors(const Device& device) {
  SparseProblem p({2, 20, 30, WeightType::s8, 0.5, false, Dtype::f32});
  Exact<char> y(2 * 20 * 4), workspace(4096);
  sl::CudaArgs good;
  static_cast<sl::Args&>(good) = p.args(y.data(), 20);
  good.workspace = workspace.data();
  good.workspace_bytes = workspace.count();
  sl::CudaBitmap bitmap{p.c.type, 20, 30, p.nnz, p.bits.data(), p.values.data(), p.row_start.data()};
  expect_argument_errors(good, [&](const sl::Args& a) {
    sl::CudaArgs args = good;
    static_cast<sl::Args&>(args) = a;
    sl::run_bitmap_cuda(args, bitmap, device.place);
  });
  const auto bitmap_error = [&](const char* message,
                                const std::function<void(sl::CudaArgs&, sl::CudaBitmap&)>& change) {
    sl::CudaArgs args = good;
    sl::CudaBitmap weight = bitmap;
    change(args, weight);
    expect_error(message, message, [&] { sl::run_bitmap_cuda(args, weight, device.place); });
  };
  bitmap_error("the workspace has 10 bytes", [](auto& a, auto&) { a.workspace_bytes = 10; });
  bitmap_error("the bitmap is missing", [](auto&, auto& w) { w.bits = nullptr; });
  bitmap_error("row_start is missing", [](auto&, auto& w) { w.row_start = nullptr; });
  bitmap_error("the values are missing", [](auto&, auto& w) { w.values = nullptr; });
  bitmap_error("a multiple of 16 bytes", [](auto&, auto& w) { w.values = static_cast<const char*>(w.values) + 1; });
  bitmap_error("belongs to an int8 weight", [](auto&, auto& w) { w.type = WeightType::bf16; });
  const auto form_error = [&](const char* message, const std::function<void(sl::CudaArgs&, sl::Cuda2to4&)>& change) {
    sl::CudaArgs args = good;
    sl::Cuda2to4 weight{WeightType::s8, 20, 30, reinterpret_cast<uint32_t*>(workspace.data()), workspace.data()};
    change(args, weight);
    expect_error(message, message, [&] { sl::run_2to4_cuda(args, weight, device.place); });
  };
  form_error("an f32 weight has no 2:4 form",
             [](auto& a, auto& w) { w.type = WeightType::f32, a.weight_scale = nullptr; });
  form_error("different types", [](auto& a, auto& w) { w.type = WeightType::bf16, a.weight_scale = nullptr; });
  form_error("the 2:4 form is missing", [](auto&, auto& w) { w.tiles = nullptr; });
}

// ---- bytes and bank conflicts ----------------------------------------------------------------------------------------

struct Counted {
  emulator::Counters counters;
  size_t shared;
  unsigned threads, blocks;
};

// All launches of a call; shared memory and threads of the last.
Counted count(SparseProblem& p, Form form, const Device& device) {
  Exact<char> y(y_bytes(p.c, p.c.n));
  sl::CudaArgs args;
  static_cast<sl::Args&>(args) = p.args(y.data(), p.c.n);
  emulator::Options options;
  options.yield = 0;
  const auto run = [&](const auto& weight, const auto& call) {
    Exact<char> workspace(sl::workspace_bytes(args, weight));
    args.workspace = workspace.data();
    args.workspace_bytes = workspace.count();
    emulator::run(options, [&] { call(args, weight, device.place); });
  };
  if (form == Form::bitmap) {
    run(sl::CudaBitmap{p.c.type, p.c.n, p.c.k, p.nnz, p.bits.data(), p.values.data(), p.row_start.data()},
        sl::run_bitmap_cuda);
  } else {
    Packed packed(p);
    run(sl::Cuda2to4{p.c.type, p.c.n, p.c.k, packed.metadata.data(), packed.tiles.data()}, sl::run_2to4_cuda);
  }
  compare(p, device.name, "counted", y, p.c.n);
  const auto& last = emulator::launches().back();
  return {emulator::counters(), last.shared_bytes, last.block.x, last.grid.x};
}

void print_counted(const char* kernel, const SparseCase& c, double kept, const Counted& counted, double floor) {
  constexpr const char* kTypes[] = {"fp32", "bf16", "int8", "fp16"};
  const emulator::Counters& n = counted.counters;
  const unsigned long long conflicts = n.matrix_conflicts + n.shared_conflicts,
                           phases = n.matrix_phases + n.shared_phases;
  std::printf(
      "counted op=sparse_linear kernel=%s case=M=%lld,K=%lld,N=%lld,%s,kept=%g bytes=%llu sectors=%llu floor=%.0f "
      "shared=%zu threads=%u blocks=%u conflicts=%llu phases=%llu\n",
      kernel, (long long)c.m, (long long)c.k, (long long)c.n, kTypes[int(c.type)], kept,
      (unsigned long long)n.requested_bytes(), (unsigned long long)n.moved_bytes(), floor, counted.shared,
      counted.threads, counted.blocks, conflicts, phases);
}

void expect_at_most(const SparseProblem& p, const char* what, double got, double limit) {
  if (!(got <= limit)) {
    fail(p, "counted", what, std::to_string(got) + ", expected at most " + std::to_string(limit));
  }
}

// The floor: bitmap, values, row_start, x and y once. What memory must move is that; what the kernel asks for is that, and
// x once more for every further block: that comes from L2, and is a twentieth of all where a layer is wide.
void count_bitmap(const Device& device) {
  for (const SparseCase& c : {SparseCase{1, 14336, 512, WeightType::bf16, 0.5, false, Dtype::bf16},
                              SparseCase{1, 4096, 4096, WeightType::bf16, 0.2, false, Dtype::bf16},
                              SparseCase{1, 2048, 4096, WeightType::s8, 0.2, false, Dtype::bf16},
                              SparseCase{8, 2048, 2048, WeightType::f16, 0.2, false, Dtype::f16}}) {
    SparseProblem p(c);
    const Counted counted = count(p, Form::bitmap, device);
    const double size = pc::dtype_size(c.dtype);
    const double floor = double(p.nnz) * sl::weight_size(c.type) + double(c.n) * double((c.k + 7) / 8) +
                         double(c.m * (c.k + c.n)) * size + 8.0 * double(c.n + 1);
    print_counted("sparse_bitmap", c, c.kept, counted, floor);
    expect_at_most(p, "sectors", double(counted.counters.moved_bytes()), 1.05 * floor);
    const double copies = double(counted.blocks - 1) * double(c.m * c.k) * (c.type == WeightType::s8 ? 1 : size);
    const auto bytes = double(counted.counters.requested_bytes());
    expect_at_most(p, "bytes", c.n > 10000 ? bytes : bytes - copies, 1.05 * floor);
  }
}

void count_2to4(const Device& device) {
  for (const SparseCase& base : {SparseCase{16, 1024, 1024, WeightType::bf16, 0.8, false, Dtype::bf16},
                                 SparseCase{256, 1024, 1024, WeightType::bf16, 0.8, false, Dtype::bf16},
                                 SparseCase{256, 1024, 1024, WeightType::s8, 0.8, false, Dtype::bf16}}) {
    SparseCase c = base;
    c.two_of_four = true;
    SparseProblem p(c);
    const Counted counted = count(p, Form::two_to_four, device);
    const double size = sl::weight_size(c.type), half = double(c.n * c.k) / 2;
    print_counted("sparse_2to4", c, double(p.nnz) / double(c.n * c.k), counted,
                  half * size + half / 4 + double(c.m * (c.k + c.n)) * 2);
    expect_at_most(p, "bank conflicts", double(counted.counters.matrix_conflicts + counted.counters.shared_conflicts),
                   0);
  }
}

}  // namespace

int main() {
  const std::vector<Device> all = devices();
  test_bitmap(all);
  std::printf("bitmap: %d cases\n", cases_run);
  test_2to4(all);
  std::printf("with 2:4: %d cases\n", cases_run);
  test_bad_rows(all[0], Form::bitmap);
  test_bad_rows(all[0], Form::two_to_four);
  test_damaged_row_start(all[1]);
  test_errors(all[0]);
  count_bitmap({"H100", {emulator::add_device({9, 0, 132}), nullptr}});
  count_2to4(all[0]);
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
