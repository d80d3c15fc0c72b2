// stream_weight: few rows of x, which stay in shared memory while every weight goes once from memory through registers.
// See cuda.h.
#include "int8_matmul/cuda.h"
#include "int8_matmul/cuda_finish.cuh"
#include "int8_matmul/cuda_weight.cuh"

namespace pycompress::int8_matmul {
namespace {

struct StreamParams {
  Rows x;
  Quantization how;
  Global<const int8_t> q;       // [m, padded_k]; null: x is quantised here, or weight_only
  Global<const float> x_scale;  // with q
  int64_t padded_k;
  Weight weight;
  int64_t slice;
  int parts;
  Finish finish;
  Global<char> partials;  // [splits, m, columns]; null: y is finished here
  int64_t columns;
};

// A warp has kStreamRows rows of the weight at a time, a group; lane l has bytes 16 l .. 16 l + 15 of each step:
//
//   k:        0        16       32             496      512
//   row 0     | lane 0 | lane 1 | ... | lane 31 | lane 0 | ...
//   row 1     | lane 0 | lane 1 | ...
//
// The groups are dealt to the warps of all blocks in turn, or to sets of `parts` warps of a block, which take its steps
// in turn. x lies in shared memory, padded to whole steps, so that a lane reads the 16 columns that go with its weights
// and neighbouring lanes neighbouring 16 bytes:
//
//   s8   token after token, k ascending
//   f32  token after token, step after step: | columns 0..3 of each lane | 4..7 of each | 8..11 | 12..15 |
//
//   | x | uint32 maxima [kFusedUnits, warps] | f32 scales, inverses of tokens | parts > 1: sums, one or two a thread |

constexpr int kThreads = kStreamWarps * cuda::kWarp;

__host__ __device__ constexpr int64_t whole_steps(int64_t k) {
  return (k + kStreamStep - 1) / kStreamStep * kStreamStep;
}

template <int TOKENS, bool FLOAT>
struct Shared {
  static constexpr int kElement = FLOAT ? 4 : 1;
  int columns;  // of a slice, whole steps
  char* x = cuda::dynamic_shared();
  __device__ explicit Shared(int64_t slice) : columns(static_cast<int>(whole_steps(slice))) {}
  __device__ uint32_t* maxima() const { return reinterpret_cast<uint32_t*>(x + TOKENS * columns * kElement); }
  __device__ float* scales() const { return reinterpret_cast<float*>(maxima() + kFusedUnits * kStreamWarps); }
  __device__ float* inverses() const { return scales() + kMaxTokens; }
  __device__ int32_t* sums() const { return reinterpret_cast<int32_t*>(inverses() + kFusedUnits); }
};

// ---- x into shared memory -----------------------------------------------------------------------------------------

// Already quantised: copies.
template <int TOKENS>
__device__ inline void copy_tokens(const StreamParams& p, const Shared<TOKENS, false>& shared, int64_t k_begin) {
  const int64_t pieces = shared.columns / 16;
  for (int m = 0; m < p.finish.m; ++m) {
    for (int64_t i = threadIdx.x; i < pieces; i += kThreads) {
      const int64_t k = k_begin + i * 16;
      const bool exists = k < p.padded_k;
      p.q.template cp_async<16>(shared.x + m * shared.columns + i * 16, exists ? m * p.padded_k + k : 0,
                                exists ? 16 : 0);
    }
    if (threadIdx.x == 0) shared.scales()[m] = p.x_scale.load(m);
  }
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
}

// Quantised here: at most kFusedUnits units a thread, `turns` of them for each token, so that each is read once.
template <int TOKENS, Dtype D>
__device__ inline void quantize_tokens(const StreamParams& p, const Shared<TOKENS, false>& shared) {
  const int turns = max(static_cast<int>((p.x.k + kThreads * kUnit - 1) / (kThreads * kUnit)), 1);
  const int tokens = static_cast<int>(p.finish.m), used = tokens * turns;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % cuda::kWarp, warp = thread / cuda::kWarp;
  const auto larger = [](uint32_t a, uint32_t b) { return max(a, b); };
  float held[kFusedUnits][kUnit];
#pragma unroll
  for (int i = 0; i < kFusedUnits; ++i) {
    if (i >= used) continue;
    load_unit<D>(p.x, row_begin(p.x, i / turns), (i % turns * kThreads + thread) * kUnit, held[i]);
    const uint32_t largest = cuda::warp_reduce(largest_magnitude(held[i]), larger);
    if (lane == 0) shared.maxima()[i * kStreamWarps + warp] = largest;
  }
  __syncthreads();
  if (warp < tokens) {  // a warp a token
    static_assert(kFusedUnits * kStreamWarps <= cuda::kWarp, "a lane a maximum");
    const int count = turns * kStreamWarps;
    const uint32_t largest = cuda::warp_reduce(lane < count ? shared.maxima()[warp * count + lane] : 0u, larger);
    const RowScale row = row_scale(p.how, largest);
    if (lane == 0) shared.scales()[warp] = row.scale, shared.inverses()[warp] = row.inverse;
  }
  __syncthreads();
  const Grid grid = grid_of(p.how);
#pragma unroll
  for (int i = 0; i < kFusedUnits; ++i) {
    const int m = i / turns, k = (i % turns * kThreads + thread) * kUnit;
    if (i >= used || k >= shared.columns) continue;
    cuda::shared_store(shared.x + m * shared.columns + k,
                       quantize_unit(grid, shared.inverses()[m], held[i], p.x.k - k));
  }
}

// weight_only: as float.
template <int TOKENS, Dtype D>
__device__ inline void widen_tokens(const StreamParams& p, const Shared<TOKENS, true>& shared, int64_t k_begin) {
  for (int m = 0; m < p.finish.m; ++m) {
    const int64_t begin = row_begin(p.x, m);
    float* to = reinterpret_cast<float*>(shared.x) + m * shared.columns;
    for (int64_t k = threadIdx.x * kUnit; k < shared.columns; k += kThreads * kUnit) {
      float v[kUnit];
      load_unit<D>(p.x, begin, k_begin + k, v);
      const int lane = static_cast<int>(k % kStreamStep) / 16, four = static_cast<int>(k % 16) / 4;
      float* at = to + k / kStreamStep * kStreamStep + (four * cuda::kWarp + lane) * 4;
      cuda::shared_store(at, make_float4(v[0], v[1], v[2], v[3]));
      cuda::shared_store(at + cuda::kWarp * 4, make_float4(v[4], v[5], v[6], v[7]));
    }
    if (threadIdx.x == 0) shared.scales()[m] = 1.0f;
  }
}

template <int TOKENS, bool FLOAT, Dtype D>
__device__ inline void prepare_tokens(const StreamParams& p, const Shared<TOKENS, FLOAT>& shared, int64_t k_begin) {
  if constexpr (FLOAT) {
    widen_tokens<TOKENS, D>(p, shared, k_begin);
  } else {
    quantize_tokens<TOKENS, D>(p, shared);
  }
}

template <int TOKENS, bool FLOAT>
__device__ inline void prepare_tokens(const StreamParams& p, const Shared<TOKENS, FLOAT>& shared, int64_t k_begin) {
  if constexpr (!FLOAT) {
    if (!p.q.is_null()) return copy_tokens<TOKENS>(p, shared, k_begin);
  }
  if constexpr (FLOAT || TOKENS <= kFusedUnits) {
    switch (p.x.dtype) {
      case Dtype::f32: return prepare_tokens<TOKENS, FLOAT, Dtype::f32>(p, shared, k_begin);
      case Dtype::bf16: return prepare_tokens<TOKENS, FLOAT, Dtype::bf16>(p, shared, k_begin);
      default: return prepare_tokens<TOKENS, FLOAT, Dtype::f16>(p, shared, k_begin);
    }
  }
}

// ---- products -----------------------------------------------------------------------------------------------------

// Four signed bytes as float: with 128 added they are the low byte of 2^23 + byte, and no conversion is needed.
__device__ inline void widen_bytes(uint32_t word, float (&v)[4]) {
  word ^= 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540u + static_cast<uint32_t>(i))) - 8388736.0f;
  }
}

// sums[t * kStreamRows + r] += the 16 columns of token t times those of row r.
template <int TOKENS>
__device__ inline void multiply(const Shared<TOKENS, false>& shared, int step_k, const uint4 (&w)[kStreamRows],
                                int32_t (&sums)[kStreamRows * TOKENS]) {
  const char* from = shared.x + step_k + threadIdx.x % cuda::kWarp * 16;
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const auto x = cuda::shared_load<uint4>(from + t * shared.columns);
#pragma unroll
    for (int r = 0; r < kStreamRows; ++r) {
      int32_t& sum = sums[t * kStreamRows + r];
      sum = cuda::dp4a(x.x, w[r].x, sum);
      sum = cuda::dp4a(x.y, w[r].y, sum);
      sum = cuda::dp4a(x.z, w[r].z, sum);
      sum = cuda::dp4a(x.w, w[r].w, sum);
    }
  }
}

template <int TOKENS>
__device__ inline void multiply(const Shared<TOKENS, true>& shared, int step_k, const uint4 (&w)[kStreamRows],
                                float (&sums)[kStreamRows * TOKENS]) {
  const float* from = reinterpret_cast<const float*>(shared.x) + step_k + threadIdx.x % cuda::kWarp * 4;
#pragma unroll
  for (int four = 0; four < 4; ++four) {
    float wide[kStreamRows][4];
#pragma unroll
    for (int r = 0; r < kStreamRows; ++r) {
      widen_bytes(four == 0 ? w[r].x : four == 1 ? w[r].y : four == 2 ? w[r].z : w[r].w, wide[r]);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const auto x = cuda::shared_load<float4>(from + t * shared.columns + four * cuda::kWarp * 4);
#pragma unroll
      for (int r = 0; r < kStreamRows; ++r) {
        float& sum = sums[t * kStreamRows + r];
        sum = fmaf(x.x, wide[r][0], sum);
        sum = fmaf(x.y, wide[r][1], sum);
        sum = fmaf(x.z, wide[r][2], sum);
        sum = fmaf(x.w, wide[r][3], sum);
      }
    }
  }
}

// What the zero point adds to every product of row r.
__device__ inline void add_weight(const uint4 (&w)[kStreamRows], int32_t (&weight_sums)[kStreamRows]) {
  constexpr uint32_t kOnes = 0x01010101u;
#pragma unroll
  for (int r = 0; r < kStreamRows; ++r) {
    int32_t& sum = weight_sums[r];
    sum = cuda::dp4a(w[r].x, kOnes, cuda::dp4a(w[r].y, kOnes, sum));
    sum = cuda::dp4a(w[r].z, kOnes, cuda::dp4a(w[r].w, kOnes, sum));
  }
}

// ---- sums over a warp: V values of every lane ----------------------------------------------------------------------

// At each distance the lanes of a pair share the values out, each adds what the other has of its half: V - 1 exchanges
// where V sums one by one would take 5 V. In the end lane l has the whole of value l * V / 32 and, from V = 64 on, the
// next ones; for V < 32 neighbouring 32 / V lanes have the same one.
template <int V, int DISTANCE = 16, class T>
__device__ inline void spread_sums(T (&v)[V]) {
  if constexpr (V == 1) {
    v[0] += __shfl_xor_sync(cuda::kAllLanes, v[0], DISTANCE);
    if constexpr (DISTANCE > 1) spread_sums<1, DISTANCE / 2>(v);
  } else {
    const bool upper = (threadIdx.x & DISTANCE) != 0;
    T half[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const T low = v[i], high = v[i + V / 2];
      const T other = __shfl_xor_sync(cuda::kAllLanes, upper ? low : high, DISTANCE);
      half[i] = (upper ? high : low) + other;
    }
    if constexpr (DISTANCE > 1) spread_sums<V / 2, DISTANCE / 2>(half);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) v[i] = half[i];
  }
}

// One sum of token and output to y, or to the workspace.
template <int TOKENS, bool FLOAT, class T>
__device__ inline void finish_value(const StreamParams& p, const Shared<TOKENS, FLOAT>& shared, int64_t n, int m,
                                    T sum) {
  if (m >= p.finish.m || n >= p.weight.n) return;
  if (!p.partials.is_null()) {
    p.partials.store_as<T>(((blockIdx.y * p.finish.m + m) * p.columns + n) * 4, sum);
    return;
  }
  float v[1] = {
      scaled(static_cast<float>(sum), p.finish.weight_scale.load(n), shared.scales()[m], load_bias(p.finish, n))};
  activate(v, p.finish.activation);
  store_value(p.finish, m, n, v[0]);
}

// ---- the kernel ---------------------------------------------------------------------------------------------------

// A warp's place in the weight: a step of a group.
template <bool VECTORS>
__device__ inline void load_step(const StreamParams& p, int64_t k_begin, int columns, int group, int k,
                                 uint4 (&w)[kStreamRows]) {
  const int n = group * kStreamRows, count = columns - k - static_cast<int>(threadIdx.x) % cuda::kWarp * 16;
  const int64_t at = n * p.weight.k + k_begin + (columns - count);
#pragma unroll
  for (int r = 0; r < kStreamRows; ++r) {
    w[r] = load_weight<VECTORS>(p.weight, at + r * p.weight.k, n + r < p.weight.n ? count : 0);
  }
}

// The sums of the warps that share a group, added up in the first of them. All warps of the block must be here.
template <int VALUES, class T>
__device__ inline void add_parts(T* kept, int parts, T (&sums)[VALUES]) {
  const int thread = static_cast<int>(threadIdx.x), part = thread / cuda::kWarp % parts;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) kept[i * kThreads + thread] = sums[i];
  __syncthreads();
  for (int other = 1; part == 0 && other < parts; ++other) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) sums[i] += kept[i * kThreads + thread + other * cuda::kWarp];
  }
  __syncthreads();
}

template <int TOKENS, bool FLOAT, bool VECTORS>
__global__ void __launch_bounds__(kThreads, stream_blocks(TOKENS, FLOAT)) stream_weight(StreamParams p) {
  using Sum = std::conditional_t<FLOAT, float, int32_t>;
  constexpr int kValues = kStreamRows * TOKENS;
  constexpr int kOfLane = kValues < 32 ? 1 : kValues / 32, kSame = kValues < 32 ? 32 / kValues : 1;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp, warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  const int64_t k_begin = blockIdx.y * p.slice;
  const int columns = static_cast<int>(min(p.slice, p.weight.k - k_begin));
  const int groups = static_cast<int>((p.weight.n + kStreamRows - 1) / kStreamRows);
  const int sets = kStreamWarps / p.parts, stride = static_cast<int>(gridDim.x) * sets;
  const int start = warp % p.parts * kStreamStep, step = p.parts * kStreamStep;
  const Shared<TOKENS, FLOAT> shared(min(p.slice, p.weight.k));

  // The first weights are under way while x is prepared.
  int base = static_cast<int>(blockIdx.x) * sets;
  uint4 ahead[kStreamRows];
  load_step<VECTORS>(p, k_begin, columns, base + warp / p.parts, start, ahead);
  prepare_tokens<TOKENS, FLOAT>(p, shared, k_begin);
  __syncthreads();

  const int32_t zero_point = FLOAT || p.how.zero_point.is_null() ? 0 : p.how.zero_point.load(0) - 128;
  for (; base < groups; base += stride) {  // of the block, whose warps meet at barriers
    const int group = base + warp / p.parts;
    Sum sums[kValues] = {};
    int32_t weight_sums[kStreamRows] = {};
    for (int k = start; k < columns; k += step) {
      uint4 w[kStreamRows];
#pragma unroll
      for (int r = 0; r < kStreamRows; ++r) w[r] = ahead[r];
      const bool last = k + step >= columns;
      load_step<VECTORS>(p, k_begin, columns, last ? group + stride : group, last ? start : k + step, ahead);
      multiply<TOKENS>(shared, k, w, sums);
      if constexpr (!FLOAT) {
        if (zero_point != 0) add_weight(w, weight_sums);
      }
    }
    if constexpr (!FLOAT) {
      if (zero_point != 0) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) sums[i] -= zero_point * weight_sums[i % kStreamRows];
      }
    }
    spread_sums(sums);
    Sum mine[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) mine[i] = sums[i];
    if (p.parts > 1) add_parts(reinterpret_cast<Sum*>(shared.sums()), p.parts, mine);
    if (warp % p.parts != 0 || lane % kSame != 0) continue;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int value = lane / kSame * kOfLane + i;
      finish_value(p, shared, int64_t(group) * kStreamRows + value % kStreamRows, value / kStreamRows, mine[i]);
    }
  }
}

using StreamKernel = void (*)(StreamParams);

template <bool FLOAT>
StreamKernel stream_kernel(const Plan& plan) {
  if (!plan.vectors) {  // the slower way, in two sizes
    return plan.tokens <= 4 ? stream_weight<4, FLOAT, false> : stream_weight<16, FLOAT, false>;
  }
  switch (plan.tokens) {
    case 1: return stream_weight<1, FLOAT, true>;
    case 4: return stream_weight<4, FLOAT, true>;
    case 8: return stream_weight<8, FLOAT, true>;
    default: return stream_weight<16, FLOAT, true>;
  }
}

}  // namespace

int stream_shared_bytes(const CudaArgs& args, const Plan& plan) {
  const int64_t element = args.mode == Mode::weight_only ? 4 : 1;
  const int64_t x = plan.tokens * whole_steps(plan.slice < args.k ? plan.slice : args.k) * element;
  const int64_t sums = plan.parts > 1 ? 2 * kThreads * 4 : 0;
  return static_cast<int>(x + 4 * (kFusedUnits * kStreamWarps + kMaxTokens + kFusedUnits) + sums);
}

void launch_stream_weight(const CudaArgs& args, const Plan& plan, const Workspace& workspace,
                          const cuda::Place& place) {
  const StreamParams params{rows_of(args),
                            {args.input_scale, args.input_zero_point},
                            workspace.q,
                            workspace.x_scale,
                            padded_k(args.k),
                            weight_of(args),
                            plan.slice,
                            plan.parts,
                            finish_of(args),
                            workspace.partials,
                            partial_columns(args.n)};
  const int64_t wanted = cuda::ceil_div(cuda::ceil_div(args.n, kStreamRows), kStreamWarps / plan.parts);
  const bool weight_only = args.mode == Mode::weight_only;
  const int64_t resident =
      int64_t(cuda::device_info(place.device).multiprocessors) * stream_blocks(plan.tokens, weight_only);
  const cuda::Shape shape{
      dim3(static_cast<unsigned>(wanted < resident ? wanted : resident), static_cast<unsigned>(plan.splits)),
      dim3(kThreads), stream_shared_bytes(args, plan)};
  const StreamKernel kernel = weight_only ? stream_kernel<true>(plan) : stream_kernel<false>(plan);
  cuda::launch("int8_linear", "stream_weight", kernel, place, shape, params);
}

}  // namespace pycompress::int8_matmul
