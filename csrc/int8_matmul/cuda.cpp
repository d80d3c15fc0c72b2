// Host side of the int8 linear layer on CUDA: checks, the choice of a kernel, the workspace. See cuda.h.
#include "int8_matmul/cuda.h"

#include <algorithm>

#include "common/check.h"

namespace pycompress::int8_matmul {
namespace {

using cuda::ceil_div;

// ---- checks ------------------------------------------------------------------------------------------------------

// Rows and columns are counted in int, up to the end of the last tile, and of what stream_weight would read next.
constexpr int64_t kMaxRows = (int64_t(1) << 31) - 65536;
constexpr int64_t kMaxGrid = 65535;  // blocks along y

void check_args(const CudaArgs& a) {
  check(a.m >= 0 && a.m <= kMaxRows && a.n >= 0 && a.n <= kMaxRows && a.k >= 0, "int8_linear: M=", a.m, ", N=", a.n,
        ", K=", a.k, ", expected at least 0, and M and N at most ", kMaxRows);
  check(a.inner_rows >= 1, "int8_linear: inner_rows=", a.inner_rows, ", expected at least 1");
  check(a.m * a.n == 0 || (a.y != nullptr && a.weight_scale != nullptr), "int8_linear: y or weight_scale is missing");
  check(a.m * a.k == 0 || a.x != nullptr, "int8_linear: x is missing");
  check(a.n * a.k == 0 || a.weight != nullptr, "int8_linear: the weight is missing");
  check(a.ldy >= a.n, "int8_linear: ldy=", a.ldy, " is less than N=", a.n);
  const bool both = a.input_scale != nullptr && a.input_zero_point != nullptr;
  const bool neither = a.input_scale == nullptr && a.input_zero_point == nullptr;
  check(a.mode == Mode::static_ ? both : neither,
        "int8_linear: input_scale and input_zero_point belong to mode static, which needs both");
  check(a.mode != Mode::weight_only || a.m <= kMaxTokens, "int8_linear: weight_only with M=", a.m,
        ", the CUDA kernel takes at most ", kMaxTokens, " tokens; backend='triton' takes any");
}

// Units of 8 elements that each thread of stream_weight holds where it quantises x itself.
int64_t fused_units(const CudaArgs& a) { return a.m * std::max<int64_t>(ceil_div(a.k, 8 * 32 * kStreamWarps), 1); }

void check_plan(const CudaArgs& a, const Plan& plan) {
  const int64_t step = plan.tokens != 0 ? kStreamStep : kTileK;
  check(plan.slice > 0 && plan.slice % step == 0 && (a.mode == Mode::weight_only || plan.slice <= kMaxChunkK) &&
            plan.splits >= 1 && plan.splits * plan.slice >= a.k && plan.splits <= kMaxGrid,
        "int8_linear: K=", a.k, " in ", plan.splits, " splits of ", plan.slice);
  check(plan.tokens != 0 ? a.m <= plan.tokens && plan.tokens <= kMaxTokens : a.mode != Mode::weight_only,
        "int8_linear: a plan for ", plan.tokens, " tokens, M=", a.m);
  check(plan.tile == kWide || plan.tile == kNarrow, "int8_linear: tile=", plan.tile);
  check(ceil_div(a.m, 64) * ceil_div(a.n, 64) <= kMaxRows, "int8_linear: M=", a.m, ", N=", a.n,
        ": more tiles than blocks");
  check(plan.parts >= 1 && kStreamWarps % plan.parts == 0, "int8_linear: parts=", plan.parts);
  check(!plan.fused || (plan.tokens != 0 && plan.splits == 1 && fused_units(a) <= kFusedUnits), "int8_linear: M=", a.m,
        ", K=", a.k, " is too much for a kernel that quantises x itself");
  const int64_t bytes = workspace_bytes(a, plan);
  check(bytes == 0 || (a.workspace != nullptr && a.workspace_bytes >= bytes &&
                       reinterpret_cast<uintptr_t>(a.workspace) % 16 == 0),
        "int8_linear: a workspace of ", a.workspace_bytes, " bytes, expected ", bytes, ", aligned to 16");
}

// ---- the choice ---------------------------------------------------------------------------------------------------

// K in equal slices of whole steps: at least `least` of them, about `wanted`, none longer than `longest`.
void split_k(Plan& plan, int64_t k, int64_t step, int64_t wanted, int64_t longest) {
  const int64_t splits = std::max(std::max<int64_t>(wanted, 1), ceil_div(k, longest));
  plan.slice = std::max(ceil_div(ceil_div(k, splits), step) * step, step);
  plan.splits = std::max<int64_t>(ceil_div(k, plan.slice), 1);
}

void plan_stream(Plan& plan, const CudaArgs& a, const cuda::DeviceInfo& device) {
  plan.tokens = a.m <= 1 ? 1 : a.m <= 4 ? 4 : a.m <= 8 ? 8 : 16;
  if (!plan.vectors) plan.tokens = a.m <= 4 ? 4 : 16;
  const int64_t groups = std::max<int64_t>(ceil_div(a.n, kStreamRows), 1);
  const int blocks = stream_blocks(plan.tokens, a.mode == Mode::weight_only);
  const int64_t warps = int64_t(device.multiprocessors) * blocks * kStreamWarps;
  // What a block's x may take: its share of shared memory, less 3 KB for maxima, scales and sums.
  const int64_t shared = cuda::shared_of_each(device, blocks);
  const int64_t element = a.mode == Mode::weight_only ? 4 : 1;
  const int64_t fits = (shared - 3072) / (plan.tokens * element) / kStreamStep * kStreamStep;
  const int64_t exact = element == 1 ? kMaxChunkK / kStreamStep * kStreamStep : fits;
  const int64_t wanted = std::min(warps / (groups * kStreamWarps), a.k / (kSmallestStreamSplit * kStreamWarps));
  split_k(plan, a.k, kStreamStep, wanted, std::max<int64_t>(std::min(fits, exact), kStreamStep));
  while (plan.parts < kStreamWarps && plan.parts * 2 * kStreamStep <= plan.slice &&
         groups * plan.splits * plan.parts * 2 <= warps) {
    plan.parts *= 2;
  }
  plan.fused = a.mode != Mode::weight_only && plan.splits == 1 && fused_units(a) <= kFusedUnits;
}

void plan_tiles(Plan& plan, const CudaArgs& a, const cuda::DeviceInfo& device) {
  const auto tiles = [&](int tile) { return ceil_div(a.m, kTiles[tile].m) * ceil_div(a.n, kTiles[tile].n); };
  plan.tile = tiles(kWide) >= device.multiprocessors ? kWide : kNarrow;
  // Two blocks a multiprocessor, so that one computes while the other waits.
  const int64_t wanted =
      std::min(2 * device.multiprocessors / std::max<int64_t>(tiles(plan.tile), 1), a.k / kSmallestTileSplit);
  split_k(plan, a.k, kTileK, wanted, kMaxChunkK);
}

// ---- the workspace ------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t q = 0, x_scale = 0, partials = 0;
};

Sizes sizes(const CudaArgs& a, const Plan& plan) {
  Sizes s;
  if (a.mode != Mode::weight_only && !plan.fused) {
    s.q = a.m * padded_k(a.k);
    s.x_scale = ceil_div(a.m * 4, 16) * 16;
  }
  if (plan.splits > 1) s.partials = plan.splits * a.m * partial_columns(a.n) * 4;
  return s;
}

Workspace divide(const CudaArgs& a, const Plan& plan) {
  const Sizes s = sizes(a, plan);
  auto* at = static_cast<char*>(a.workspace);
  Workspace workspace;
  if (s.x_scale != 0) {
    workspace.q = reinterpret_cast<int8_t*>(at);
    workspace.x_scale = reinterpret_cast<float*>(at + s.q);
  }
  if (s.partials != 0) workspace.partials = at + s.q + s.x_scale;
  return workspace;
}

}  // namespace

Plan pick(const CudaArgs& a, const cuda::DeviceInfo& device) {
  Plan plan;
  plan.vectors = a.k % 16 == 0 && reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
  if (a.m <= kMaxTokens) {
    plan_stream(plan, a, device);
  } else {
    plan_tiles(plan, a, device);
  }
  return plan;
}

int64_t workspace_bytes(const CudaArgs& a, const Plan& plan) {
  const Sizes s = sizes(a, plan);
  return s.q + s.x_scale + s.partials;
}

void run_cuda(const CudaArgs& a, const cuda::Place& place, const Plan& plan) {
  check_args(a);
  if (a.m == 0 || a.n == 0) return;
  check_plan(a, plan);
  const Workspace workspace = divide(a, plan);
  const cuda::DeviceGuard guard(place.device, "int8_linear");
  if (workspace.q != nullptr) {
    launch_quantize_rows("int8_linear", a, a.input_scale, a.input_zero_point, workspace.q, workspace.x_scale, place);
  }
  if (plan.tokens != 0) {
    launch_stream_weight(a, plan, workspace, place);
  } else {
    launch_multiply_tile(a, plan, workspace, place);
  }
  if (plan.splits > 1) launch_add_splits(a, plan, workspace, place);
}

void run_cuda(const CudaArgs& a, const cuda::Place& place) {
  run_cuda(a, place, pick(a, cuda::device_info(place.device)));
}

}  // namespace pycompress::int8_matmul
