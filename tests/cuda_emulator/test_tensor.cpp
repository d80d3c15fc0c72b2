// ldmatrix and mma against the PTX manual's formulas, element by element as it writes them, and plain products; the
// metadata of 2:4 matrices against the order in which CUTLASS stores it (reorder_meta).
#include <random>

#include "check.h"
#include "faults.h"

namespace emulator_tests {

namespace {

namespace cuda = pycompress::cuda;

constexpr int kRows = 16, kColumns = 8, kLanes = 32;

// ---- ldmatrix -------------------------------------------------------------------------------------------------------

struct MatrixParams {
  cuda::Global<uint32_t> out;
  int pitch;  // bytes from a row to the next
};

constexpr int kMatrixRows = 32;

__global__ void load_matrices(MatrixParams p) {
  char* s = cuda::dynamic_shared();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) {
    const auto element = static_cast<uint16_t>(lane * 8 + i);
    cuda::shared_store(s + lane * p.pitch + 2 * i, element);
  }
  __syncwarp();
  uint32_t r[4];
  cuda::ldmatrix_x4(r, s + lane * p.pitch);
  for (int i = 0; i < 4; ++i) {
    p.out.store(lane * 4 + i, r[i]);
  }
}

void test_ldmatrix() {
  emulator::Buffer<uint32_t> out(kLanes * 4, "out");
  cuda::launch("test", "load_matrices", load_matrices, cuda::Place{}, {dim3(1), dim3(kLanes), kMatrixRows * 48},
               MatrixParams{out.data(), 48});
  const auto element = [](int matrix, int row, int column) {
    return static_cast<uint32_t>((8 * matrix + row) * 8 + column);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int major = lane / 4, minor = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const auto at = static_cast<size_t>(lane * 4 + i);
      CHECK(out[at] == (element(i, major, minor) | element(i, major, minor + 1) << 16));
    }
  }
}

// ---- mma ------------------------------------------------------------------------------------------------------------

enum class Kind { kS8, kSparseS8, kSparseBf16, kSparseF16 };

struct MultiplyParams {
  cuda::Global<const uint32_t> a, b, meta, c;
  cuda::Global<uint32_t> d;
};

template <Kind kKind>
__global__ void multiply(MultiplyParams p) {
  constexpr bool kBytes = kKind == Kind::kS8 || kKind == Kind::kSparseS8;
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[4], b[4];
  std::conditional_t<kBytes, int32_t, float> d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = p.a.load(4 * lane + i);
    b[i] = p.b.load(4 * lane + i);
    const uint32_t c = p.c.load(4 * lane + i);
    std::memcpy(&d[i], &c, 4);
  }
  const uint32_t meta = p.meta.load(lane), b2[2] = {b[0], b[1]};
  if constexpr (kKind == Kind::kS8) cuda::mma_s8(d, a, b2);
  if constexpr (kKind == Kind::kSparseS8) cuda::mma_sp_s8(d, a, b, meta);
  if constexpr (kKind == Kind::kSparseBf16) cuda::mma_sp_bf16(d, a, b, meta);
  if constexpr (kKind == Kind::kSparseF16) cuda::mma_sp_f16(d, a, b, meta);
  for (int i = 0; i < 4; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &d[i], 4);
    p.d.store(4 * lane + i, bits);
  }
}

// a [16, K], b [K, 8], c [16, 8] of small integers, which every type holds and adds exactly.
struct Matrices {
  std::vector<int> a, b, c;
  std::vector<int> first, second;  // of a 2:4 sparse a: the kept columns of every four, 0..3
  int k;

  int product(int row, int column) const {
    int sum = c[static_cast<size_t>(row * kColumns + column)];
    for (int i = 0; i < k; ++i) {
      sum += a[static_cast<size_t>(row * k + i)] * b[static_cast<size_t>(i * kColumns + column)];
    }
    return sum;
  }
};

Matrices draw(int k, bool sparse, int limit, std::mt19937& random) {
  std::uniform_int_distribution<int> element(-limit, limit), place(0, 3);
  Matrices m{std::vector<int>(static_cast<size_t>(kRows * k)),
             std::vector<int>(static_cast<size_t>(k * kColumns)),
             std::vector<int>(kRows * kColumns),
             {},
             {},
             k};
  for (auto* matrix : {&m.a, &m.b, &m.c}) {
    for (int& x : *matrix) {
      x = element(random);
    }
  }
  for (int quad = 0; sparse && quad < kRows * k / 4; ++quad) {
    int first = place(random), second = place(random);
    while (second == first) {
      second = place(random);
    }
    m.first.push_back(std::min(first, second));
    m.second.push_back(std::max(first, second));
    for (int i = 0; i < 4; ++i) {
      if (i != first && i != second) m.a[static_cast<size_t>(4 * quad + i)] = 0;
    }
  }
  return m;
}

// The bits of an integer as an element: a byte, bfloat16 or half, in the place of the i-th element of a register.
uint32_t bits(Kind kind, int x, int i) {
  switch (kind) {
    case Kind::kS8:
    case Kind::kSparseS8: return (static_cast<uint32_t>(x) & 0xff) << 8 * (i % 4);
    case Kind::kSparseBf16:
      return uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)))} << 16 * (i % 2);
    default: return uint32_t{__half_as_ushort(__float2half_rn(static_cast<float>(x)))} << 16 * (i % 2);
  }
}

// The element a_i of a lane, by the manual's formulas: dense from the matrix, sparse the first or second that is kept
// of four columns.
int element_of_a(const Matrices& m, bool bytes, bool sparse, int lane, int i) {
  const int group = lane / 4, member = lane % 4;
  const auto a = [&](int row, int column) { return m.a[static_cast<size_t>(row * m.k + column)]; };
  const auto kept = [&](int row, int four, int which) {
    const auto quad = static_cast<size_t>(row * m.k / 4 + four);
    return a(row, 4 * four + (which == 0 ? m.first[quad] : m.second[quad]));
  };
  if (bytes) {
    const int row = i < 4 || (8 <= i && i < 12) ? group : group + 8;
    if (!sparse) return a(row, member * 4 + (i & 3) + (i < 8 ? 0 : 16));
    const int first_column = member * 8 + (i < 8 ? 0 : 32);
    return kept(row, first_column / 4 + (i & 3) / 2, i & 1);
  }
  const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
  const int first_column = member * 4 + (i < 4 ? 0 : 16);
  return kept(row, first_column / 4, i & 1);
}

int element_of_b(const Matrices& m, bool bytes, int lane, int i) {
  const int member = lane % 4, column = lane / 4;
  const int row = bytes ? member * 4 + (i & 3) + i / 4 * 16 : member * 2 + (i & 1) + i / 2 * 8;
  return m.b[static_cast<size_t>(row * kColumns + column)];
}

// CUTLASS keeps metadata in units of 16 bits (16-bit types) or 32 (bytes), of a row each, as a matrix [rows, 2] that it
// permutes: rows spread over groups of 32 or 16, then every 2 x 2 turned, then stored two columns side by side. Lane l
// reads the l-th 32 bits. (A 16-bit warp tile has 32 rows there; only the first 16 are of this product.)
std::vector<uint32_t> metadata(const Matrices& m, bool bytes) {
  const int rows = bytes ? 16 : 32, group = bytes ? 16 : 32, interweave = bytes ? 2 : 4, quads = bytes ? 8 : 4;
  std::vector<uint32_t> stored(static_cast<size_t>(rows * 2), bytes ? 0x44444444u : 0x4444u);
  for (int row = 0; row < kRows; ++row) {
    for (int unit = 0; unit < 2; ++unit) {
      uint32_t value = 0;
      for (int i = 0; i < quads; ++i) {
        const auto quad = static_cast<size_t>(row * m.k / 4 + unit * quads + i);
        value |= static_cast<uint32_t>(m.first[quad] | m.second[quad] << 2) << 4 * i;
      }
      int to_row = row / group * group + row % 8 * interweave + row % group / 8, to_unit = unit;
      if (to_row % 2 == 0 && to_unit == 1) {
        ++to_row;
        --to_unit;
      } else if (to_row % 2 == 1 && to_unit == 0) {
        --to_row;
        ++to_unit;
      }
      stored[static_cast<size_t>(to_row * 2 + to_unit)] = value;
    }
  }
  if (bytes) return stored;
  std::vector<uint32_t> words(kLanes);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    words[lane] = stored[2 * lane] | stored[2 * lane + 1] << 16;
  }
  return words;
}

template <Kind kKind>
void test_multiply(int k, int limit) {
  constexpr bool kBytes = kKind == Kind::kS8 || kKind == Kind::kSparseS8;
  constexpr bool kSparse = kKind >= Kind::kSparseS8;
  constexpr int kPerRegister = kBytes ? 4 : 2;
  std::mt19937 random(static_cast<unsigned>(k + limit));
  for (int round = 0; round < 4; ++round) {
    const Matrices m = draw(k, kSparse, limit, random);
    std::vector<uint32_t> a(kLanes * 4), b(kLanes * 4), c(kLanes * 4);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4 * kPerRegister; ++i) {
        const auto at = static_cast<size_t>(4 * lane + i / kPerRegister);
        a[at] |= bits(kKind, element_of_a(m, kBytes, kSparse, lane, i), i);
        if (kSparse || i < 2 * kPerRegister) b[at] |= bits(kKind, element_of_b(m, kBytes, lane, i), i);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        const int value = m.c[static_cast<size_t>(row * kColumns + column)];
        c[static_cast<size_t>(4 * lane + i)] =
            kBytes ? static_cast<uint32_t>(value) : __float_as_uint(static_cast<float>(value));
      }
    }
    const emulator::Buffer<uint32_t> in_a(a, "a"), in_b(b, "b"), in_c(c, "c");
    const emulator::Buffer<uint32_t> meta(kSparse ? metadata(m, kBytes) : std::vector<uint32_t>(kLanes), "meta");
    emulator::Buffer<uint32_t> d(kLanes * 4, "d");
    cuda::launch("test", "multiply", multiply<kKind>, cuda::Place{}, {dim3(1), dim3(kLanes)},
                 MultiplyParams{in_a.data(), in_b.data(), meta.data(), in_c.data(), d.data()});
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int expected = m.product(lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1));
        const uint32_t found = d[static_cast<size_t>(4 * lane + i)];
        CHECK(kBytes ? static_cast<int>(found) == expected : __uint_as_float(found) == static_cast<float>(expected));
      }
    }
  }
}

}  // namespace

void test_tensor() {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    emulator::Options options;
    options.seed = seed;
    emulator::run(options, [] {
      test_ldmatrix();
      test_multiply<Kind::kS8>(32, 127);
      test_multiply<Kind::kSparseS8>(64, 127);
      test_multiply<Kind::kSparseBf16>(32, 127);
      test_multiply<Kind::kSparseF16>(32, 500);
    });
  }
}

}  // namespace emulator_tests
