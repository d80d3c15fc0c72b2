// Faults of synchronisation: between threads, with copies, between lanes.
#include "faults.h"

namespace faults {

namespace {

constexpr int kThreads = 128;

struct Params {
  cuda::Global<const float> x;
  cuda::Global<float> y;
  int steps;
};

__device__ float* shared_floats() { return reinterpret_cast<float*>(cuda::dynamic_shared()); }

// ---- barriers -------------------------------------------------------------------------------------------------------

// y[i] = x[the thread opposite], through shared memory
template <bool kFault>
__global__ void read_after_write(Params p) {
  float* s = shared_floats();
  const int t = static_cast<int>(threadIdx.x);
  s[t] = p.x.load(t);
  if (!kFault) __syncthreads();
  p.y.store(t, s[kThreads - 1 - t]);
}

// y[i] = sum of what its right neighbour read in each step; every step overwrites the one before
template <bool kFault>
__global__ void write_after_read(Params p) {
  float* s = shared_floats();
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int step = 0; step < p.steps; ++step) {
    s[t] = p.x.load(int64_t{step} * kThreads + t);
    __syncthreads();
    sum += s[(t + 1) % kThreads];
    if (!kFault) __syncthreads();
  }
  p.y.store(t, sum);
}

// Half of the threads leave before the barrier that the others wait at.
template <bool kFault>
__global__ void exit_before_barrier(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (kFault && t >= kThreads / 2) return;
  __syncthreads();
  if (t < kThreads / 2) p.y.store(t, 1.0f);
}

// The two halves come to different numbers of barriers.
template <bool kFault>
__global__ void divergent_barrier(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < kThreads / 2) {
    __syncthreads();
  }
  if (t < kThreads / 2 ? kFault : !kFault) {
    __syncthreads();
  }
  p.y.store(t, 1.0f);
}

template <bool kFault>
__global__ void mixed_barriers(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (kFault && t == 5) {
    __syncthreads();
    p.y.store(t, 1.0f);
  } else {
    p.y.store(t, __syncthreads_or(t == 7) != 0 ? 1.0f : 0.0f);
  }
}

bool all_are(const emulator::Buffer<float>& y, size_t count, float expected) {
  for (size_t i = 0; i < count; ++i) {
    if (y[i] != expected) return false;
  }
  return true;
}

constexpr int kSteps = 5;

template <void (*Good)(Params), void (*Bad)(Params)>
bool run_opposite(bool planted) {
  emulator::Buffer<float> x(values(kThreads), "x"), y(kThreads, "y");
  launch(planted, Good, Bad, Params{x.data(), y.data(), 1}, {dim3(1), dim3(kThreads), kThreads * 4});
  for (size_t t = 0; t < kThreads; ++t) {
    if (y[t] != value_at(kThreads - 1 - t)) return false;
  }
  return true;
}

template <void (*Good)(Params), void (*Bad)(Params)>
bool run_ones(bool planted) {
  emulator::Buffer<float> x(values(kThreads), "x"), y(kThreads, "y");
  launch(planted, Good, Bad, Params{x.data(), y.data(), 1}, {dim3(1), dim3(kThreads), kThreads * 4});
  return all_are(y, kThreads / 2, 1.0f);
}

// y[t] = sum over steps of x[step][t + 1]
template <void (*Good)(Params), void (*Bad)(Params), int kBuffers>
bool run_steps(bool planted) {
  emulator::Buffer<float> x(values(kSteps * kThreads), "x"), y(kThreads, "y");
  launch(planted, Good, Bad, Params{x.data(), y.data(), kSteps}, {dim3(1), dim3(kThreads), kBuffers * kThreads * 4});
  for (size_t t = 0; t < kThreads; ++t) {
    float sum = 0;
    for (size_t step = 0; step < kSteps; ++step) {
      sum += value_at(step * kThreads + (t + 1) % kThreads);
    }
    if (y[t] != sum) return false;
  }
  return true;
}

// ---- copies: the steps come through a ring of buffers, filled ahead by cp.async -------------------------------------

enum class Slip { kNone, kNoWait, kPendingOneMore, kNoCommit, kNoBarrierAfterWait, kRefillBeforeBarrier };

constexpr int kStages = 3;

template <Slip kSlip>
__global__ void pipeline(Params p) {
  float* s = shared_floats();
  const int t = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int step) {
    if (step < p.steps) p.x.template cp_async<4>(s + step % kStages * kThreads + t, int64_t{step} * kThreads + t);
    if (kSlip != Slip::kNoCommit || step != 2) cuda::cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) {
    fetch(step);
  }
  float sum = 0;
  for (int step = 0; step < p.steps; ++step) {
    if (kSlip != Slip::kNoWait) cuda::cp_async_wait<kStages - 2 + (kSlip == Slip::kPendingOneMore ? 1 : 0)>();
    if (kSlip == Slip::kRefillBeforeBarrier) fetch(step + kStages - 1);  // others may still read that buffer
    if (kSlip != Slip::kNoBarrierAfterWait) __syncthreads();
    if (kSlip != Slip::kRefillBeforeBarrier) fetch(step + kStages - 1);
    sum += s[step % kStages * kThreads + (t + 1) % kThreads];
  }
  p.y.store(t, sum);
}

// The last step's wait is there, but not for the copies of a prefetch that nobody needs.
template <bool kFault>
__global__ void copy_left_over(Params p) {
  float* s = shared_floats();
  const int t = static_cast<int>(threadIdx.x);
  p.x.cp_async<4>(s + t, t);
  cuda::cp_async_commit();
  if (kFault) {
    p.x.cp_async<4>(s + kThreads + t, kThreads + t);
    cuda::cp_async_commit();
    cuda::cp_async_wait<1>();
  } else {
    cuda::cp_async_wait<0>();
  }
  __syncthreads();
  p.y.store(t, s[kThreads - 1 - t]);
}

bool run_left_over(bool planted) {
  emulator::Buffer<float> x(values(2 * kThreads), "x"), y(kThreads, "y");
  launch(planted, copy_left_over<false>, copy_left_over<true>, Params{x.data(), y.data(), 1},
         {dim3(1), dim3(kThreads), 2 * kThreads * 4});
  for (size_t t = 0; t < kThreads; ++t) {
    if (y[t] != value_at(kThreads - 1 - t)) return false;
  }
  return true;
}

template <Slip kSlip>
constexpr auto kPipeline = run_steps<pipeline<Slip::kNone>, pipeline<kSlip>, kStages>;

// ---- lanes ----------------------------------------------------------------------------------------------------------

// Neighbouring lanes exchange through shared memory.
template <bool kFault>
__global__ void lanes_through_shared(Params p) {
  float* s = shared_floats();
  const int t = static_cast<int>(threadIdx.x);
  s[t] = p.x.load(t);
  if (!kFault) __syncwarp();
  p.y.store(t, s[t ^ 1]);
}

template <bool kFault>
__global__ void lane_missing(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (kFault && t % 32 == 31) return;
  p.y.store(t, __shfl_xor_sync(cuda::kAllLanes, p.x.load(t), 1));
}

template <bool kFault>
__global__ void lanes_at_different_operations(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  const float x = p.x.load(t);
  if (kFault && t % 32 == 3) {
    p.y.store(t, static_cast<float>(__ballot_sync(cuda::kAllLanes, x > 0)));
  } else {
    p.y.store(t, __shfl_xor_sync(cuda::kAllLanes, x, 1));
  }
}

// The lower half of a warp asks a lane of the upper half, which takes no part.
template <bool kFault>
__global__ void shuffle_from_outside(Params p) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  float x = p.x.load(t);
  if (lane < 16) {
    x = __shfl_sync(0xffffu, x, kFault && lane == 15 ? 16 : lane ^ 1);
  } else {
    x = __shfl_xor_sync(0xffff0000u, x, 1);
  }
  p.y.store(t, x);
}

template <void (*Good)(Params), void (*Bad)(Params)>
bool run_neighbours(bool planted) {
  emulator::Buffer<float> x(values(kThreads), "x"), y(kThreads, "y");
  launch(planted, Good, Bad, Params{x.data(), y.data(), 1}, {dim3(1), dim3(kThreads), kThreads * 4});
  for (size_t t = 0; t < kThreads; ++t) {
    if (y[t] != value_at(t ^ 1)) return false;
  }
  return true;
}

}  // namespace

const std::vector<Case>& synchronisation() {
  static const std::vector<Case> cases = {
      {"no barrier between write and read", run_opposite<read_after_write<false>, read_after_write<true>>},
      {"no barrier between read and overwrite", run_steps<write_after_read<false>, write_after_read<true>, 1>},
      {"threads exit before a barrier", run_ones<exit_before_barrier<false>, exit_before_barrier<true>>},
      {"branches with different numbers of barriers", run_ones<divergent_barrier<false>, divergent_barrier<true>>},
      {"branches with different kinds of barrier", run_ones<mixed_barriers<false>, mixed_barriers<true>>},
      {"no cp_async_wait", kPipeline<Slip::kNoWait>},
      {"cp_async_wait leaves one group too many", kPipeline<Slip::kPendingOneMore>},
      {"a group not committed", kPipeline<Slip::kNoCommit>},
      {"no barrier after cp_async_wait", kPipeline<Slip::kNoBarrierAfterWait>},
      {"a buffer refilled one barrier early", kPipeline<Slip::kRefillBeforeBarrier>},
      {"copies nobody waits for", run_left_over},
      {"no __syncwarp between lanes", run_neighbours<lanes_through_shared<false>, lanes_through_shared<true>>},
      {"a lane missing at a shuffle", run_neighbours<lane_missing<false>, lane_missing<true>>},
      {"lanes at different operations",
       run_neighbours<lanes_at_different_operations<false>, lanes_at_different_operations<true>>},
      {"a shuffle from a lane outside the mask",
       run_neighbours<shuffle_from_outside<false>, shuffle_from_outside<true>>},
  };
  return cases;
}

}  // namespace faults
