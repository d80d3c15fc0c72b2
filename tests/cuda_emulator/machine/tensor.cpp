// ldmatrix and mma. Each is carried out for the whole warp at once: the fragments of all lanes are put together to
// plain matrices by the layouts of the PTX manual, multiplied, and handed out again.
//
// Words of the manual: lane = 4 * group + member; group 0..7, member 0..3.
#include "cuda_emulator/tensor.h"

#include <cmath>
#include <cstring>

#include "cuda_emulator/float16.h"
#include "cuda_emulator/memory.h"
#include "machine/machine.h"

namespace emulator {

// ---- ldmatrix -------------------------------------------------------------------------------------------------------

namespace {

struct MatrixLoad {
  uint32_t* r;
  const void* shared;
};

void check_row(const Lanes& lanes, int lane) {
  const void* row = lanes.of<MatrixLoad>(lane).shared;
  if (misaligned(row, 16) || !is_shared(row, 16)) {
    machine().fault("ldmatrix: the row of lane " + std::to_string(lane) + " is at byte " +
                    std::to_string(static_cast<const char*>(row) - shared_memory()) + " of " +
                    std::to_string(machine().launch().shared_bytes) +
                    " of shared memory: outside of it, or not aligned to 16 bytes");
  }
}

void load_matrices_together(const Lanes& lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    check_row(lanes, lane);
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t rows[8][8];
    uint64_t addresses[8];
    for (int row = 0; row < 8; ++row) {
      const void* shared = lanes.of<MatrixLoad>(8 * matrix + row).shared;
      std::memcpy(rows[row], shared, 16);
      addresses[row] = reinterpret_cast<uint64_t>(shared);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = 2 * (lane % 4);
      lanes.of<MatrixLoad>(lane).r[matrix] = uint32_t{rows[group][pair + 1]} << 16 | rows[group][pair];
    }
    if (machine().options().count) {
      ++machine().counters().matrix_phases;
      machine().counters().matrix_conflicts += bank_conflicts(addresses, 8, 16);
    }
  }
}

const Operation kLoadX4{"ldmatrix.x4", load_matrices_together};

}  // namespace

void load_matrices(uint32_t* r, const void* shared) {
  MatrixLoad load{r, shared};
  together(kLoadX4, ~0u, &load);
}

// ---- mma ------------------------------------------------------------------------------------------------------------

namespace {

struct Fragments {
  void* d;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t meta;
};

constexpr int kRows = 16, kColumns = 8;

// The formats: how many elements a register holds, what they and their products' sums are.
struct Bytes {
  static constexpr int kPerRegister = 4;
  using Element = int8_t;
  using Sum = uint32_t;  // wraps around
  static Sum product(Element a, Element b) { return static_cast<uint32_t>(int{a} * int{b}); }
  static Element element(uint32_t r, int i) { return static_cast<int8_t>(r >> 8 * i); }
};
template <float (*Widen)(uint16_t)>
struct Floats {
  static constexpr int kPerRegister = 2;
  using Element = float;
  using Sum = float;  // products are exact; each is added, k ascending, and rounded to nearest
  static Sum product(Element a, Element b) { return a * b; }
  static Element element(uint32_t r, int i) { return Widen(static_cast<uint16_t>(r >> 16 * i)); }
};

// A register of a holds, for lane 4 * group + member: row group (registers 0, 2) or group + 8 (1, 3), the columns
// member * kPerRegister and following, from half of the columns on for registers 2 and 3. Of a sparse a this is its
// matrix of kept elements, half as wide as what it stands for.
template <class Format, int Width>
void gather_a(const Lanes& lanes, typename Format::Element (&a)[kRows][Width]) {
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* r = lanes.of<Fragments>(lane).a;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i % 2);
      const int column = lane % 4 * Format::kPerRegister + Width / 2 * (i / 2);
      for (int e = 0; e < Format::kPerRegister; ++e) {
        a[row][column + e] = Format::element(r[i], e);
      }
    }
  }
}

// Register i of b: column group; rows member * kPerRegister and following of the i-th part of 4 * kPerRegister rows.
template <class Format, int K>
void gather_b(const Lanes& lanes, typename Format::Element (&b)[K][kColumns]) {
  constexpr int kPart = 4 * Format::kPerRegister;
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* r = lanes.of<Fragments>(lane).b;
    for (int i = 0; i < K / kPart; ++i) {
      for (int e = 0; e < Format::kPerRegister; ++e) {
        b[i * kPart + lane % 4 * Format::kPerRegister + e][lane / 4] = Format::element(r[i], e);
      }
    }
  }
}

// d: registers 0, 1 are row group, 2, 3 row group + 8; columns 2 * member and the next.
template <class Format, int K>
void add_product(const Lanes& lanes, const typename Format::Element (&a)[kRows][K],
                 const typename Format::Element (&b)[K][kColumns]) {
  for (int lane = 0; lane < 32; ++lane) {
    typename Format::Sum d[4];
    std::memcpy(d, lanes.of<Fragments>(lane).d, sizeof(d));
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < K; ++k) {
        d[i] += Format::product(a[row][k], b[k][column]);
      }
    }
    std::memcpy(lanes.of<Fragments>(lane).d, d, sizeof(d));
  }
}

template <class Format, int K>
void multiply_dense(const Lanes& lanes) {
  typename Format::Element a[kRows][K], b[K][kColumns];
  gather_a<Format>(lanes, a);
  gather_b<Format>(lanes, b);
  add_product<Format>(lanes, a, b);
}

// Four bits say which two of four columns are kept, the lower one first. A register of metadata has eight such groups:
//   16-bit elements, K = 32: members 0 and 1 (selector 0) hold those of columns 0..15 and 16..31, of row group in the
//     lower 16 bits and of row group + 8 in the upper 16;
//   bytes, K = 64: members 0 and 1 hold those of columns 0..31 of row group and row group + 8, members 2 and 3 those of
//     columns 32..63.
template <class Format>
unsigned kept_places(const Lanes& lanes, int row, int quad) {
  const int group = row % 8, upper = row / 8;
  if (Format::kPerRegister == 2) {
    return lanes.of<Fragments>(4 * group + quad / 4).meta >> (16 * upper + 4 * (quad % 4)) & 15;
  }
  return lanes.of<Fragments>(4 * group + upper + 2 * (quad / 8)).meta >> 4 * (quad % 8) & 15;
}

template <class Format, int K>
void multiply_sparse(const Lanes& lanes) {
  typename Format::Element kept[kRows][K / 2], a[kRows][K] = {}, b[K][kColumns];
  gather_a<Format>(lanes, kept);
  gather_b<Format>(lanes, b);
  for (int row = 0; row < kRows; ++row) {
    for (int quad = 0; quad < K / 4; ++quad) {
      const unsigned places = kept_places<Format>(lanes, row, quad), first = places & 3, second = places >> 2;
      if (first >= second) {
        machine().fault("mma.sp: the metadata of row " + std::to_string(row) + ", columns " + std::to_string(4 * quad) +
                        " to " + std::to_string(4 * quad + 3) + " names the places " + std::to_string(first) + " and " +
                        std::to_string(second) + ": they must ascend (ordered_metadata)");
      }
      a[row][4 * quad + static_cast<int>(first)] = kept[row][2 * quad];
      a[row][4 * quad + static_cast<int>(second)] = kept[row][2 * quad + 1];
    }
  }
  add_product<Format>(lanes, a, b);
}

using Bf16 = Floats<bfloat16_to_float>;
using F16 = Floats<half_to_float>;

const Operation kMultiply[] = {
    {"mma.m16n8k32.s8", multiply_dense<Bytes, 32>},
    {"mma.sp.m16n8k64.s8", multiply_sparse<Bytes, 64>},
    {"mma.sp.m16n8k32.bf16", multiply_sparse<Bf16, 32>},
    {"mma.sp.m16n8k32.f16", multiply_sparse<F16, 32>},
};

}  // namespace

void multiply(Multiply kind, void* d, const uint32_t* a, const uint32_t* b, uint32_t meta) {
  Fragments fragments{d, a, b, meta};
  together(kMultiply[static_cast<int>(kind)], ~0u, &fragments);
}

// ---- exp2 -----------------------------------------------------------------------------------------------------------

float exp2_fast(float x) {
  constexpr float kSmallest = 0x1p-126f;
  if (x != x) return x;
  if (std::fabs(x) < kSmallest) return 1.0f;
  const float exact = std::exp2(x);
  if (exact < kSmallest) return 0.0f;
  if (exact == INFINITY) return exact;
  const uint32_t hash = bits_as<uint32_t>(x) * 0x9e3779b1u >> 16;
  const float near = bits_as<float>(bits_as<uint32_t>(exact) + hash % 5 - 2);
  return near < kSmallest ? 0.0f : near;
}

}  // namespace emulator
