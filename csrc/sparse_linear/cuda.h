// The pruned linear layer on a CUDA device. The formula and the edge cases are those of sparse_linear.h; here
//
//   every pointer is to the memory of place.device
//   f16 weights  as bf16 ones
//   row_start    its contents are not checked against the bitmap: that would have to wait for the device. Whatever they
//                are, no kernel reads or writes out of bounds.
//   f32, bf16, f16 weights as a bitmap: a NaN or Inf in x reaches the outputs that keep a weight there, and no others
//
// run_* only start kernels on place.stream: they neither wait nor allocate. What they keep between two kernels lies in
// args.workspace, aligned to 16:
//
//   | x as the second kernel wants it: [M, K padded to 16 bytes] s8 or 16-bit | x_scale: f32 [M], s8 only |
//
// Two forms of the weight:
//
//   bitmap  the state. A warp takes consecutive rows of it, whose bits and whose values each lie in one stretch of
//           memory: it streams both once for up to kBitmapTokens tokens. See cuda_bitmap.cuh.
//   2:4     derived, for any number of tokens: no row keeps more than two of columns 4 i to 4 i + 3. The tensor cores
//           multiply it as the sparse operand of mma.sp, y^T = W x^T. x has the weight's type, or is quantised.
//
// 2:4: W is cut into *tiles* of 16 outputs x `step` columns, which is what one mma.sp takes: 32 columns of 16-bit
// elements, 64 of bytes. Tile (i, s), outputs 16 i on, columns step * s on, is number i * steps + s of `metadata` and of
// `tiles`; rows past N and columns past K are zero weights. Each lane l = 4 g + t of a warp finds its operands side by
// side:
//
//   tiles     | lane 0: a0 a1 a2 a3 | lane 1: a0 a1 a2 a3 | ... | lane 31 |                           512 bytes
//              a0: row g, a1: row g + 8, bytes 4 t to 4 t + 3 of the kept elements; a2, a3: the same, 16 bytes on
//   metadata  16-bit: u32 [8][2]: word (g, h): columns 16 h to 16 h + 15; bits 0..15 of row g, bits 16..31 of row g + 8
//             bytes:  u32 [8][4]: word (g, t): row g + 8 (t % 2), columns 32 (t / 2) to 32 (t / 2) + 31
//
// The metadata hold 4 bits for every 4 columns: the places of the two kept ones, 2 bits each, ascending. Where fewer
// are kept, a zero weight fills up.
#pragma once

#include "common/cuda/launch.h"
#include "sparse_linear/sparse_linear.h"

namespace pycompress::sparse_linear {

struct CudaArgs : LinearArgs {
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

struct CudaBitmap {
  WeightType type = WeightType::f32;
  int64_t n = 0, k = 0, nnz = 0;
  const uint8_t* bits = nullptr;       // [N, ceil(K / 8)], aligned to 4
  const void* values = nullptr;        // [nnz], aligned to 16
  const int64_t* row_start = nullptr;  // [N + 1]
};

struct Cuda2to4 {
  WeightType type = WeightType::bf16;  // not f32
  int64_t n = 0, k = 0;
  const uint32_t* metadata = nullptr;  // aligned to 16
  const void* tiles = nullptr;         // aligned to 16
};

constexpr int kTileRows = 16, kTileBytes = 512;
constexpr int64_t kMaxCudaK = int64_t(1) << 24;
constexpr int64_t kMax2to4K = int64_t(1) << 17;  // of s8: 2^16 products of at most 127 * 128 stay below 2^31

static inline int tile_step(WeightType type) { return type == WeightType::s8 ? 64 : 32; }
static inline int tile_words(WeightType type) { return type == WeightType::s8 ? 32 : 16; }

// Bytes of workspace that a call needs; 0 where it needs none.
int64_t workspace_bytes(const LinearArgs& args, const CudaBitmap& weight);
int64_t workspace_bytes(const LinearArgs& args, const Cuda2to4& weight);

// Check every field, then start the kernels. Throw ArgumentError before any work, CudaError for what CUDA reports.
void run_bitmap_cuda(const CudaArgs& args, const CudaBitmap& weight, const cuda::Place& place);
void run_2to4_cuda(const CudaArgs& args, const Cuda2to4& weight, const cuda::Place& place);

}  // namespace pycompress::sparse_linear
