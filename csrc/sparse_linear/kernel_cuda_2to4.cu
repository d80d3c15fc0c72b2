// The 2:4 form on a CUDA device: y^T = W x^T on the tensor cores, the pruned weight as the sparse operand of mma.sp.
//
// A block computes Shape::n outputs of Shape::m tokens. K goes through a ring of stages, filled by cp.async; a stage holds
// two steps of the weight, 128 bytes of each row of x:
//
//   tiles     [n / 16][2 steps][512]     as they lie in memory: a lane reads its operands as 16 bytes, 32 lanes in a row
//   metadata  [n / 16][2 steps][words]   likewise
//   x         [m][8 chunks of 16 bytes]  chunk c of token t stands at c ^ (t % 8), so that the eight rows that ldmatrix
//                                        reads at a time lie in different banks
//
// In the end the sums go through shared memory, [m][n + 4] floats, so that y is written row by row.
#include <algorithm>

#include "common/check.h"
#include "int8_matmul/cuda_finish.cuh"
#include "sparse_linear/cuda_launch.h"

namespace pycompress::sparse_linear {
namespace {

using cuda::ceil_div;
using cuda::Global;
using cuda::kWarp;
using int8_matmul::Finish;

constexpr int kSteps = 2, kStepBytes = 64;      // of a stage; of a row of x
constexpr int kRowBytes = kSteps * kStepBytes;  // of a row of x in a stage
constexpr int kChunks = kRowBytes / 16;
static_assert(kChunks == 8, "the swizzle spreads eight chunks over all banks");

// ---- tuning: none of it was measured on a GPU; the reasons are counts of registers, shared memory and tiles --------------

struct BlockShape {
  int n, m;              // outputs, tokens
  int warps_n, warps_m;  // a warp computes n / warps_n x m / warps_m
  int stages, blocks;    // blocks: of a multiprocessor, which share its registers
  constexpr int threads() const { return kWarp * warps_n * warps_m; }
};

// wide: 64 x 64 a warp: an mma.sp needs 192 bytes of shared memory, of which a multiprocessor reads 128 a cycle, while
//   one of its m16n8k32 takes two cycles (A100). Two blocks fit into the shared memory of an A100 or an H100.
// middle: four times as many blocks, for fewer tokens or a narrow layer.
// narrow: up to 16 tokens: the weight's bandwidth bounds it, so that there are many stages, with little x in them.
constexpr BlockShape kWide{128, 128, 2, 2, 3, 2}, kMiddle{64, 64, 2, 2, 4, 3}, kNarrow{64, 16, 4, 1, 6, 4};

// ---- element types -------------------------------------------------------------------------------------------------

struct Bf16 {
  using Sum = float;
  static constexpr int kWords = 16;
  static __device__ int word_of(int lane) { return lane / 4 * 2 + lane % 2; }  // lanes 4 g + 2, 4 g + 3: not used
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    cuda::mma_sp_bf16(d, a, b, metadata);
  }
};

struct F16 : Bf16 {
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    cuda::mma_sp_f16(d, a, b, metadata);
  }
};

struct S8 {
  using Sum = int32_t;
  static constexpr int kWords = 32;
  static __device__ int word_of(int lane) { return lane; }
  static __device__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    cuda::mma_sp_s8(d, a, b, metadata);
  }
};

// ---- the kernel --------------------------------------------------------------------------------------------------

struct Params {
  Global<const char> tiles, metadata;
  Global<const char> x;  // rows of row_bytes, x_stride bytes apart, each aligned to 16
  int64_t row_bytes, x_stride;
  Global<const float> x_scale;
  Finish finish;
  int row_tiles, steps, m_blocks;
};

// Where the parts of a stage stand, in bytes.
template <class Type, int N, int M>
struct Stage {
  static constexpr int kMetadataBytes = 4 * Type::kWords;  // of a tile
  static constexpr int kMetadata = N / kTileRows * kSteps * kTileBytes;
  static constexpr int kX = kMetadata + N / kTileRows * kSteps * kMetadataBytes;
  static constexpr int kBytes = kX + M * kRowBytes;
  static constexpr int kSumStride = N + 4;  // floats: lanes that hold neighbouring tokens write to different banks
  static constexpr int shared_bytes(int stages) { return std::max(stages * kBytes, M * kSumStride * 4); }
};

// Starts the copies of stage `at`, steps kSteps * at on. Row tiles past the last are copies of it: what they give is not
// written. Steps past the last are left out, and columns past K are zeros.
template <class Type, int N, int M, int Threads>
__device__ inline void copy_stage(const Params& p, int64_t row_tile, int64_t m0, int at, char* stage) {
  using S = Stage<Type, N, M>;
  const int step = at * kSteps;
  const auto copy_tiles = [&](Global<const char> from, char* to, int bytes) {  // bytes: of a tile
    const int chunks = kSteps * bytes / 16;                                    // of a row of tiles
    for (int c = threadIdx.x; c < N / kTileRows * chunks; c += Threads) {
      const int64_t row = min(row_tile + c / chunks, int64_t(p.row_tiles - 1));
      const int offset = c % chunks * 16;
      if (step + offset / bytes < p.steps) from.cp_async<16>(to + c * 16, (row * p.steps + step) * bytes + offset);
    }
  };
  copy_tiles(p.tiles, stage, kTileBytes);
  copy_tiles(p.metadata, stage + S::kMetadata, S::kMetadataBytes);
#pragma unroll
  for (int c = threadIdx.x; c < M * kChunks; c += Threads) {
    const int token = c / kChunks, chunk = c % kChunks;
    const int64_t column = int64_t(at) * kRowBytes + chunk * 16;
    const int64_t valid = m0 + token < p.finish.m ? max(min(p.row_bytes - column, int64_t(16)), int64_t(0)) : 0;
    char* to = stage + S::kX + token * kRowBytes + (chunk ^ (token % 8)) * 16;
    p.x.cp_async<16>(to, valid > 0 ? (m0 + token) * p.x_stride + column : 0, static_cast<int>(valid));
  }
}

// sums += the products of one step of a stage, for a warp's RowTiles x 16 outputs and TokenTiles x 8 tokens.
template <class Type, int N, int M, int RowTiles, int TokenTiles>
__device__ inline void multiply_step(const char* stage, int step, int row_tile, int token, int lane,
                                     typename Type::Sum (&sums)[RowTiles][TokenTiles][4]) {
  using S = Stage<Type, N, M>;
  uint32_t a[RowTiles][4], metadata[RowTiles];
#pragma unroll
  for (int i = 0; i < RowTiles; ++i) {
    const int tile = (row_tile + i) * kSteps + step;
    const auto kept = cuda::shared_load<uint4>(stage + tile * kTileBytes + 16 * lane);
    a[i][0] = kept.x, a[i][1] = kept.y, a[i][2] = kept.z, a[i][3] = kept.w;
    metadata[i] =
        cuda::shared_load<uint32_t>(stage + S::kMetadata + tile * S::kMetadataBytes + 4 * Type::word_of(lane));
  }
#pragma unroll
  for (int j = 0; j < TokenTiles; ++j) {
    const int row = token + 8 * j + lane % 8, chunk = 4 * step + lane / 8;
    uint32_t b[4];
    cuda::ldmatrix_x4(b, stage + S::kX + row * kRowBytes + (chunk ^ (row % 8)) * 16);
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) Type::mma(sums[i][j], a[i], b, metadata[i]);
  }
}

// sums: [M][N + 4] in shared memory.
template <Dtype D, int N, int M, int Threads>
__device__ inline void write_block(const Params& p, const float* sums, int64_t n0, int64_t m0) {
  constexpr int kColumns = 4;
  for (int i = threadIdx.x; i < M * (N / kColumns); i += Threads) {
    const int token = i / (N / kColumns), column = i % (N / kColumns) * kColumns;
    const int64_t m = m0 + token, n = n0 + column;
    if (m >= p.finish.m || n >= p.finish.n) continue;
    const float x_scale = p.x_scale.is_null() ? 1.0f : p.x_scale.load(m);
    const auto four = cuda::shared_load<float4>(sums + token * Stage<Bf16, N, M>::kSumStride + column);
    float y[kColumns] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t at = min(n + j, p.finish.n - 1);
      const float scale = p.finish.weight_scale.is_null() ? 1.0f : p.finish.weight_scale.load(at);
      y[j] = int8_matmul::scaled(y[j], scale, x_scale, int8_matmul::load_bias(p.finish, at));
    }
    int8_matmul::activate(y, p.finish.activation);
    int8_matmul::store_columns<D>(p.finish, m, n, y);
  }
}

template <class Type, int N, int M, int WarpsN, int WarpsM, int Stages, int Blocks>
__global__ void __launch_bounds__(kWarp * WarpsN * WarpsM, Blocks) sparse_2to4(const Params p) {
  using S = Stage<Type, N, M>;
  constexpr int kThreads = kWarp * WarpsN * WarpsM;
  constexpr int kRowTiles = N / kTileRows / WarpsN, kTokenTiles = M / 8 / WarpsM;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = warp % WarpsN * kRowTiles, warp_token = warp / WarpsN * kTokenTiles * 8;
  // Blocks that follow each other have the same weights, and find them in L2.
  const int64_t n0 = int64_t(blockIdx.x / p.m_blocks) * N, m0 = int64_t(blockIdx.x % p.m_blocks) * M;
  char* shared = cuda::dynamic_shared();

  const int stages = (p.steps + kSteps - 1) / kSteps;
#pragma unroll
  for (int at = 0; at < Stages - 1; ++at) {
    if (at < stages) copy_stage<Type, N, M, kThreads>(p, n0 / kTileRows, m0, at, shared + at * S::kBytes);
    cuda::cp_async_commit();
  }
  typename Type::Sum sums[kRowTiles][kTokenTiles][4] = {};
  for (int at = 0; at < stages; ++at) {
    cuda::cp_async_wait<Stages - 2>();
    __syncthreads();  // stage `at` is there for all, and nobody reads the one before it any more
    const int next = at + Stages - 1;
    if (next < stages) {
      copy_stage<Type, N, M, kThreads>(p, n0 / kTileRows, m0, next, shared + next % Stages * S::kBytes);
    }
    cuda::cp_async_commit();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (at * kSteps + step < p.steps) {
        multiply_step<Type, N, M>(shared + at % Stages * S::kBytes, step, warp_row, warp_token, lane, sums);
      }
    }
  }
  __syncthreads();  // nobody reads a stage any more; the groups behind the last one's are empty

  auto* to = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {  // rows lane / 4 and 8 further, tokens 2 (lane % 4) and the next
        const int row = (warp_row + i) * kTileRows + lane / 4 + r / 2 * 8,
                  token = warp_token + 8 * j + lane % 4 * 2 + r % 2;
        cuda::shared_store(to + token * S::kSumStride + row, static_cast<float>(sums[i][j][r]));
      }
    }
  }
  __syncthreads();
  switch (p.finish.dtype) {
    case Dtype::f32: return write_block<Dtype::f32, N, M, kThreads>(p, to, n0, m0);
    case Dtype::bf16: return write_block<Dtype::bf16, N, M, kThreads>(p, to, n0, m0);
    default: return write_block<Dtype::f16, N, M, kThreads>(p, to, n0, m0);
  }
}

// ---- x in rows that begin at multiples of 16 bytes -----------------------------------------------------------------

constexpr int kCopyThreads = 256;

template <Dtype D>
__device__ inline void copy_row(const int8_matmul::Rows& rows, Global<uint16_t> to, int64_t m, int64_t stride) {
  const int64_t begin = int8_matmul::row_begin(rows, m);
  for (int64_t k = threadIdx.x * int8_matmul::kUnit; k < rows.k; k += kCopyThreads * int8_matmul::kUnit) {
    float v[int8_matmul::kUnit];
    int8_matmul::load_unit<D>(rows, begin, k, v);
    uint4 words{int8_matmul::narrow<D>(v[0], v[1]), int8_matmul::narrow<D>(v[2], v[3]),
                int8_matmul::narrow<D>(v[4], v[5]), int8_matmul::narrow<D>(v[6], v[7])};
    to.store_as<uint4>(m * stride + k, words);
  }
}

// One block a row; 16-bit elements, as they are.
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows(const int8_matmul::Rows rows, Global<uint16_t> to, int64_t stride) {
  if (rows.dtype == Dtype::bf16) {
    copy_row<Dtype::bf16>(rows, to, blockIdx.x, stride);
  } else {
    copy_row<Dtype::f16>(rows, to, blockIdx.x, stride);
  }
}

// ---- the launch --------------------------------------------------------------------------------------------------

// Whether the kernel reads 16-bit x where it is: one level of rows, each aligned to 16 bytes.
bool reads_directly(const LinearArgs& a) {
  const bool one_level = a.m <= a.inner_rows || a.outer_stride == a.inner_rows * a.row_stride;
  return a.col_stride == 1 && one_level && (a.m <= 1 || (a.row_stride % 8 == 0 && a.row_stride >= 0)) &&
         reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
}

int64_t copied_stride(const LinearArgs& a) { return ceil_div(a.k, 8) * 8; }

// Fills p.x and what belongs to it.
void prepare_x(const CudaArgs& a, WeightType type, const cuda::Place& place, Params& p) {
  if (type == WeightType::s8) {
    const Quantized x = quantize(a, place);
    p.x = reinterpret_cast<const char*>(x.q);
    p.row_bytes = p.x_stride = x.stride;
    p.x_scale = x.scale;
    return;
  }
  p.row_bytes = 2 * a.k;
  if (reads_directly(a)) {
    p.x = static_cast<const char*>(a.x);
    p.x_stride = 2 * a.row_stride;
    return;
  }
  p.x = static_cast<const char*>(a.workspace);
  p.x_stride = 2 * copied_stride(a);
  const cuda::Shape shape{dim3(static_cast<unsigned>(a.m)), dim3(kCopyThreads)};
  cuda::launch("sparse_linear", "copy_rows", copy_rows, place, shape, int8_matmul::rows_of(a),
               Global<uint16_t>(static_cast<uint16_t*>(a.workspace)), copied_stride(a));
}

const BlockShape& pick(const LinearArgs& a, const cuda::DeviceInfo& device) {
  if (a.m <= kNarrow.m) return kNarrow;
  return ceil_div(a.n, kWide.n) * ceil_div(a.m, kWide.m) >= device.multiprocessors ? kWide : kMiddle;
}

template <class Type, const BlockShape& B>
void launch_blocks(const LinearArgs& a, const cuda::Place& place, Params& p) {
  p.m_blocks = static_cast<int>(ceil_div(a.m, B.m));
  const int64_t blocks = ceil_div(a.n, B.n) * p.m_blocks;
  check(blocks < (int64_t(1) << 31), "sparse_linear: M=", a.m, " x N=", a.n, " is too large for one launch");
  const cuda::Shape shape{dim3(static_cast<unsigned>(blocks)), dim3(B.threads()),
                          Stage<Type, B.n, B.m>::shared_bytes(B.stages), false};
  cuda::launch("sparse_linear", "sparse_2to4", sparse_2to4<Type, B.n, B.m, B.warps_n, B.warps_m, B.stages, B.blocks>,
               place, shape, p);
}

template <class Type>
void launch_type(const LinearArgs& a, const cuda::Place& place, Params& p) {
  const BlockShape& shape = pick(a, cuda::device_info(place.device));
  if (&shape == &kWide) return launch_blocks<Type, kWide>(a, place, p);
  if (&shape == &kMiddle) return launch_blocks<Type, kMiddle>(a, place, p);
  return launch_blocks<Type, kNarrow>(a, place, p);
}

}  // namespace

int64_t workspace_bytes(const LinearArgs& a, const Cuda2to4& w) {
  if (w.type == WeightType::s8) return quantized_bytes(a);
  return reads_directly(a) ? 0 : a.m * copied_stride(a) * 2;
}

void run_2to4_cuda(const CudaArgs& a, const Cuda2to4& w, const cuda::Place& place) {
  check_cuda_args(a, w.type, w.n, w.k, workspace_bytes(a, w));
  check(w.type != WeightType::f32, "sparse_linear: an f32 weight has no 2:4 form");
  check(w.type != WeightType::s8 || w.k <= kMax2to4K, "sparse_linear: K=", w.k,
        " is more than an s8 weight in 2:4 form may have, ", kMax2to4K);
  check(w.type == WeightType::s8 || a.dtype == (w.type == WeightType::bf16 ? Dtype::bf16 : Dtype::f16),
        "sparse_linear: x and a 2:4 weight have different types; run the bitmap form");
  check(w.n * w.k == 0 || (w.metadata != nullptr && w.tiles != nullptr), "sparse_linear: the 2:4 form is missing");
  check_aligned(w.metadata, 16, "the metadata of the 2:4 form");
  check_aligned(w.tiles, 16, "the 2:4 form");
  if (a.m == 0 || a.n == 0) return;
  const cuda::DeviceGuard guard(place.device, "sparse_linear");
  Params p{};
  p.tiles = static_cast<const char*>(w.tiles);
  p.metadata = reinterpret_cast<const char*>(w.metadata);
  p.finish = int8_matmul::finish_of(a);
  p.row_tiles = static_cast<int>(ceil_div(w.n, kTileRows));
  p.steps = static_cast<int>(ceil_div(w.k, tile_step(w.type)));
  prepare_x(a, w.type, place, p);
  switch (w.type) {
    case WeightType::bf16: return launch_type<Bf16>(a, place, p);
    case WeightType::f16: return launch_type<F16>(a, place, p);
    default: return launch_type<S8>(a, place, p);
  }
}

}  // namespace pycompress::sparse_linear
