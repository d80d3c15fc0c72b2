// Linear layer with a 4-bit weight, scaled in groups along K: decode, multiply, add bias, activate. One call.
//
//   y[m,n] = act(sum_k x[m,k] * w[n,k] + bias[n])          g = k / group_size, the last group may be short
//
//   int4   w[n,k] = scale[n,g] * (q[n,k] - zero_point[n,g]), q in 0..15; zero_point 8 throughout where none is given
//   nf4    w[n,k] = scale[n,g] * kNf4[q[n,k]]
//
// x: f32, bf16 or f16 [M,K], any strides. y: x's dtype, rows ldy apart. bias: any of the dtypes, or null.
// Sums are fp32 (scalar: float64). q - zero_point is taken before it meets x, exactly: sum x q - zero_point sum x would
// cancel where x has a mean. The result does not depend on the number of threads. Few rows (at most 16 with AVX-512, 12
// with AVX2) are summed in one order, many in another: within either, a row does not depend on the other rows.
// NaN and Inf follow float arithmetic, in their own row of y only. Finite x may overflow where |x| comes near
// FLT_MAX / 16, before the scale makes the product small. M == 0 or N == 0 does nothing; K == 0 gives act(bias).
// Nothing of size M x N is allocated beside y.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/linear_args.h"
#include "common/range.h"

namespace pycompress::int4_matmul {

using pycompress::Activation;

enum class Format : int { int4 = 0, nf4 = 1 };

// NormalFloat of QLoRA (Dettmers et al. 2023): quantiles of the normal distribution; the very floats of bitsandbytes.
constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};
constexpr int kSymmetricZeroPoint = 8;

constexpr int64_t kMaxK = int64_t(1) << 24;
constexpr int kUnit = 8;  // values of k in 32 bits

// The weight as modules keep it: plain arrays, the same on every machine.
struct PlainWeight {
  const uint8_t* q;           // [N, ceil(K/2)]: byte j holds k = 2j in its low half, k = 2j+1 in its high half
  const float* scale;         // [N, G]
  const uint8_t* zero_point;  // [N, G], or null: 8 throughout, or nf4
};

struct Shape {
  int64_t n = 0, k = 0, group_size = 1;
  Format format = Format::int4;
  bool has_zero_point = false;
};

// How a kernel wants the weight. A panel is `nr` outputs wide (the last one is cut to a multiple of `lanes`); inside it
// the groups of K follow each other, each with all that its outputs need. A unit is 8 consecutive k of one output, 32
// bits, k in the lowest four first; a group that is no multiple of 8 is filled up with q = 0, which meets x = 0.
//
//   panel 0                                                                                 | panel 1
//   | group 0                                                                      | group 1
//   | scale f32: n0 n1 .. n(nr-1) | zero_point u8: n0 .. | n0: k0..k7 | n1: k0..k7 | ... | n0: k8..k15 | ...
//
// So M = 1 reads one stream from end to end, 0.53 bytes a weight at group_size 128. zero_point is there only where the
// weight has them.
struct Layout {
  int id;
  int nr, lanes;
};

constexpr Layout kRows{0, 1, 1};       // scalar: output by output
constexpr Layout kUnits8{1, 32, 8};    // avx2: a register holds a unit of 8 outputs
constexpr Layout kUnits16{2, 64, 16};  // avx512: of 16
constexpr Layout kLayouts[] = {kRows, kUnits8, kUnits16};

// Start of every packed weight, followed by the panels, 64-byte aligned.
struct PackedHeader {
  uint32_t magic;    // "pci4"
  uint16_t version;  // kPackedVersion
  uint8_t layout;    // Layout::id
  uint8_t format;    // Format
  int64_t n, k, group_size;
  int64_t total_bytes;
  uint8_t has_zero_point;
  uint8_t unused[15];
  uint64_t checksum;  // of the bytes before it
};
static_assert(sizeof(PackedHeader) == 64, "the panels behind the header must stay aligned to 64 bytes");

constexpr uint32_t kPackedMagic = 0x34696370;
constexpr uint16_t kPackedVersion = 1;

// Sizes that follow from a shape. Units are counted for one output.
struct Groups {
  int64_t count, units, last_units;  // groups; units of each but the last; of the last
  int64_t total_units;
};

static inline Groups groups_of(const Shape& s) {
  const int64_t count = (s.k + s.group_size - 1) / s.group_size;
  if (count == 0) return {0, 0, 0, 0};
  const int64_t last = s.k - (count - 1) * s.group_size;
  const int64_t units = (s.group_size + kUnit - 1) / kUnit, last_units = (last + kUnit - 1) / kUnit;
  return {count, units, last_units, (count - 1) * units + last_units};
}

// Bytes of scales and zero points in front of a group's units, in a panel of `width` outputs.
static inline int64_t head_bytes(const Shape& s, int64_t width) { return width * (s.has_zero_point ? 5 : 4); }

static inline int64_t panel_bytes(const Shape& s, const Groups& g, int64_t width) {
  return g.count * head_bytes(s, width) + g.total_units * width * 4;
}

struct PackedWeight {
  const Layout* layout;
  Shape shape;
  const uint8_t* panels;
};

struct Args : LinearArgs {};  // weight_scale must be null: the packed weight holds the scales

// ---- what a kernel file provides -------------------------------------------------------------------------------

// One thread's share: rows [rows.begin, rows.end) times panels [panels.begin, panels.end).
struct Block {
  const Args* args;
  PackedWeight weight;
  const float* bias;  // [N, padded to whole registers] in f32; zeros where there is none
  Range rows, panels;
  char* scratch;  // scratch_bytes(m, shape) of it, this thread's own
};

struct Kernel {
  const char* name;
  Isa isa;
  Layout layout;
  void (*run)(const Block&);
  int64_t (*scratch_bytes)(int64_t m, const Shape& shape);
};

extern const Kernel kScalar, kAvx2, kAvx512;

// ---- int4_matmul.cpp -------------------------------------------------------------------------------------------

// The best kernel that may run here; its layout is the one to pack for.
const Kernel& best_kernel();
// The best kernel that may run here and reads this layout. The scalar one reads all.
const Kernel& kernel_for(const Layout& layout);

// A packed weight, its header checked, and the kernel that reads it: found once, used for many calls.
struct Prepared {
  PackedWeight weight;
  const Kernel* kernel;
};
Prepared prepare(const void* packed, int64_t bytes);

// Checks every field, then computes. Throws ArgumentError before any work.
void run(const Args& args, const Prepared& prepared);

// ---- pack.cpp --------------------------------------------------------------------------------------------------

int64_t padded_n(const Layout& layout, int64_t n);
int64_t panel_count(const Layout& layout, int64_t n);
int64_t packed_bytes(const Layout& layout, const Shape& shape);  // checks the shape

// dst: packed_bytes, 64-byte aligned.
void pack(const Layout& layout, const Shape& shape, const PlainWeight& weight, void* dst);
// Back to the plain arrays, each bit as it was; an array that is null is left out. The half byte behind an odd K is 0.
void unpack(const PackedWeight& packed, uint8_t* q, float* scale, uint8_t* zero_point);
void unpack_row(const PackedWeight& packed, int64_t n, uint8_t* q, float* scale, uint8_t* zero_point);

// Checks the header against the buffer: magic, version, checksum, layout, sizes.
PackedWeight open_packed(const void* data, int64_t bytes);

}  // namespace pycompress::int4_matmul
