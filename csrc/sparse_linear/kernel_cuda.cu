// The bitmap form on a CUDA device: weights streamed once past up to kBitmapTokens tokens. See cuda_bitmap.cuh.
#include <algorithm>

#include "common/check.h"
#include "sparse_linear/cuda_bitmap.cuh"
#include "sparse_linear/cuda_launch.h"

namespace pycompress::sparse_linear {
namespace {

using cuda::ceil_div;
using int8_matmul::Finish;
using int8_matmul::Rows;

// ---- tuning: none of it was measured on a GPU; the reasons are counts of shared memory, copies and bytes -----------------

// Warps of a block, most first. They share x, which every block copies from L2: the more warps, the fewer copies. The most
// that leaves nearly every multiprocessor a block and fits with all of x; else kPartWarps, with the columns of x that fit.
// 32 warps a multiprocessor have 128 KB of values under way at most, several times what its share of the memory's
// bandwidth asks for in a microsecond of latency. More than 1 token take more than the 64 registers that 32 warps leave.
constexpr int kWarps[] = {32, 16, 8, 4};
constexpr int kFewestWarps = 4, kPartWarps = 8, kWarpsPerMultiprocessor = 32;
constexpr double kLeastBlocks = 0.9;  // of the multiprocessors
template <int M>
constexpr int kMostWarps = M == 1 ? 32 : 16;
template <int M>
constexpr int kMostThreads = kWarp * kMostWarps<M>;
// With x in parts a warp keeps the sums of its rows in shared memory, and so takes few of them.
constexpr int kMaxPartRows = 8;
constexpr int64_t kMaxRowsBytes = 1 << 30;   // of values a warp: positions in its stream are ints
constexpr int64_t kMaxPartColumns = 131072;  // of s8, in an int32 sum: 127 * 128 * this stays below 2^31

struct Plan {
  int warps;                        // of a block
  int rows;                         // the most that a warp takes
  int64_t blocks;                   // of a pass
  int64_t columns;                  // of x in shared memory
  bool whole;                       // which are all
  int64_t passes, tokens_per_pass;  // over the weight
};

// ---- the kernel --------------------------------------------------------------------------------------------------

struct BitmapParams {
  Rows x;                  // of s8: null
  Global<const int8_t> q;  // s8: [M, q_stride]
  int64_t q_stride;
  Global<const float> x_scale;
  Finish finish;
  Bits bits;
  Global<const char> values;
  int64_t nnz;
  Global<const int64_t> row_start;
  int rows, columns, passes, tokens_per_pass;
  bool whole;
};

// Where a row of x in parts stands.
template <int M, class Total>
struct RowState {
  int64_t at;  // of its next value, in bytes
  Total sums[M];
};

template <class V>
using Sum = std::conditional_t<std::is_same_v<V, int8_t>, int, float>;
template <class V>
using Total = std::conditional_t<std::is_same_v<V, int8_t>, long long, float>;

template <class V, class X, int M>
__host__ __device__ constexpr int64_t shared_bytes(int warps, int64_t columns, int state_rows) {
  return columns * Columns<X, M>::kBytes + warps * (kRingBytes + kWarp * int64_t(sizeof(WordStart)) +
                                                    state_rows * int64_t(sizeof(RowState<M, Total<V>>)));
}

// Columns k0 on of tokens m0 to m0 + tokens, and zeros for the tokens up to M.
template <class X, int M, Dtype D>
__device__ inline void fill_columns(const Rows& rows, int64_t m0, int tokens, int64_t k0, int count,
                                    const Columns<X, M>& to) {
  int64_t begin[M];
#pragma unroll
  for (int t = 0; t < M; ++t) begin[t] = t < tokens ? int8_matmul::row_begin(rows, m0 + t) + k0 * rows.col_stride : 0;
  for (int column = threadIdx.x; column < count; column += blockDim.x) {
    X x[M];
#pragma unroll
    for (int t = 0; t < M; ++t) {
      const int64_t at = begin[t] + column * rows.col_stride;
      x[t] = cuda::from_float<X>(t < tokens ? int8_matmul::load_element(rows.x, at, D) : 0.0f);
    }
    to.store(to.place(0, column / kWarp, column % kWarp), x);
  }
}

template <class X, int M>
__device__ inline void fill_x(const BitmapParams& p, int64_t m0, int tokens, int64_t k0, int count,
                              const Columns<X, M>& to) {
  if constexpr (std::is_same_v<X, int8_t>) {
    for (int column = threadIdx.x; column < count; column += blockDim.x) {
      int8_t x[M];
#pragma unroll
      for (int t = 0; t < M; ++t) x[t] = t < tokens ? p.q.load((m0 + t) * p.q_stride + k0 + column) : int8_t(0);
      to.store(to.place(0, column / kWarp, column % kWarp), x);
    }
  } else if constexpr (std::is_same_v<X, __nv_bfloat16>) {
    fill_columns<X, M, Dtype::bf16>(p.x, m0, tokens, k0, count, to);
  } else if constexpr (std::is_same_v<X, __half>) {
    fill_columns<X, M, Dtype::f16>(p.x, m0, tokens, k0, count, to);
  } else {
    switch (p.x.dtype) {
      case Dtype::f32: fill_columns<X, M, Dtype::f32>(p.x, m0, tokens, k0, count, to); break;
      case Dtype::bf16: fill_columns<X, M, Dtype::bf16>(p.x, m0, tokens, k0, count, to); break;
      default: fill_columns<X, M, Dtype::f16>(p.x, m0, tokens, k0, count, to); break;
    }
  }
}

// How many weights a row keeps in the `count` columns from a group's first on.
template <int Words>
__device__ inline int count_kept(const Bits& bits, Group group, int count, int lane) {
  int kept = 0;
#pragma unroll 1
  for (; count > 0; count -= 32 * Words, group.at += 4 * Words, group.left -= 32 * Words) {
    kept += __popc(align_word<Words>(load_words<Words>(bits, group, lane), group, lane));
  }
  return cuda::warp_sum(kept);
}

// The byte of `values` where row n begins, within their memory whatever row_start says. Read by one lane.
template <class V>
__device__ inline int64_t start_of(const BitmapParams& p, int64_t n, int lane) {
  const int64_t start = __shfl_sync(kAllLanes, lane == 0 ? p.row_start.load(n) : 0, 0);
  return min(max(start, int64_t(0)), p.nnz) * int64_t(sizeof(V));
}

__device__ inline void finish(const BitmapParams& p, int64_t m, int64_t n, float sum) {
  const float scale = p.finish.weight_scale.is_null() ? 1.0f : p.finish.weight_scale.load(n);
  const float x_scale = p.x_scale.is_null() ? 1.0f : p.x_scale.load(m);
  float y[1] = {int8_matmul::scaled(sum, scale, x_scale, int8_matmul::load_bias(p.finish, n))};
  int8_matmul::activate(y, p.finish.activation);
  int8_matmul::store_value(p.finish, m, n, y[0]);
}

// Start here: one warp, its rows, all of x in shared memory (p.whole). Where x does not fit, the same is done for one
// part of its columns after the other, and what a row has so far waits in `states`.
template <class V, class X, int M>
__global__ void __launch_bounds__(kMostThreads<M>, 1) sparse_bitmap(const BitmapParams p) {
  constexpr int kWords = kGroupWords<V>, kStep = kGroupColumns<V>, kSize = sizeof(V);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t share = int64_t(blockIdx.x / p.passes) * warps + warp, shares = int64_t(gridDim.x / p.passes) * warps;
  const int64_t first = p.finish.n * share / shares;
  const int rows = static_cast<int>(p.finish.n * (share + 1) / shares - first);
  const int64_t m0 = int64_t(blockIdx.x % p.passes) * p.tokens_per_pass;
  const int tokens = static_cast<int>(min(p.finish.m - m0, int64_t(p.tokens_per_pass)));

  char* shared = cuda::dynamic_shared();
  const Columns<X, M> x{reinterpret_cast<typename Columns<X, M>::Part*>(shared), p.columns};
  shared += int64_t(p.columns) * Columns<X, M>::kBytes;
  char* ring = shared + warp * kRingBytes;
  shared += warps * kRingBytes;
  auto* words = reinterpret_cast<WordStart*>(shared) + warp * kWarp;
  shared += warps * kWarp * sizeof(WordStart);
  auto* states = reinterpret_cast<RowState<M, Total<V>>*>(shared) + warp * p.rows;

  const int token = lane / (kWarp / M);
  const bool writes = lane % (kWarp / M) == 0 && token < tokens;

  ValueStream stream(p.values, p.nnz * kSize, ring, lane);
  int k0 = 0;
  do {
    const int count = min(p.columns, p.bits.k - k0);
    const bool is_last = k0 + count == p.bits.k;
    if (k0 != 0) __syncthreads();  // nobody reads the part before any more
    if (p.whole && rows > 0) stream.open(start_of<V>(p, first, lane), start_of<V>(p, first + rows, lane));
    fill_x<X, M>(p, m0, tokens, k0, count, x);
    __syncthreads();
    Group group{first * p.bits.row_bytes + k0 / 8, p.bits.k - k0};
    RawWords raw;
    if (rows > 0) raw = load_words<kWords>(p.bits, group, lane);
    for (int row = 0; row < rows; ++row) {
      if (!p.whole) {
        const int64_t at = k0 == 0 ? start_of<V>(p, first + row, lane) : states[row].at;
        const int64_t end = at + count_kept<kWords>(p.bits, group, count, lane) * kSize;
        __syncwarp(kAllLanes);  // order of memory: all lanes have read `at`
        if (lane == 0) states[row].at = end;
        stream.open(at, end);
      }
      Sum<V> sums[M] = {};
      const int64_t next_row = group.at + p.bits.row_bytes;
      for (int column = 0; column < count; column += kStep) {
        const uint32_t word = align_word<kWords>(raw, group, lane);
        group.at += 4 * kWords;
        group.left -= kStep;
        if (column + kStep >= count) group = {next_row, p.bits.k - k0};
        // The next words are under way while this group is multiplied.
        if (column + kStep < count || row + 1 < rows) raw = load_words<kWords>(p.bits, group, lane);
        multiply_group<V, X, M>(word, column, x, stream, words, lane, sums);
      }
      Total<V> sum = add_lanes<M>(sums, lane);
      if (!writes) continue;
      if (k0 != 0) sum += states[row].sums[token];
      if (is_last) {
        finish(p, m0 + token, first + row, static_cast<float>(sum));
      } else {
        states[row].sums[token] = sum;
      }
    }
    k0 += count;
  } while (k0 < p.bits.k);
  stream.close();
}

// ---- the launch --------------------------------------------------------------------------------------------------

template <class V, class X, int M>
Plan pick(const LinearArgs& a, const cuda::DeviceInfo& device) {
  constexpr int64_t kStep = kGroupColumns<V>;
  Plan plan{};
  plan.passes = std::max<int64_t>(ceil_div(a.m, kBitmapTokens), 1);
  plan.tokens_per_pass = ceil_div(a.m, plan.passes);
  plan.warps = kFewestWarps;
  plan.columns = std::max(ceil_div(a.k, kStep), int64_t(1)) * kStep;
  const auto fits = [&](int warps) { return shared_bytes<V, X, M>(warps, plan.columns, 0) <= device.shared_bytes; };
  for (int warps : kWarps) {
    const int64_t blocks = ceil_div(a.n, warps) * plan.passes;
    if (warps <= kMostWarps<M> && fits(warps) && blocks >= kLeastBlocks * device.multiprocessors) {
      plan.warps = warps;
      break;
    }
  }
  plan.whole = fits(plan.warps) && (!std::is_same_v<V, int8_t> || plan.columns <= kMaxPartColumns);
  if (!plan.whole) {
    plan.warps = kPartWarps;
    const int64_t room = device.shared_bytes - shared_bytes<V, X, M>(plan.warps, 0, kMaxPartRows);
    plan.columns = std::min(room / Columns<X, M>::kBytes, kMaxPartColumns) / kStep * kStep;
  }
  const int64_t shared = shared_bytes<V, X, M>(plan.warps, plan.columns, plan.whole ? 0 : kMaxPartRows);
  const int64_t at_once =
      std::clamp(cuda::blocks_by_shared(device, static_cast<int>(shared)), 1, kWarpsPerMultiprocessor / plan.warps);
  const int64_t most =
      plan.whole ? std::max<int64_t>(kMaxRowsBytes / std::max<int64_t>(a.k * int64_t(sizeof(V)), 1), 1) : kMaxPartRows;
  plan.blocks = std::min(ceil_div(a.n, plan.warps), ceil_div(device.multiprocessors * at_once, plan.passes));
  plan.blocks = std::max(plan.blocks, ceil_div(a.n, most * plan.warps));
  plan.rows = static_cast<int>(ceil_div(a.n, plan.blocks * plan.warps));
  return plan;
}

template <class V, class X, int M>
void launch_bitmap(const CudaArgs& a, const CudaBitmap& w, const cuda::Place& place) {
  const Plan plan = pick<V, X, M>(a, cuda::device_info(place.device));
  const int64_t row_bytes = ceil_div(w.k, 8);
  BitmapParams p{};
  p.finish = int8_matmul::finish_of(a);
  if constexpr (std::is_same_v<X, int8_t>) {
    const Quantized x = quantize(a, place);
    p.q = x.q;
    p.q_stride = x.stride;
    p.x_scale = x.scale;
  } else {
    p.x = int8_matmul::rows_of(a);
  }
  p.bits = {reinterpret_cast<const char*>(w.bits), w.n * row_bytes, static_cast<int>(row_bytes), static_cast<int>(w.k)};
  p.values = static_cast<const char*>(w.values);
  p.nnz = w.nnz;
  p.row_start = w.row_start;
  p.rows = plan.rows;
  p.columns = static_cast<int>(plan.columns);
  p.whole = plan.whole;
  p.passes = static_cast<int>(plan.passes);
  p.tokens_per_pass = static_cast<int>(plan.tokens_per_pass);
  const int64_t blocks = plan.blocks * plan.passes;
  check(blocks < (int64_t(1) << 31), "sparse_linear: M=", a.m, " x N=", a.n, " is too large for one launch");
  const int shared = static_cast<int>(shared_bytes<V, X, M>(plan.warps, plan.columns, plan.whole ? 0 : plan.rows));
  const cuda::Shape shape{dim3(static_cast<unsigned>(blocks)), dim3(kWarp * plan.warps), shared, false};
  cuda::launch("sparse_linear", "sparse_bitmap", sparse_bitmap<V, X, M>, place, shape, p);
}

template <class V, class X>
void run_tokens(const CudaArgs& a, const CudaBitmap& w, const cuda::Place& place) {
  const int64_t tokens = ceil_div(a.m, ceil_div(a.m, kBitmapTokens));
  if (tokens <= 1) return launch_bitmap<V, X, 1>(a, w, place);
  if (tokens <= 4) return launch_bitmap<V, X, 4>(a, w, place);
  return launch_bitmap<V, X, 8>(a, w, place);
}

}  // namespace

int64_t workspace_bytes(const LinearArgs& a, const CudaBitmap& w) {
  return w.type == WeightType::s8 ? quantized_bytes(a) : 0;
}

void run_bitmap_cuda(const CudaArgs& a, const CudaBitmap& w, const cuda::Place& place) {
  check_cuda_args(a, w.type, w.n, w.k, workspace_bytes(a, w));
  check(w.n * w.k == 0 || w.bits != nullptr, "sparse_linear: the bitmap is missing");
  check(w.n == 0 || w.row_start != nullptr, "sparse_linear: row_start is missing");
  check(w.nnz >= 0 && (w.nnz == 0 || w.values != nullptr), "sparse_linear: the values are missing, nnz=", w.nnz);
  check_aligned(w.bits, 4, "bitmap");
  check_aligned(w.values, 16, "values");
  if (a.m == 0 || a.n == 0) return;
  const cuda::DeviceGuard guard(place.device, "sparse_linear");
  switch (w.type) {
    case WeightType::s8: return run_tokens<int8_t, int8_t>(a, w, place);
    case WeightType::f32: return run_tokens<float, float>(a, w, place);
    case WeightType::bf16:
      if (a.dtype == Dtype::bf16) return run_tokens<__nv_bfloat16, __nv_bfloat16>(a, w, place);
      return run_tokens<__nv_bfloat16, float>(a, w, place);
    case WeightType::f16:
      if (a.dtype == Dtype::f16) return run_tokens<__half, __half>(a, w, place);
      return run_tokens<__half, float>(a, w, place);
  }
}

}  // namespace pycompress::sparse_linear
