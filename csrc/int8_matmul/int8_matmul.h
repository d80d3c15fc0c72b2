// Int8 linear layer: quantise the rows of x, multiply with the int8 weight, scale, add bias, activate. One call.
//
//   y[m,n] = act(x_scale[m] * w_scale[n] * sum_k (qx[m,k] - zero_point) * qw[n,k] + bias[n])
//
//   dynamic      x_scale[m] = max(max_k |x[m,k]| / 127, FLT_MIN), qx = rne(x * (1 / x_scale)), zero_point = 0
//   static       x_scale and zero_point (0..255) given once; qx = clamp(rne(x * (1 / x_scale)) + zero_point, 0, 255)
//   weight_only  y[m,n] = act(w_scale[n] * sum_k x[m,k] * qw[n,k] + bias[n]), fp32 accumulation
//
// x: f32, bf16 or f16 [M,K], any strides. y: x's dtype, rows ldy apart. bias: any of the dtypes, or null.
// The integer sum is exact for every K: int32 over at most kMaxChunkK terms, int64 beyond.
// dynamic and static: a row of x that holds NaN or Inf gives NaN in that row of y and nowhere else; a zero row
// gives act(bias). weight_only follows float arithmetic. M == 0 or N == 0 does nothing; K == 0 gives act(bias).
// Nothing of size M x N is allocated beside y, and no copy of x in float.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/linear_args.h"
#include "common/range.h"

namespace pycompress::int8_matmul {

enum class Mode : int { dynamic_ = 0, static_ = 1, weight_only = 2 };
using pycompress::Activation;

// |sum_k w * (q - zero_point)| <= 128 * 256 * K and |sum_k (w + 128) * q| <= 255 * 128 * K stay below 2^31.
constexpr int64_t kMaxChunkK = 65472;
// The sums of a row of the weight stay below 2^31 up to this K.
constexpr int64_t kMaxK = int64_t(1) << 24;

// How a kernel wants the weight. A panel is `nr` outputs wide (the last one is cut to a multiple of `lanes`);
// inside it, k advances in groups of `ku`, and each output holds its ku values side by side:
//
//   panel 0                                                       panel 1
//   | n0: k0..k(ku-1) | n1: k0..k(ku-1) | ... | n(nr-1) | n0: k(ku).. | ...
//
// nr = 64, ku = 4 is one AVX-512 VNNI step: 64 columns, 4 consecutive k each, 256 bytes. K is padded to ku and N to
// `lanes` with zero weights. `offset` is added to every stored value: +128 makes the weight unsigned, because
// vpdpbusd multiplies u8 by s8; the sum of the row of x undoes it.
struct Layout {
  int id;
  int nr, ku, lanes, offset;
};

constexpr Layout kRowMajor{0, 1, 1, 1, 0};     // scalar: the plain [N,K]
constexpr Layout kPairs8{1, 16, 2, 8, 0};      // avx2: 8 outputs x 2 k of s8 widen to one register of s16
constexpr Layout kQuads8{2, 16, 4, 8, 128};    // avxvnni
constexpr Layout kPairs16{3, 64, 2, 16, 0};    // avx512
constexpr Layout kQuads16{4, 64, 4, 16, 128};  // avx512vnni
// For int8_conv2d, where x is the unsigned operand: padding and zero point are one stored value, and no sums of x are
// needed for every window.
constexpr Layout kSignedQuads8{5, 16, 4, 8, 0};    // avxvnni
constexpr Layout kSignedQuads16{6, 64, 4, 16, 0};  // avx512vnni
constexpr Layout kLayouts[] = {kRowMajor, kPairs8, kQuads8, kPairs16, kQuads16, kSignedQuads8, kSignedQuads16};

// Start of every packed weight, followed by int32 column_sum[n_padded] and the panels, each 64-byte aligned.
struct PackedHeader {
  uint32_t magic;    // "pci8"
  uint16_t version;  // kPackedVersion
  uint16_t layout;   // Layout::id
  int64_t n, k;
  int64_t total_bytes;
  uint8_t unused[24];
  uint64_t checksum;  // of the bytes before it
};
static_assert(sizeof(PackedHeader) == 64, "the panels behind the header must stay aligned to 64 bytes");

constexpr uint32_t kPackedMagic = 0x38696370;
constexpr uint16_t kPackedVersion = 1;

struct PackedWeight {
  const Layout* layout;
  int64_t n, k;
  const int32_t* column_sum;  // [n_padded] sum_k qw[n,k]
  const uint8_t* panels;
};

struct Args : LinearArgs {
  Mode mode = Mode::dynamic_;
  const float* input_scale = nullptr;         // one value; static only
  const int32_t* input_zero_point = nullptr;  // one value in 0..255; static only
};

// ---- what a kernel file provides -------------------------------------------------------------------------------

// One thread's share: rows [rows.begin, rows.end) times panels [panels.begin, panels.end).
struct Block {
  const Args* args;
  PackedWeight weight;
  const float* bias;   // [N, padded to whole registers] in f32; zeros where there is none
  const float* scale;  // [N, padded likewise] weight_scale
  float input_scale;   // static
  int32_t zero_point;  // static: less 128, so that it goes with s8 activations; else 0
  Range rows, panels;
  char* scratch;  // scratch_bytes(mode, k) of it, this thread's own
};

struct Kernel {
  const char* name;
  Isa isa;
  Layout layout;
  void (*run)(const Block&);
  int64_t (*scratch_bytes)(Mode mode, int64_t k);
};

extern const Kernel kScalar, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni;

// ---- int8_matmul.cpp -------------------------------------------------------------------------------------------

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
int64_t packed_bytes(const Layout& layout, int64_t n, int64_t k);

// weight: s8 [N,K], rows ld apart. dst: packed_bytes, 64-byte aligned.
void pack(const Layout& layout, const int8_t* weight, int64_t n, int64_t k, int64_t ld, void* dst);
void unpack(const PackedWeight& packed, int8_t* weight, int64_t ld);
void unpack_row(const PackedWeight& packed, int64_t n, int8_t* row);  // [K]

// Checks the header against the buffer: magic, version, checksum, layout, sizes.
PackedWeight open_packed(const void* data, int64_t bytes);

}  // namespace pycompress::int8_matmul
