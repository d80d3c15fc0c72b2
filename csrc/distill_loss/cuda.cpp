// Host side of the loss on a GPU: the checks of a call, and how it is spread over the device.
#include "distill_loss/cuda.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"

namespace pycompress::distill_loss {
namespace {

// The choice as data. No GPU has timed it: the reasons are those of arithmetic and of the byte counts.
struct Tuning {
  int least_threads = 32;      // a warp a row
  int most_threads = 256;      // the kernels' __launch_bounds__(256, 3): three such blocks have the registers they need
  int resident_threads = 768;  // that many a multiprocessor, therefore
  int resident_blocks = 3;     // of long rows: while one waits for its sums, the others keep the memory busy
  int most_resident = 16;      // what a multiprocessor holds on the smallest of the targets (sm_86)
  int slots_a_thread = 4;      // at least, so that copies are under way while others are summed; short rows get a warp
  int least_slots = 512;       // a block of a split row with less would mostly wait for the others
};
constexpr Tuning kTuning;

using cuda::ceil_div;

int power_of_two_from(int64_t n, int least, int most) {
  int power = least;
  while (power < n && power < most) power *= 2;
  return power;
}

bool uses_teacher(const CudaArgs& a) {
  const bool no_jsd = a.divergence == Divergence::jsd && (a.beta == 0 || a.beta == 1);
  return a.alpha < 1 && !no_jsd;
}

// Where the rows begin, in elements past an address divisible by 16: of row 0, and what a step of each level adds.
struct Alignment {
  int64_t first, row_step, outer_step, inner_rows;
};

int64_t modulo(int64_t a, int64_t n) { return ((a % n) + n) % n; }

Alignment alignment_of(const void* data, const Rows& rows, int64_t slot) {
  const int64_t size = dtype_size(rows.dtype);
  const auto address = reinterpret_cast<uintptr_t>(data);
  const bool flat = rows.rows <= rows.inner_rows;
  const int64_t outer = flat ? rows.inner_rows * rows.row_stride : rows.outer_stride;
  return {int64_t(address % 16) / size, modulo(rows.row_stride, slot), modulo(outer, slot), rows.inner_rows};
}

// Whether every row of both begins at the same place between two addresses divisible by 16.
bool line_up(const Alignment& a, const Alignment& b, int64_t slot) {
  if (a.first != b.first || a.row_step != b.row_step) return false;
  const auto even = [&](const Alignment& x) { return modulo(x.inner_rows * x.row_step - x.outer_step, slot) == 0; };
  return (even(a) && even(b)) || (a.inner_rows == b.inner_rows && a.outer_step == b.outer_step);
}

bool takes_vectors(const CudaArgs& a) {
  const int64_t slot = 16 / dtype_size(a.student.dtype);
  const Alignment student = alignment_of(a.student.data, a.student, slot);
  if (a.student.col_stride != 1) return false;
  if (a.grad != nullptr) {
    const Rows grad{a.grad, a.student.dtype, a.student.rows, a.student.cols, a.student.rows, 0, a.student.cols, 1};
    if (!line_up(student, alignment_of(a.grad, grad, slot), slot)) return false;
  }
  if (!uses_teacher(a)) return true;
  return a.teacher.col_stride == 1 && a.teacher.dtype == a.student.dtype &&
         line_up(student, alignment_of(a.teacher.data, a.teacher, slot), slot);
}

void check_rows(const char* name, const Rows& r) {
  check(r.rows >= 0 && r.inner_rows >= 1, "distill_loss: ", name, " has ", r.rows, " rows in groups of ", r.inner_rows);
  check(r.cols >= 1 && r.cols <= int64_t(1) << 30, "distill_loss: ", name, " has V=", r.cols, ", expected 1 to 2^30");
  check(r.rows == 0 || r.data != nullptr, "distill_loss: ", name, " is missing");
  check(reinterpret_cast<uintptr_t>(r.data) % uintptr_t(dtype_size(r.dtype)) == 0, "distill_loss: ", name,
        " does not begin at a multiple of its element's size");
}

bool within(double value, double low, double high) { return value >= low && value <= high; }

}  // namespace

void check_cuda_args(const CudaArgs& a) {
  check_rows("student", a.student);
  check_rows("teacher", a.teacher);
  check(a.student.rows == a.teacher.rows, "distill_loss: student has T=", a.student.rows,
        " but teacher has T=", a.teacher.rows);
  check(within(a.temperature, 1e-30, 1e30), "distill_loss: temperature=", a.temperature,
        ", expected a positive finite number, 1e-30 to 1e30");
  check(within(a.alpha, 0, 1), "distill_loss: alpha=", a.alpha, ", expected 0 to 1");
  check(within(a.beta, 0, 1), "distill_loss: beta=", a.beta, ", expected 0 to 1");
  check(within(a.label_smoothing, 0, 1), "distill_loss: label_smoothing=", a.label_smoothing, ", expected 0 to 1");
  check(a.alpha == 0 || a.labels != nullptr || a.student.rows == 0, "distill_loss: alpha=", a.alpha, " needs labels");
  check((a.loss == nullptr) == (a.hard == nullptr) && (a.loss == nullptr) == (a.soft == nullptr),
        "distill_loss: loss, hard and soft are wanted together or not at all");
  check(a.workspace != nullptr && reinterpret_cast<uintptr_t>(a.workspace) % 32 == 0,
        "distill_loss: the workspace is missing, or not aligned to 32 bytes");
}

namespace {

// Slots that a block may stage where `blocks` of them share a multiprocessor.
int64_t room_for_slots(const cuda::DeviceInfo& info, int blocks, int64_t slot_bytes) {
  const int64_t room = cuda::shared_of_each(info, blocks) - scratch_bytes(kTuning.most_threads);
  return std::max<int64_t>(room / slot_bytes, 1);
}

}  // namespace

Plan pick(const CudaArgs& a, const cuda::DeviceInfo& info) {
  Plan plan;
  const int64_t rows = std::max<int64_t>(a.student.rows, 1);
  int64_t slots = 0, slot_bytes = 0, blocks = 0, device_blocks = 0;
  const auto lay_out = [&](bool vectors) {
    plan.vectors = vectors;
    const int64_t classes = vectors ? 16 / dtype_size(a.student.dtype) : 1;
    slots = ceil_div(a.student.cols + classes - 1, classes);  // a row may begin inside one
    slot_bytes = (vectors ? 16 : 4) * (uses_teacher(a) ? 2 : 1);
    // A row that the blocks of the whole device cannot hold side by side gets the device with one block each.
    for (const int resident : {kTuning.resident_blocks, 1}) {
      device_blocks = int64_t(info.multiprocessors) * resident;
      blocks = ceil_div(slots, room_for_slots(info, resident, slot_bytes));
      if (blocks <= device_blocks) return true;
    }
    return false;
  };
  plan.staged = lay_out(takes_vectors(a)) || lay_out(false);
  if (!plan.staged) {
    blocks = 1;
    device_blocks = int64_t(info.multiprocessors) * kTuning.resident_blocks;
  }
  // Few rows: more blocks to each, so that no multiprocessor is idle.
  blocks = std::max(blocks, std::min(ceil_div(slots, kTuning.least_slots), device_blocks / rows));
  plan.blocks_per_row = int(blocks);
  plan.slots_per_block = int(ceil_div(slots, blocks));
  plan.threads = power_of_two_from(ceil_div(plan.slots_per_block, kTuning.slots_a_thread), kTuning.least_threads,
                                   kTuning.most_threads);
  const int64_t staged_bytes = plan.staged ? plan.slots_per_block * slot_bytes : 0;
  plan.shared_bytes = int(scratch_bytes(plan.threads) + staged_bytes);
  const int64_t fit = cuda::blocks_by_shared(info, plan.shared_bytes);
  int64_t resident = std::max<int64_t>(1, std::min<int64_t>(kTuning.resident_threads / plan.threads, fit));
  if (blocks > 1) resident = std::min<int64_t>(resident, kTuning.most_resident);  // else the rest would only queue
  const int64_t groups = std::max<int64_t>(1, info.multiprocessors * resident / blocks);
  plan.groups = int(std::min(a.student.rows, groups));
  return plan;
}

int64_t most_workspace_bytes(int64_t rows, int device) {
  const int multiprocessors = cuda::device_info(device).multiprocessors;
  // All groups of single blocks that pick() may make, and the sums of all blocks that it may put into larger ones.
  Plan plan;
  plan.groups =
      int(std::min<int64_t>(rows, int64_t(multiprocessors) * (kTuning.resident_threads / kTuning.least_threads)));
  return exchange_at(plan) + int64_t(multiprocessors) * kTuning.most_resident * 2 * kExchange * 4;
}

void run_cuda(const CudaArgs& args, const cuda::Place& place) {
  run_cuda(args, place, pick(args, cuda::device_info(place.device)));
}

}  // namespace pycompress::distill_loss
