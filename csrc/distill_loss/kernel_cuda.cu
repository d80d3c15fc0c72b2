// The loss on a GPU: its kernels and their launches. Contract: cuda.h; what a block does with a row: cuda_block.cuh.
#include "common/check.h"
#include "distill_loss/cuda_block.cuh"

namespace pycompress::distill_loss {
namespace {

constexpr const char* kOp = "distill_loss";
constexpr int kMostThreads = 256, kPrepareThreads = 256, kFinishThreads = 256, kScaleThreads = 256;

template <class Slots, Soft kSoft>
__global__ void __launch_bounds__(kMostThreads, 3) distill_loss_rows(const CudaParams p) {
  LossBlock<Slots, kSoft>(p).run();
}

// Before the rows: the flags at 0, and each block's part of the items.
__global__ void __launch_bounds__(kPrepareThreads) distill_loss_prepare(const CudaParams p) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  if (p.blocks_per_row > 1) {
    for (int64_t i = at; i < int64_t(p.groups) * (kFlagBytes / 4); i += threads) p.flags.store(i, 0);
  }
  if (p.items != Items::counted) return;
  double items = 0;
  for (int64_t row = at; row < p.tokens; row += threads) items += items_of_token(p, row);
  items = cuda::block_sum(items, reinterpret_cast<double*>(cuda::dynamic_shared()));
  if (threadIdx.x == 0) p.counted.store(blockIdx.x, items);
}

// After the rows: the sums of the groups, each in shared memory of its own, and 1 / items for who divides later.
__global__ void __launch_bounds__(kFinishThreads)
    distill_loss_finish(const CudaParams p, Global<float> loss, Global<float> hard, Global<float> soft,
                        Global<float> grad_scale) {
  const Global<float> to[3] = {loss, hard, soft};
  if (!loss.is_null()) {
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      double sum = 0;
      for (int group = static_cast<int>(threadIdx.x); group < p.groups; group += static_cast<int>(blockDim.x)) {
        sum += p.totals.load(int64_t(group) * 3 + which);
      }
      sum = cuda::block_sum(sum,
                            reinterpret_cast<double*>(cuda::dynamic_shared()) + which * kFinishThreads / cuda::kWarp);
      if (threadIdx.x == 0) to[which].store(0, static_cast<float>(sum));
    }
  }
  if (!grad_scale.is_null() && threadIdx.x < cuda::kWarp) {
    const double inverse = inverse_of_items(p);
    if (threadIdx.x == 0) grad_scale.store(0, inverse == inverse ? static_cast<float>(inverse) : 0.0f);
  }
}

// ---- grad *= factor -------------------------------------------------------------------------------------------------

struct ScaleParams {
  Global<char> grad;
  Global<const float> factor;
  int first;  // the place of the first element in its slot
  int factor_stride;
  int64_t rows, cols;
};

template <class T>
__global__ void __launch_bounds__(kScaleThreads) distill_loss_scale(const ScaleParams p) {
  constexpr int kClasses = 16 / sizeof(T);
  using Pack = cuda::Pack<T, kClasses>;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const float factor = p.factor.load(row * p.factor_stride);
    if (factor == 1) continue;
    const int64_t start = row * p.cols, lead = (start + p.first) & (kClasses - 1);
    const int64_t slots = (p.cols + lead + kClasses - 1) / kClasses;
    for (int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; slot < slots;
         slot += int64_t(gridDim.x) * blockDim.x) {
      const int64_t begin = slot * kClasses - lead, at = (start + begin) * int64_t(sizeof(T));
      if (begin >= 0 && begin + kClasses <= p.cols) {
        Pack pack = p.grad.template load_as<Pack>(at);
#pragma unroll
        for (int i = 0; i < kClasses; ++i) pack.value[i] = cuda::from_float<T>(factor * cuda::to_float(pack.value[i]));
        p.grad.template store_as<Pack>(at, pack);
        continue;
      }
      for (int64_t i = begin < 0 ? -begin : 0; i < kClasses && begin + i < p.cols; ++i) {
        const int64_t one = at + i * int64_t(sizeof(T));
        p.grad.template store_as<T>(one, cuda::from_float<T>(factor * cuda::to_float(p.grad.template load_as<T>(one))));
      }
    }
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

using Kernel = void (*)(CudaParams);

template <class Slots>
Kernel kernel_of(Soft soft) {
  switch (soft) {
    case Soft::forward_kl: return distill_loss_rows<Slots, Soft::forward_kl>;
    case Soft::reverse_kl: return distill_loss_rows<Slots, Soft::reverse_kl>;
    case Soft::jsd: return distill_loss_rows<Slots, Soft::jsd>;
    default: return distill_loss_rows<Slots, Soft::student_only>;
  }
}

Kernel kernel_of(const Plan& plan, Dtype dtype, Soft soft) {
  if (!plan.vectors) return kernel_of<SingleSlots>(soft);
  switch (dtype) {
    case Dtype::f32: return kernel_of<VectorSlots<float>>(soft);
    case Dtype::bf16: return kernel_of<VectorSlots<__nv_bfloat16>>(soft);
    default: return kernel_of<VectorSlots<__half>>(soft);
  }
}

Operand operand_of(const Rows& r) {
  const auto address = reinterpret_cast<uintptr_t>(r.data);
  Operand operand;
  operand.data = static_cast<const char*>(r.data);
  operand.dtype = r.dtype;
  operand.first = static_cast<int>(address % 16) / dtype_size(r.dtype);
  operand.inner_rows = r.inner_rows;
  operand.outer_stride = r.outer_stride;
  operand.row_stride = r.row_stride;
  operand.col_stride = r.col_stride;
  return operand;
}

CudaFormula formula_of(const CudaArgs& a) {
  const bool no_jsd = a.divergence == Divergence::jsd && (a.beta == 0 || a.beta == 1);  // it is 0 at both ends
  CudaFormula f{};
  f.hard = a.alpha > 0;
  f.soft = a.alpha < 1 && !no_jsd;
  const double tau = f.soft ? a.temperature : 1;
  f.squarings = a.label_smoothing > 0 ? -1 : tau == 1 ? 0 : tau == 2 ? 1 : tau == 4 ? 2 : -1;
  f.scale = static_cast<float>(1.44269504088896341 / tau);
  f.hard_gain = static_cast<float>(a.alpha * a.grad_factor);
  f.soft_gain = static_cast<float>((1 - a.alpha) * tau * a.grad_factor);
  f.tau2 = static_cast<float>(tau * tau);
  f.beta = static_cast<float>(a.beta);
  f.no_beta = static_cast<float>(1 - a.beta);
  f.smoothing = f.hard ? static_cast<float>(a.label_smoothing) : 0;
  f.no_smoothing = static_cast<float>(1 - a.label_smoothing);
  f.alpha = a.alpha;
  f.no_alpha = 1 - a.alpha;
  return f;
}

CudaParams params_of(const CudaArgs& a, const Plan& plan) {
  CudaParams p{};
  p.formula = formula_of(a);
  p.student = operand_of(a.student);
  if (p.formula.soft) p.teacher = operand_of(a.teacher);
  p.grad = static_cast<char*>(a.grad);
  p.tokens = a.student.rows;
  p.vocab = static_cast<int>(a.student.cols);
  p.common = p.formula.soft && a.teacher.cols < a.student.cols ? static_cast<int>(a.teacher.cols) : p.vocab;
  p.student_end = p.formula.hard ? p.vocab : p.common;
  p.formula.has_rest = p.formula.hard && p.common < p.vocab;
  p.labels = a.labels;
  p.token_weight = a.token_weight;
  p.ignore_index = a.ignore_index;
  p.label_classes = a.label_classes > 0 ? a.label_classes : a.student.cols;
  p.num_items = a.num_items;
  p.given_items = a.given_items;
  p.items = a.reduction != Reduction::mean ? Items::one
            : a.num_items != nullptr       ? Items::on_device
            : a.given_items >= 0           ? Items::given
                                           : Items::counted;
  p.normalize_grad = a.normalize_grad;
  char* const workspace = static_cast<char*>(a.workspace);
  p.counted = reinterpret_cast<double*>(workspace);
  if (a.reduction == Reduction::none) {
    p.loss = a.loss;
    p.hard = a.hard;
    p.soft = a.soft;
  } else {
    p.totals = reinterpret_cast<double*>(workspace + totals_at());
  }
  p.staged = plan.staged;
  p.blocks_per_row = plan.blocks_per_row;
  p.slots_per_block = plan.slots_per_block;
  p.groups = plan.groups;
  p.scratch_bytes = scratch_bytes(plan.threads);
  p.flags = reinterpret_cast<uint32_t*>(workspace + flags_at(plan));
  p.exchange = reinterpret_cast<float*>(workspace + exchange_at(plan));
  return p;
}

}  // namespace

void run_cuda(const CudaArgs& a, const cuda::Place& place, const Plan& plan) {
  check_cuda_args(a);
  const CudaParams p = params_of(a, plan);
  const cuda::DeviceGuard guard(place.device, kOp);
  const auto warps_bytes = [](int threads) { return threads / cuda::kWarp * 8; };
  const bool split = plan.blocks_per_row > 1;
  if (p.items == Items::counted || split) {
    cuda::launch(kOp, "distill_loss_prepare", distill_loss_prepare, place,
                 {dim3(kPrepareBlocks), dim3(kPrepareThreads), warps_bytes(kPrepareThreads), false}, p);
  }
  const Soft soft = p.formula.soft ? static_cast<Soft>(a.divergence) : Soft::student_only;
  const cuda::Shape shape{dim3(static_cast<unsigned>(plan.groups) * static_cast<unsigned>(plan.blocks_per_row)),
                          dim3(static_cast<unsigned>(plan.threads)), plan.shared_bytes, split};
  cuda::launch(kOp, "distill_loss_rows", kernel_of(plan, a.student.dtype, soft), place, shape, p);
  const bool reduced = a.reduction != Reduction::none && a.loss != nullptr;
  if (!reduced && a.grad_scale == nullptr) return;
  cuda::launch(kOp, "distill_loss_finish", distill_loss_finish, place,
               {dim3(1), dim3(kFinishThreads), 3 * warps_bytes(kFinishThreads), false}, p,
               Global<float>(reduced ? a.loss : nullptr), Global<float>(a.hard), Global<float>(a.soft),
               Global<float>(a.grad_scale));
}

void scale_cuda(void* grad, Dtype dtype, int64_t rows, int64_t cols, const float* factor, int factor_stride,
                const cuda::Place& place) {
  if (factor_stride == 0) {  // one row, however long
    cols *= rows;
    rows = rows > 0 ? 1 : 0;
  }
  if (rows == 0 || cols == 0) return;
  const int64_t size = dtype_size(dtype), classes = 16 / size;
  const ScaleParams p{static_cast<char*>(grad),
                      factor,
                      static_cast<int>(reinterpret_cast<uintptr_t>(grad) % 16 / static_cast<uintptr_t>(size)),
                      factor_stride,
                      rows,
                      cols};
  const cuda::DeviceGuard guard(place.device, kOp);
  // Blocks for every multiprocessor to hold several; each takes slots and rows in turn.
  const int64_t most = int64_t(cuda::device_info(place.device).multiprocessors) * 8;
  const int64_t across = cuda::ceil_div(cols, classes * kScaleThreads);
  const int64_t wide = across < most ? across : most, fits = most / wide, high = rows < fits ? rows : fits;
  const cuda::Shape shape{dim3(static_cast<unsigned>(wide), static_cast<unsigned>(high)), dim3(kScaleThreads)};
  const auto kernel = dtype == Dtype::f32    ? distill_loss_scale<float>
                      : dtype == Dtype::bf16 ? distill_loss_scale<__nv_bfloat16>
                                             : distill_loss_scale<__half>;
  cuda::launch(kOp, "distill_loss_scale", kernel, place, shape, p);
}

}  // namespace pycompress::distill_loss
