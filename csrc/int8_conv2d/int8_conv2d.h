// Int8 2-D convolution: quantise each image, multiply with the int8 weight, scale, add bias, activate. One call.
//
//   y[n,o,i,j] = act(x_scale[n] * w_scale[o] * sum_{c,a,b} (qx[n,c,i',j'] - zero_point) * qw[o,c,a,b] + bias[o])
//   i' = stride_h * i - pad_top + dilation_h * a,  j' = stride_w * j - pad_left + dilation_w * b,
//   over the channels c of o's group; outside the image the term is 0.
//
//   dynamic  x_scale[n] = max(max |x[n]| / 127, FLT_MIN), qx = rne(x * (1 / x_scale)), zero_point = 0
//   static   x_scale and zero_point (0..255) given once; qx = clamp(rne(x * (1 / x_scale)) + zero_point, 0, 255)
//
// x: f32, bf16 or f16 [N,C,H,W]; channels or columns must be adjacent, the other strides are free.
// y: x's dtype, dense, [N,O,OH,OW] or channels last [N,OH,OW,O]. bias: any of the dtypes, or null.
// The integer sum is exact: kh * kw * C / groups is at most kMaxTerms. No image depends on the others of its batch: one
// that holds NaN or Inf, read by a window or not, gives NaN, and the others do not. An image of zeros gives act(bias).
// N == 0 or O == 0 does nothing; C == 0 gives act(bias).
//
// An image is quantised once, into a buffer of rows x columns x channels with its padding around it, in which the inputs
// of an output are kh runs of adjacent values (kh * kw where taps are not adjacent: dilation, groups). No matrix of
// windows (im2col) is written: a tile of outputs walks these runs from a start of its own for each output.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/linear_args.h"
#include "common/range.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_conv2d {

using int8_matmul::Layout;
using int8_matmul::Mode;
using int8_matmul::PackedWeight;

constexpr int64_t kMaxTerms = int8_matmul::kMaxChunkK;  // |sum| <= 255 * 128 * kMaxTerms < 2^31

struct WeightShape {
  int64_t out, per_group, kh, kw, groups;  // qw: [out, per_group, kh, kw]; out is a multiple of groups
};

// A packed weight: this header, then for each group the packed [out / groups, kh * kw * channels] matrix of int8_matmul.h,
// its k in the order (a, b, c), channels padded to Layout::ku with zeros.
struct PackedHeader {
  uint32_t magic;    // "pcc8"
  uint16_t version;  // kPackedVersion
  uint16_t layout;   // Layout::id
  WeightShape shape;
  int64_t total_bytes;
  uint64_t checksum;  // of the bytes before it
};
static_assert(sizeof(PackedHeader) == 64, "the groups behind the header must stay aligned to 64 bytes");

constexpr uint32_t kPackedMagic = 0x38636370;
constexpr uint16_t kPackedVersion = 1;

struct PackedConv {
  const Layout* layout;
  WeightShape shape;
  const char* groups;   // the first group's matrix
  int64_t group_bytes;  // from one group's matrix to the next
  int64_t sums_bytes;   // of column_sum, in front of the panels
  int64_t padded;       // channels of a group, padded to ku
};

static inline PackedWeight group_weight(const PackedConv& packed, int64_t group) {
  const WeightShape& s = packed.shape;
  const char* base = packed.groups + group * packed.group_bytes + sizeof(int8_matmul::PackedHeader);
  return {packed.layout, s.out / s.groups, s.kh * s.kw * packed.padded, reinterpret_cast<const int32_t*>(base),
          reinterpret_cast<const uint8_t*>(base + packed.sums_bytes)};
}

struct Args {
  Mode mode = Mode::dynamic_;
  Activation activation = Activation::none;
  int threads = 1;

  const void* x = nullptr;
  Dtype dtype = Dtype::f32;  // of x and y
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t x_stride_n = 0, x_stride_c = 0, x_stride_h = 0, x_stride_w = 0;  // in elements

  int64_t stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dilation_h = 1, dilation_w = 1;
  const float* weight_scale = nullptr;  // [O]
  const void* bias = nullptr;           // [O] of bias_dtype, or null
  Dtype bias_dtype = Dtype::f32;
  const float* input_scale = nullptr;         // one value; static only
  const int32_t* input_zero_point = nullptr;  // one value in 0..255; static only

  void* y = nullptr;
  int64_t out_h = 0, out_w = 0;  // what lies below and right of the last window is padding, or left out
  bool channels_last = false;    // of y
};

// ---- what a kernel file provides -------------------------------------------------------------------------------

// The buffer of one quantised image, in the kernel's elements: rows x columns x pixel.
struct Geometry {
  int64_t padded, pixel;          // channels of a group and of a pixel, padded to ku
  int64_t rows, columns;          // that the windows reach
  int64_t row_step, column_step;  // rows and columns of x from one of the buffer's to the next: skips what nobody reads
  int64_t window_row, window_col;  // from one window to the one below and to the right
  int64_t image;                   // from one image to the next
  const int64_t* run;              // [runs] where each run of adjacent values starts, from the start of the window
  int64_t runs, run_groups;        // groups of ku values in a run
  bool by_pixel;                   // the channels of x are adjacent, else its columns
};

// Steps to store: clamp(rne(x * inverse), low, high) + zero. `zero` stands for the real 0; 0 where steps are signed.
struct Grid {
  float inverse, low, high;
  int32_t zero;
};

struct Quantize {
  const Args* args;
  const Geometry* geometry;
  Grid grid;
  const char* image;  // of x
  Range rows;         // of the buffer
  void* buffer;       // the image's
  int64_t groups;
};

// One thread's share of the products with the quantised images [first, ...) in `buffer`.
struct Multiply {
  const Args* args;
  const Geometry* geometry;
  const PackedConv* weight;
  const float *bias, *scale;  // [O + 64] in f32, zeros behind the end
  const float* x_scale;       // of each image in the buffer
  int32_t zero;
  const void* buffer;
  int64_t first;         // image of y
  Range blocks, panels;  // of all images; of all groups
  char* scratch;         // scratch_bytes of it, this thread's own
};

// Outputs of an image are shared out in blocks, neighbours in reading order: kBlock of them, the last up to kLargestBlock.
constexpr int64_t kBlock = 48, kLargestBlock = 64;
static inline int64_t block_count(int64_t pixels) {
  return pixels <= kLargestBlock ? 1 : (pixels - (kLargestBlock - kBlock) + kBlock - 1) / kBlock;
}

struct Kernel {
  const char* name;
  Isa isa;
  Layout layout;
  int element_bytes;  // of the buffer
  bool is_unsigned;   // its elements are u8 with the zero point added; else s16 without
  int64_t scratch_bytes;
  float (*largest)(const char* x, int64_t count, Dtype dtype);  // max |x|; Inf or NaN where one is among them
  void (*quantize)(const Quantize&);
  void (*multiply)(const Multiply&);
};

extern const Kernel kScalar, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni;

// ---- int8_conv2d.cpp -------------------------------------------------------------------------------------------

const Kernel& best_kernel();
// The best kernel that may run here and reads this layout. The scalar one reads all.
const Kernel& kernel_for(const Layout& layout);

// A packed weight, its headers checked, and the kernel that reads it: found once, used for many calls.
struct Prepared {
  PackedConv weight;
  const Kernel* kernel;
};
Prepared prepare(const void* packed, int64_t bytes);

// Checks every field, then computes. Throws ArgumentError before any work.
void run(const Args& args, const Prepared& prepared);

// ---- pack.cpp --------------------------------------------------------------------------------------------------

// Why no kernel takes such a weight; empty where they do.
const char* refuses(int64_t per_group, int64_t kh, int64_t kw);

int64_t packed_bytes(const Layout& layout, const WeightShape& shape);

// weight: s8 [out, per_group, kh, kw], contiguous. dst: packed_bytes, 64-byte aligned.
void pack(const Layout& layout, const int8_t* weight, const WeightShape& shape, void* dst);
void unpack(const PackedConv& packed, int8_t* weight);

// Checks the headers against the buffer: magic, version, checksum, layout, sizes.
PackedConv open_packed(const void* data, int64_t bytes);

}  // namespace pycompress::int8_conv2d
