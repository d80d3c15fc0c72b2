// multiply_tile: y in tiles on the tensor cores. q and weight come through a ring of stages in shared memory; see
// cuda.h.
#include "int8_matmul/cuda.h"
#include "int8_matmul/cuda_finish.cuh"
#include "int8_matmul/cuda_weight.cuh"

namespace pycompress::int8_matmul {
namespace {

struct TileParams {
  Global<const int8_t> q;  // [m, ldq]
  int64_t ldq;
  Global<const float> x_scale;
  Global<const int32_t> zero_point;  // null: 0
  Weight weight;
  int64_t slice;
  int m;
  int tiles_m, tiles_n;
  Finish finish;
  Global<char> partials;  // [splits, m, columns]; null: y is finished here
  int64_t columns;
};

// ---- shared memory -------------------------------------------------------------------------------------------------
//
//   | stage 0: tile.m rows of q, tile.n rows of weight, 64 bytes each | stage 1 | ... |
//
// A row's four pieces of 16 bytes lie in an order that changes with the row, so that what a quarter of a warp touches
// at a time, two rows when they are copied and eight rows of one column for ldmatrix, falls into all 32 banks:
//
//   row 0, 1:  0 1 2 3    row 2, 3:  1 0 3 2    row 4, 5:  2 3 0 1    row 6, 7:  3 2 1 0
//
// After the last stage the same memory holds
//
//   | slab of warp 0: 16 rows of sums | slab of warp 1 | ... | x_scale of rows | scale, bias, correction of columns |
//
// A slab's rows are kSlabStride words apart: a half warp's stores of 8 bytes, four rows of 32 bytes, and a quarter's
// loads of 16 bytes fall into all banks too.

constexpr int kPiece = 16, kPieces = kTileK / kPiece;
constexpr int kSlabRows = 16, kSlabStride = kWarpColumns + 8;

// Offset of a piece within a stage; that of row + 8 i is 8 i * kTileK more.
__device__ inline int piece_offset(int row, int piece) { return row * kTileK + (piece ^ (row >> 1 & 3)) * kPiece; }

template <int TILE>
struct Layout {
  static constexpr Tile kTile = kTiles[TILE];
  static constexpr int kThreads = kTile.threads();
  static constexpr int kQBytes = kTile.m * kTileK, kStageBytes = (kTile.m + kTile.n) * kTileK;
  static constexpr int kWarpM = kTile.m / kTile.warps_m;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpColumns / 8;
  static_assert(kTile.n / kTile.warps_n == kWarpColumns && kWarpM % 16 == 0, "the slabs are as wide as a warp's share");
  static constexpr int kSlabBytes = kTile.warps_m * kTile.warps_n * kSlabRows * kSlabStride * 4;
  static_assert(kSlabBytes + 4 * kTile.m + 12 * kTile.n <= kTile.stages * kStageBytes,
                "all that follows the stages fits");

  char* shared = cuda::dynamic_shared();
  __device__ char* q(int stage) const { return shared + stage * kStageBytes; }
  __device__ char* weight(int stage) const { return shared + stage * kStageBytes + kQBytes; }
  __device__ int32_t* slab(int warp) const {
    return reinterpret_cast<int32_t*>(shared) + warp * kSlabRows * kSlabStride;
  }
  __device__ float* x_scale() const { return reinterpret_cast<float*>(shared + kSlabBytes); }
  __device__ float* scale() const { return x_scale() + kTile.m; }
  __device__ float* bias() const { return scale() + kTile.n; }
  __device__ int32_t* correction() const { return reinterpret_cast<int32_t*>(bias() + kTile.n); }
};

// Which tile and which split a block computes. Eight rows of tiles at a time, column by column: the blocks that run at
// the same time then share rows of q and of the weight in L2.
struct Share {
  int m, n;         // the first row and column
  int64_t k_begin;  // the first of its `columns` columns of q and weight
  int columns;
};

template <int TILE>
__device__ inline Share block_share(const TileParams& p) {
  constexpr Tile tile = Layout<TILE>::kTile;
  constexpr int kGroup = 8;
  const int index = static_cast<int>(blockIdx.x), group = index / (kGroup * p.tiles_n);
  const int rows = min(kGroup, p.tiles_m - group * kGroup), inside = index % (kGroup * p.tiles_n);
  const int64_t k_begin = blockIdx.y * p.slice;
  return {(group * kGroup + inside % rows) * tile.m, inside / rows * tile.n, k_begin,
          static_cast<int>(min(p.slice, p.weight.k - k_begin))};
}

// ---- a stage ------------------------------------------------------------------------------------------------------

// What a thread copies of every stage: one piece of every kRows-th row, from its first one on.
template <int TILE>
struct Copies {
  static constexpr int kRows = Layout<TILE>::kThreads / kPieces;
  int row, piece;           // within the tile, of the first copy
  int64_t q_at, weight_at;  // elements before it in the first stage

  __device__ Copies(const TileParams& p, const Share& at)
      : row(static_cast<int>(threadIdx.x) / kPieces),
        piece(static_cast<int>(threadIdx.x) % kPieces),
        q_at((at.m + row) * p.ldq + at.k_begin + piece * kPiece),
        weight_at((at.n + row) * p.weight.k + at.k_begin + piece * kPiece) {}
};

// Starts the copies of 64 columns of q and weight, k columns behind the first. Rows and columns that do not exist
// become zeros.
template <int TILE, bool VECTORS>
__device__ inline void copy_stage(const TileParams& p, const Share& at, const Copies<TILE>& copies, int k, int stage) {
  using L = Layout<TILE>;
  constexpr int kRows = Copies<TILE>::kRows;
  const L layout;
  static_assert(kRows % 8 == 0, "the offset of the next row's piece, see piece_offset");
  const int offset = piece_offset(copies.row, copies.piece);
#pragma unroll
  for (int i = 0; i < L::kTile.m / kRows; ++i) {
    const bool exists = at.m + copies.row + i * kRows < p.m;  // its columns are padded with zeros
    p.q.template cp_async<16>(layout.q(stage) + offset + i * kRows * kTileK,
                              exists ? copies.q_at + k + i * kRows * p.ldq : 0, exists ? 16 : 0);
  }
  const int column = k + copies.piece * kPiece;
#pragma unroll
  for (int i = 0; i < L::kTile.n / kRows; ++i) {
    char* to = layout.weight(stage) + offset + i * kRows * kTileK;
    const int n = at.n + copies.row + i * kRows;
    if constexpr (VECTORS) {
      const bool exists = n < p.weight.n && column < at.columns;
      p.weight.rows.template cp_async<16>(to, exists ? copies.weight_at + k + i * kRows * p.weight.k : 0,
                                          exists ? 16 : 0);
    } else {
      const int count = n < p.weight.n ? at.columns - column : 0;
      cuda::shared_store(to, load_weight<false>(p.weight, copies.weight_at + k + i * kRows * p.weight.k, count));
    }
  }
}

// sums[i][j] += the warp's fragment i of q times fragment j of the weight.
template <int TILE>
__device__ inline void multiply_stage(int stage, int32_t (&sums)[Layout<TILE>::kFragmentsM][4][4]) {
  using L = Layout<TILE>;
  const L layout;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int q_row = warp / L::kTile.warps_n * L::kWarpM + lane % 16;
  const int w_row = warp % L::kTile.warps_n * kWarpColumns + lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < kTileK / 32; ++step) {
    const char* q_from = layout.q(stage) + piece_offset(q_row, step * 2 + lane / 16);
    const char* w_from = layout.weight(stage) + piece_offset(w_row, step * 2 + lane / 8 % 2);
    uint32_t q[L::kFragmentsM][4];
#pragma unroll
    for (int i = 0; i < L::kFragmentsM; ++i) {
      cuda::ldmatrix_x4(q[i], q_from + i * 16 * kTileK);
    }
#pragma unroll
    for (int j = 0; j < L::kFragmentsN; j += 2) {
      uint32_t both[4];
      cuda::ldmatrix_x4(both, w_from + j * 8 * kTileK);
      const uint32_t w[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
      for (int i = 0; i < L::kFragmentsM; ++i) {
        cuda::mma_s8(sums[i][j], q[i], w[0]);
        cuda::mma_s8(sums[i][j + 1], q[i], w[1]);
      }
    }
  }
}

// The sum of half a row of the weight: threads 2 n and 2 n + 1 share row n of the stage.
template <int TILE>
__device__ inline int32_t half_row_sum(int stage) {
  static_assert(Layout<TILE>::kThreads == 2 * Layout<TILE>::kTile.n, "two threads a row");
  constexpr uint32_t kOnes = 0x01010101u;
  const int thread = static_cast<int>(threadIdx.x);
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    const char* from = Layout<TILE>().weight(stage) + piece_offset(thread / 2, thread % 2 * (kPieces / 2) + i);
    const auto piece = cuda::shared_load<uint4>(from);
    sum = cuda::dp4a(piece.x, kOnes, cuda::dp4a(piece.y, kOnes, sum));
    sum = cuda::dp4a(piece.z, kOnes, cuda::dp4a(piece.w, kOnes, sum));
  }
  return sum;
}

// ---- the end ------------------------------------------------------------------------------------------------------

// Four neighbouring sums of a slab's row, less what the zero point added to them.
__device__ inline int4 corrected(const int32_t* sums, const int32_t* correction) {
  const auto sum = cuda::shared_load<int4>(sums), added = cuda::shared_load<int4>(correction);
  return make_int4(sum.x - added.x, sum.y - added.y, sum.z - added.z, sum.w - added.w);
}

// y of four columns, `column` the first of them in the tile.
template <int TILE>
__device__ inline void finish_columns(const TileParams& p, int4 sum, float x_scale, int column, float (&v)[4]) {
  const Layout<TILE> layout;
  const auto scale = cuda::shared_load<float4>(layout.scale() + column);
  const auto bias = cuda::shared_load<float4>(layout.bias() + column);
  v[0] = scaled(static_cast<float>(sum.x), scale.x, x_scale, bias.x);
  v[1] = scaled(static_cast<float>(sum.y), scale.y, x_scale, bias.y);
  v[2] = scaled(static_cast<float>(sum.z), scale.z, x_scale, bias.z);
  v[3] = scaled(static_cast<float>(sum.w), scale.w, x_scale, bias.w);
  activate(v, p.finish.activation);
}

// y from a slab whose first element is row `row` of the block's tile and column `column` of it: 16 bytes a lane.
template <int TILE, Dtype D>
__device__ inline void finish_slab(const TileParams& p, const Share& at, const int32_t* slab, int row, int column) {
  constexpr int kElements = D == Dtype::f32 ? 4 : 8, kLanes = kWarpColumns / kElements;  // of a row
  const Layout<TILE> layout;
  const int lane = static_cast<int>(threadIdx.x) % 32, inside = lane % kLanes * kElements;
  const int n = at.n + column + inside;
#pragma unroll 1
  for (int i = lane / kLanes; i < kSlabRows; i += kElements) {
    const int m = at.m + row + i;
    if (m >= p.m || n >= p.weight.n) return;
    uint32_t word[4] = {0, 0, 0, 0};
    // Four at a time, for the registers; odd rows take the second four first, which lie in other banks than those of
    // the row before.
#pragma unroll 1
    for (int turn = 0; turn < kElements / 4; ++turn) {
      const int four = kElements == 4 ? 0 : turn ^ (i & 1), from = inside + 4 * four;
      const int4 sum = corrected(slab + i * kSlabStride + from, layout.correction() + column + from);
      float v[4];
      finish_columns<TILE>(p, sum, layout.x_scale()[row + i], column + from, v);
      if constexpr (D == Dtype::f32) {
#pragma unroll
        for (int j = 0; j < 4; ++j) word[j] = __float_as_uint(v[j]);
      } else {  // selected, not indexed: an index that is not a constant would put the words into memory
        const uint32_t low = narrow<D>(v[0], v[1]), high = narrow<D>(v[2], v[3]);
        word[0] = four == 0 ? low : word[0], word[1] = four == 0 ? high : word[1];
        word[2] = four == 0 ? word[2] : low, word[3] = four == 0 ? word[3] : high;
      }
    }
    store_words<D>(p.finish, m, n, word);
  }
}

// The same into the workspace.
template <int TILE>
__device__ inline void keep_slab(const TileParams& p, const Share& at, const int32_t* slab, int row, int column) {
  const Layout<TILE> layout;
  const int lane = static_cast<int>(threadIdx.x) % 32, inside = lane % 8 * 4;
  column += inside;
  if (at.n + column >= p.columns) return;
#pragma unroll 1
  for (int i = lane / 8; i < kSlabRows && at.m + row + i < p.m; i += 4) {
    const int4 sum = corrected(slab + i * kSlabStride + inside, layout.correction() + column);
    const int64_t to = (int64_t(blockIdx.y) * p.m + at.m + row + i) * p.columns + at.n + column;
    p.partials.store_as<int4>(to * 4, sum);
  }
}

// Scales, bias and corrections into shared memory; weight_sum as half_row_sum gives it, over all stages.
template <int TILE>
__device__ inline void prepare_finish(const TileParams& p, const Share& at, int32_t weight_sum) {
  using L = Layout<TILE>;
  const L layout;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < L::kTile.m; i += L::kThreads) {
    layout.x_scale()[i] = at.m + i < p.m ? p.x_scale.load(at.m + i) : 0.0f;
  }
  for (int i = thread; i < L::kTile.n; i += L::kThreads) {
    const bool exists = at.n + i < p.weight.n;
    layout.scale()[i] = exists ? p.finish.weight_scale.load(at.n + i) : 0.0f;
    layout.bias()[i] = exists ? load_bias(p.finish, at.n + i) : 0.0f;
  }
  const int32_t zero_point = p.zero_point.is_null() ? 0 : p.zero_point.load(0) - 128;
  weight_sum += __shfl_xor_sync(cuda::kAllLanes, weight_sum, 1);
  if (thread % 2 == 0) layout.correction()[thread / 2] = zero_point * weight_sum;
}

template <int TILE>
__device__ inline void finish_tile(const TileParams& p, const Share& at,
                                   const int32_t (&sums)[Layout<TILE>::kFragmentsM][4][4]) {
  using L = Layout<TILE>;
  const L layout;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int column = warp % L::kTile.warps_n * kWarpColumns;
  int32_t* slab = layout.slab(warp);
  // Not unrolled: only the stores differ, and the rest is some thousand instructions.
#pragma unroll 1
  for (int step = 0; step < L::kFragmentsM; ++step) {
    const int row = warp / L::kTile.warps_n * L::kWarpM + step * 16;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < L::kFragmentsM; ++i) {
      if (i != step) continue;
#pragma unroll
      for (int j = 0; j < L::kFragmentsN; ++j) {
        int32_t* to = slab + lane / 4 * kSlabStride + j * 8 + lane % 4 * 2;
        cuda::shared_store(to, make_int2(sums[i][j][0], sums[i][j][1]));
        cuda::shared_store(to + 8 * kSlabStride, make_int2(sums[i][j][2], sums[i][j][3]));
      }
    }
    __syncwarp();
    if (!p.partials.is_null()) {
      keep_slab<TILE>(p, at, slab, row, column);
    } else if (p.finish.dtype == Dtype::f32) {
      finish_slab<TILE, Dtype::f32>(p, at, slab, row, column);
    } else if (p.finish.dtype == Dtype::bf16) {
      finish_slab<TILE, Dtype::bf16>(p, at, slab, row, column);
    } else {
      finish_slab<TILE, Dtype::f16>(p, at, slab, row, column);
    }
  }
}

// ---- the kernel ---------------------------------------------------------------------------------------------------

template <int TILE, bool VECTORS>
__global__ void __launch_bounds__(kTiles[TILE].threads(), kTiles[TILE].blocks) multiply_tile(TileParams p) {
  using L = Layout<TILE>;
  constexpr int kStages = L::kTile.stages;
  const Share at = block_share<TILE>(p);
  const Copies<TILE> copies(p, at);
  const int steps = (at.columns + kTileK - 1) / kTileK;

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) copy_stage<TILE, VECTORS>(p, at, copies, i * kTileK, i);
    cuda::cp_async_commit();
  }
  int32_t sums[L::kFragmentsM][4][4] = {}, weight_sum = 0;
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cuda::cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and nobody reads the one before it any more
    const int ahead = step + kStages - 1, into = stage == 0 ? kStages - 1 : stage - 1;
    if (ahead < steps) copy_stage<TILE, VECTORS>(p, at, copies, ahead * kTileK, into);
    cuda::cp_async_commit();
    multiply_stage<TILE>(stage, sums);
    if (!p.zero_point.is_null()) weight_sum += half_row_sum<TILE>(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  __syncthreads();  // nobody reads a stage any more; the groups behind the last step's are empty
  prepare_finish<TILE>(p, at, weight_sum);
  __syncthreads();
  finish_tile<TILE>(p, at, sums);
}

using TileKernel = void (*)(TileParams);

TileKernel tile_kernel(const Plan& plan) {
  if (plan.tile == kWide) return plan.vectors ? multiply_tile<kWide, true> : multiply_tile<kWide, false>;
  return plan.vectors ? multiply_tile<kNarrow, true> : multiply_tile<kNarrow, false>;
}

}  // namespace

void launch_multiply_tile(const CudaArgs& args, const Plan& plan, const Workspace& workspace,
                          const cuda::Place& place) {
  const Tile& tile = kTiles[plan.tile];
  const auto tiles_m = static_cast<int>(cuda::ceil_div(args.m, tile.m));
  const auto tiles_n = static_cast<int>(cuda::ceil_div(args.n, tile.n));
  const TileParams params{workspace.q,     padded_k(args.k), workspace.x_scale,        args.input_zero_point,
                          weight_of(args), plan.slice,       static_cast<int>(args.m), tiles_m,
                          tiles_n,         finish_of(args),  workspace.partials,       partial_columns(args.n)};
  const cuda::Shape shape{
      dim3(static_cast<unsigned>(tiles_m) * static_cast<unsigned>(tiles_n), static_cast<unsigned>(plan.splits)),
      dim3(static_cast<unsigned>(tile.threads())), tile_shared_bytes(tile)};
  cuda::launch("int8_linear", "multiply_tile", tile_kernel(plan), place, shape, params);
}

}  // namespace pycompress::int8_matmul
