#include "cuda_emulator/warp.h"

#include "machine/machine.h"

namespace emulator {

// ---- coming together ------------------------------------------------------------------------------------------------

namespace {

[[noreturn]] __attribute__((noinline)) void fault_of_lanes(const Thread& thread, const std::string& what) {
  machine().fault(std::string("at ") + thread.operation->name + ": " + what);
}

// Every lane of the mask exists, is not gone, and does not wait for this one elsewhere.
void check_partners(const Thread& thread) {
  const Warp& warp = *thread.warp;
  if ((thread.mask >> thread.lane & 1) == 0) fault_of_lanes(thread, "this lane is not in the mask that it gave");
  const unsigned gone = thread.mask & (warp.exited | ~warp.lanes);
  if (gone != 0) {
    const int lane = __builtin_ctz(gone);
    fault_of_lanes(thread, "waits for lane " + std::to_string(lane) +
                               (warp.lanes >> lane & 1 ? ", which has exited" : ", which the block does not have"));
  }
  for (unsigned lanes = thread.mask & warp.waits; lanes != 0; lanes &= lanes - 1) {
    const Thread& other = warp.threads[__builtin_ctz(lanes)];
    const bool same = other.operation == thread.operation && other.mask == thread.mask;
    if (!same && (other.mask >> thread.lane & 1) != 0) {
      fault_of_lanes(thread, "but " + name(other) + " waits for it at " + other.operation->name +
                                 (other.operation == thread.operation ? " with another mask" : ""));
    }
  }
}

// All lanes of the mask wait at the same operation. (Some may still wait at another one, and come to this later.)
bool is_complete(const Thread& thread) {
  const Warp& warp = *thread.warp;
  if ((warp.waits & thread.mask) != thread.mask) return false;
  for (unsigned rest = thread.mask; rest != 0; rest &= rest - 1) {
    const Thread& other = warp.threads[__builtin_ctz(rest)];
    if (other.operation != thread.operation || other.mask != thread.mask) return false;
  }
  return true;
}

__attribute__((noinline)) void execute(Thread& thread) {
  Machine& m = machine();
  Warp& warp = *thread.warp;
  Lanes lanes{{}, thread.mask};
  for (unsigned rest = lanes.mask; rest != 0; rest &= rest - 1) {
    lanes.operands[__builtin_ctz(rest)] = warp.threads[__builtin_ctz(rest)].operands;
  }
  thread.operation->execute(lanes);
  m.progress();
  warp.waits &= ~lanes.mask;
  for (unsigned rest = lanes.mask; rest != 0; rest &= rest - 1) {
    m.make_ready(warp.threads[__builtin_ctz(rest)]);
  }
}

}  // namespace

void together(const Operation& operation, unsigned mask, void* operands) {
  Machine& m = machine();
  Thread& thread = m.current();
  thread.operation = &operation;
  thread.mask = mask;
  thread.operands = operands;
  ++thread.epoch;
  check_partners(thread);
  thread.warp->waits |= 1u << thread.lane;
  thread.state = State::kAtWarpOperation;
  if (is_complete(thread)) execute(thread);
  m.let_others_run();
}

unsigned lane_number() { return machine().current().lane; }

// ---- shuffles, votes and sums ---------------------------------------------------------------------------------------

namespace {

template <class Visit>
void for_lanes(const Lanes& lanes, Visit visit) {
  for (unsigned rest = lanes.mask; rest != 0; rest &= rest - 1) {
    visit(__builtin_ctz(rest));
  }
}

void shuffle_lanes(const Lanes& lanes) {
  uint64_t values[32];
  for_lanes(lanes, [&](int lane) { values[lane] = lanes.of<Shuffle>(lane).value; });
  for_lanes(lanes, [&](int lane) {
    Shuffle& shuffle = lanes.of<Shuffle>(lane);
    if ((lanes.mask >> shuffle.from & 1) == 0) {
      machine().fault("lane " + std::to_string(lane) + " takes the value of lane " + std::to_string(shuffle.from) +
                      ", which takes no part in the shuffle");
    }
    shuffle.value = values[shuffle.from];
  });
}

unsigned ballot_of(const Lanes& lanes) {
  unsigned ballot = 0;
  for_lanes(lanes, [&](int lane) { ballot |= lanes.of<Vote>(lane).predicate ? 1u << lane : 0; });
  return ballot;
}

void give_result(const Lanes& lanes, unsigned result) {
  for_lanes(lanes, [&](int lane) { lanes.of<Vote>(lane).result = result; });
}

template <class Combine>
void reduce(const Lanes& lanes, Combine combine) {
  int64_t result = lanes.of<Reduce>(__builtin_ctz(lanes.mask)).value;
  for_lanes(lanes, [&](int lane) {
    if (lane != __builtin_ctz(lanes.mask)) result = combine(result, lanes.of<Reduce>(lane).value);
  });
  for_lanes(lanes, [&](int lane) { lanes.of<Reduce>(lane).value = result; });
}

}  // namespace

const Operation kShuffle{"__shfl_sync", shuffle_lanes};
const Operation kShuffleXor{"__shfl_xor_sync", shuffle_lanes};
const Operation kShuffleUp{"__shfl_up_sync", shuffle_lanes};
const Operation kShuffleDown{"__shfl_down_sync", shuffle_lanes};
const Operation kBallot{"__ballot_sync", [](const Lanes& lanes) { give_result(lanes, ballot_of(lanes)); }};
const Operation kAny{"__any_sync", [](const Lanes& lanes) { give_result(lanes, ballot_of(lanes) != 0); }};
const Operation kAll{"__all_sync", [](const Lanes& lanes) { give_result(lanes, ballot_of(lanes) == lanes.mask); }};
const Operation kSyncWarp{"__syncwarp", [](const Lanes&) {}};
const Operation kReduceAdd{"__reduce_add_sync",
                           [](const Lanes& lanes) { reduce(lanes, [](int64_t a, int64_t b) { return a + b; }); }};
const Operation kReduceMin{
    "__reduce_min_sync", [](const Lanes& lanes) { reduce(lanes, [](int64_t a, int64_t b) { return a < b ? a : b; }); }};
const Operation kReduceMax{
    "__reduce_max_sync", [](const Lanes& lanes) { reduce(lanes, [](int64_t a, int64_t b) { return a < b ? b : a; }); }};

// ---- the block ------------------------------------------------------------------------------------------------------

int barrier(Barrier kind, bool predicate) {
  Machine& m = machine();
  Thread& thread = m.current();
  Block& block = *thread.block;
  if (block.exited != 0) {
    m.fault("waits at __syncthreads for " + std::to_string(block.exited) + " threads that have exited");
  }
  thread.barrier = kind;
  ++thread.epoch;
  ++block.at_barrier;
  block.true_predicates += predicate ? 1 : 0;
  thread.state = State::kAtBarrier;
  if (block.at_barrier == block.thread_count) {
    for (Thread& other : block.threads) {
      if (other.barrier != kind) m.fault("and " + name(other) + " are at different kinds of __syncthreads");
    }
    const auto all = static_cast<int>(block.thread_count);
    block.barrier_result = kind == Barrier::kOr    ? block.true_predicates != 0
                           : kind == Barrier::kAnd ? block.true_predicates == all
                                                   : block.true_predicates;
    block.at_barrier = 0;
    block.true_predicates = 0;
    m.progress();
    for (Warp& warp : block.warps) {
      count_notes(warp, m.counters());
    }
    for (Thread& other : block.threads) {
      m.make_ready(other);
    }
  }
  m.let_others_run();
  return block.barrier_result;
}

void pause() { machine().pause(); }

}  // namespace emulator
