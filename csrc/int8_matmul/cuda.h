// The int8 linear layer on a CUDA device. The formula, the modes and the edge cases are those of int8_matmul.h; here
//
//   every pointer is to memory of place.device, input_scale and input_zero_point too
//   weight       s8 [N,K], rows K apart. K a multiple of 16 and a pointer aligned to 16: loads of 16 bytes, else slower
//                ones with the same result
//   static       the values of input_scale and input_zero_point are not checked: that would have to wait for the device
//   weight_only  at most kMaxTokens rows of x
//
// run_cuda only starts kernels on place.stream: it neither waits nor allocates. What they hand on lies in
// args.workspace, aligned to 16 bytes, workspace_bytes(args, plan) of it:
//
//   | q: s8 [M, K padded to kPadK] | x_scale: f32 [M] | partials: s32, weight_only f32 [splits, M, N padded to 4] |
//     both only where a launch of its own quantises x    only where splits > 1
//
// One to three launches: quantise the rows of x; multiply; where K was split, add the parts up. Two kernels multiply:
// stream_weight reads the weight once past few tokens, multiply_tile computes tiles of y on the tensor cores.
#pragma once

#include "common/cuda/launch.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {

struct CudaArgs : LinearArgs {
  Mode mode = Mode::dynamic_;
  const int8_t* weight = nullptr;
  const float* input_scale = nullptr;         // one value; static only
  const int32_t* input_zero_point = nullptr;  // one value in 0..255; static only
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// ---- tuning. Nothing here was measured on a GPU: the reasons are counts of registers, shared memory and bytes. ----

constexpr int kPadK = 64;  // q is padded with zeros to whole stages of a tile

// A block's tile of y on the tensor cores; a warp computes m / warps_m rows of it and kWarpColumns columns.
struct Tile {
  int m, n;
  int stages;  // of kTileK columns of q and weight each: stages - 1 are under way while one is multiplied
  int warps_m, warps_n;
  int blocks;  // that share a multiprocessor: bounds the registers of a thread
  constexpr int threads() const { return 32 * warps_m * warps_n; }
};
constexpr int kTileK = 64;  // two steps of mma.m16n8k32; bytes of a row that a stage holds
constexpr int kWarpColumns = 32;

// Wide: 128 operations for each byte that comes from L2, and 64 accumulators a thread. Three stages are 48 KB, so that
//   two blocks fit into the 100 KB of sm_86, sm_89 and sm_120 too. The two multiply a stage each in no less than 512
//   cycles (an H100; an A100 1024), so the two stages under way cover the 600 to 800 cycles that memory takes.
// Narrow: 64 operations a byte, but four times as many tiles: for few tokens or a narrow layer. A stage takes an eighth
//   of the time, so there are four stages and up to four blocks.
constexpr Tile kTiles[] = {{128, 128, 3, 2, 4, 2}, {64, 64, 4, 2, 2, 4}};
constexpr int kWide = 0, kNarrow = 1;

// A split of a tile's K computes at least 8 stages: fewer would not pay for writing, reading and adding its sums.
constexpr int64_t kSmallestTileSplit = 8 * kTileK;

// stream_weight: a warp reads 4 rows of the weight, 512 columns at a time, and one step ahead. 16 warps on each
// multiprocessor then have 32 KB under way, where 3.4 TB/s x 0.7 us / 132 multiprocessors (an H100) ask for 18 KB.
// 16 tokens are 64 sums, with which 128 registers do not suffice; they get 255 and half the warps. They are also 16
// products a byte of weight, as many as dp4a (64 lanes a cycle) can do while that byte comes from memory: more tokens
// are for multiply_tile. weight_only holds weights as float as well, and comes to that with 8 tokens. It is compiled
// for 1, 4, 8 and 16 tokens: 2 computed as 4 still wait for the weight.
constexpr int kMaxTokens = 16;
constexpr int kStreamRows = 4;
constexpr int kStreamStep = 512;
constexpr int kStreamWarps = 8;
constexpr int stream_blocks(int tokens, bool weight_only) {  // of a multiprocessor
  return tokens >= (weight_only ? 8 : 16) ? 1 : 2;
}

// x is quantised by every block itself, and a launch less is needed, where that is at most kFusedUnits times 8
// elements for each of its 256 threads: 32 registers, one read of x from L2, far less than a launch takes.
constexpr int kFusedUnits = 4;

// A warp's share of K below 16 steps is read faster than a further launch could add up what splitting it gives.
constexpr int64_t kSmallestStreamSplit = 16 * kStreamStep;

// ---- what runs ---------------------------------------------------------------------------------------------------

struct Plan {
  int tokens = 0;       // 1, 4, 8 or 16: stream_weight, compiled for so many rows of x; 0: multiply_tile
  int tile = kWide;     // multiply_tile: index into kTiles
  bool vectors = true;  // the weight is read in loads of 16 bytes
  bool fused = false;   // stream_weight quantises x itself
  int parts = 1;        // stream_weight: so many warps of a block share the K of an output: a power of two
  int64_t splits = 1;   // of K over blocks; their sums go through the workspace
  int64_t slice = 0;    // columns of a split: whole steps; never so many that a sum leaves int32
};

// The best plan: depends on shapes, the weight's alignment and the device alone.
Plan pick(const CudaArgs& args, const cuda::DeviceInfo& device);

int64_t workspace_bytes(const CudaArgs& args, const Plan& plan);

// Checks the arguments, then starts the kernels. ArgumentError before any work; CudaError if a launch fails.
void run_cuda(const CudaArgs& args, const cuda::Place& place, const Plan& plan);
void run_cuda(const CudaArgs& args, const cuda::Place& place);  // by pick

// ---- kernel_cuda*.cu: one launch each ------------------------------------------------------------------------------

// Where the parts of a workspace begin; null where there is none.
struct Workspace {
  int8_t* q = nullptr;
  float* x_scale = nullptr;
  char* partials = nullptr;
};

// q: s8 [m, padded_k(k)], zeros behind column k; x_scale: f32 [m], NaN for a row that is not finite. The scale and zero
// point null: dynamic. `op` is whom an error names: sparse_linear starts this one too.
void launch_quantize_rows(const char* op, const LinearArgs& x, const float* input_scale,
                          const int32_t* input_zero_point, int8_t* q, float* x_scale, const cuda::Place& place);
void launch_stream_weight(const CudaArgs& args, const Plan& plan, const Workspace& workspace, const cuda::Place& place);
void launch_multiply_tile(const CudaArgs& args, const Plan& plan, const Workspace& workspace, const cuda::Place& place);
void launch_add_splits(const CudaArgs& args, const Plan& plan, const Workspace& workspace, const cuda::Place& place);

// Bytes of dynamic shared memory of a block.
int stream_shared_bytes(const CudaArgs& args, const Plan& plan);
constexpr int tile_shared_bytes(const Tile& tile) { return tile.stages * (tile.m + tile.n) * kTileK; }

constexpr int64_t padded_k(int64_t k) { return (k + kPadK - 1) / kPadK * kPadK; }
constexpr int64_t partial_columns(int64_t n) { return (n + 3) / 4 * 4; }

}  // namespace pycompress::int8_matmul
