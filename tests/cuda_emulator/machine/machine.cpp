#include "machine/machine.h"

#include <algorithm>
#include <numeric>

#include "cuda_emulator/memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

namespace {

// So many pauses of threads with nothing else in between mean that what they wait for will never happen.
constexpr int kIdlePauses = 200000;

uint3 index_of(uint32_t number, const dim3& extent) {
  return {number % extent.x, number / extent.x % extent.y, number / extent.x / extent.y};
}

}  // namespace

Machine& machine() {
  static Machine machine;
  return machine;
}

// ---- a launch -------------------------------------------------------------------------------------------------------

void Machine::run(const Launch& launch, const Options& options, Counters& counters) {
  launch_ = &launch;
  options_ = &options;
  counters_ = &counters;
  random_ = Random(options.seed);
  yield_below_ = static_cast<uint32_t>(options.yield * 4294967295.0);
  blockDim = launch.block;
  gridDim = launch.grid;
  const uint32_t count = launch.grid.x * launch.grid.y * launch.grid.z;
  footprint_.start(count, options.count, options.check_blocks);

  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = count; i > 1; --i) {
    std::swap(order[i - 1], order[random_.below(i)]);
  }
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  const size_t at_once = launch.cooperative ? count : 1;
  if (blocks_.size() < at_once) blocks_.resize(at_once);
  for (size_t first = 0; first < count; first += at_once) {
    for (size_t slot = 0; slot < at_once; ++slot) {
      start_block(slot, order[first + slot], slot * threads);
    }
    run_blocks(at_once);
  }
  counters.read_sectors += footprint_.read_sectors();
  counters.written_sectors += footprint_.written_sectors();
}

void Machine::start_block(size_t slot, uint32_t number, size_t first_stack) {
  Block& block = blocks_[slot];
  const dim3& extent = launch_->block;
  block.number = number;
  block.index = index_of(number, launch_->grid);
  block.thread_count = extent.x * extent.y * extent.z;
  block.at_barrier = block.exited = 0;
  block.true_predicates = 0;
  block.shared = allocate_shared(launch_->shared_bytes);
  poison_shared(block.shared, launch_->shared_bytes, random_);
  block.threads.resize(block.thread_count);
  block.warps.resize((block.thread_count + 31) / 32);

  for (unsigned w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    const unsigned lanes = std::min(32u, block.thread_count - 32 * w);
    warp = Warp{&block.threads[32 * w], lanes == 32 ? ~0u : (1u << lanes) - 1};
    warp.priority = random_.next32();
  }
  for (unsigned t = 0; t < block.thread_count; ++t) {
    Thread& thread = block.threads[t];
    thread.block = &block;
    thread.warp = &block.warps[t / 32];
    thread.index = index_of(t, extent);
    thread.number = t;
    thread.lane = t % 32;
    thread.copies.clear();
    thread.groups = thread.epoch = 0;
    thread.notes.clear();
    prepare_fiber(thread.fiber, stacks_.get(first_stack + t), StackPool::kBytes, &Machine::thread_main);
    make_ready(thread);
  }
}

void Machine::run_blocks(size_t count) {
  // Half of the time any thread may come next; else one warp runs as far as it can, then another.
  by_priority_ = random_.coin();
  idle_pauses_ = 0;
  if (Thread* first = next()) {
    switch_fiber(host_, resumed(*first));
  }
  current_ = nullptr;
  if (!fault_.empty()) {
    abandon();
    throw Fault(std::exchange(fault_, {}));
  }
  for (size_t slot = 0; slot < count; ++slot) {
    if (blocks_[slot].exited != blocks_[slot].thread_count) {
      const std::string where = whereabouts(blocks_, count);
      abandon();
      throw Fault("kernel " + kernel_name(launch_->kernel->function) + ": deadlock; " + where);
    }
  }
  for (size_t slot = 0; slot < count; ++slot) {
    finish_block(blocks_[slot]);
  }
}

void Machine::finish_block(Block& block) {
  for (Warp& warp : block.warps) {
    count_notes(warp, *counters_);
  }
  check_shared_guard(block);
  free_shared(std::exchange(block.shared, nullptr));
}

// After a fault: what is left of the fibers is never run again.
void Machine::abandon() {
  ready_.clear();
  stacks_.forget();
  for (Block& block : blocks_) {
    free_shared(std::exchange(block.shared, nullptr));
  }
}

void Machine::fault(const std::string& what) {
  if (current_ == nullptr) throw Fault(what);
  throw Fault("kernel " + kernel_name(launch_->kernel->function) + ", " + name(*current_) + ": " + what);
}

// ---- threads --------------------------------------------------------------------------------------------------------

void Machine::thread_main() {
  Machine& m = machine();
  enter_fiber(m.current_->fiber);
  try {
    m.launch_->kernel->call(m.launch_->kernel->arguments);
    m.check_exit();
  } catch (const std::exception& error) {
    m.fault_ = error.what();
  }
  if (!m.fault_.empty()) leave_fiber(m.current_->fiber, m.host_);
  m.exit_thread();
}

// That nobody waits for the current thread, whose kernel has returned.
void Machine::check_exit() {
  const Thread& thread = *current_;
  const Warp& warp = *thread.warp;
  const Block& block = *thread.block;
  finish_copies(*current_);
  for (unsigned lanes = warp.waits; lanes != 0; lanes &= lanes - 1) {
    const Thread& other = warp.threads[__builtin_ctz(lanes)];
    if (other.mask >> thread.lane & 1) {
      fault("exits, but " + name(other) + " waits for it at " + other.operation->name);
    }
  }
  if (block.at_barrier != 0) {
    fault("exits, but " + std::to_string(block.at_barrier) + " threads wait for it at __syncthreads");
  }
}

void Machine::exit_thread() {
  Thread& thread = *current_;
  thread.state = State::kExited;
  thread.warp->exited |= 1u << thread.lane;
  ++thread.block->exited;
  progress();
  Thread* following = next();
  if (following == nullptr) leave_fiber(thread.fiber, host_);
  leave_fiber(thread.fiber, resumed(*following));
}

// The one that runs from now on.
Fiber& Machine::resumed(Thread& thread) {
  current_ = &thread;
  thread.state = State::kRunning;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  return thread.fiber;
}

void Machine::make_ready(Thread& thread) {
  Warp& warp = *thread.warp;
  thread.state = State::kReady;
  if (warp.ready == 0) ready_.push_back(&warp);
  warp.ready |= 1u << thread.lane;
}

// Draws the thread that goes on, and takes it from those that are ready; nullptr where none is.
Thread* Machine::next() {
  if (ready_.empty()) return nullptr;
  size_t chosen = 0;
  if (by_priority_) {
    for (size_t i = 1; i < ready_.size(); ++i) {
      if (ready_[i]->priority < ready_[chosen]->priority) chosen = i;
    }
  } else {
    chosen = random_.below(ready_.size());
  }
  Warp& warp = *ready_[chosen];
  const unsigned start = random_.next32() & 31;  // the first ready lane from this one on, then around
  const unsigned behind = warp.ready & ~0u << start;
  const auto lane = static_cast<unsigned>(__builtin_ctz(behind != 0 ? behind : warp.ready));
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) {
    ready_[chosen] = ready_.back();
    ready_.pop_back();
  }
  return &warp.threads[lane];
}

void Machine::let_others_run() {
  Thread& thread = *current_;
  Thread* following = next();
  if (following == &thread) {
    thread.state = State::kRunning;
    return;
  }
  if (following == nullptr) leave_fiber(thread.fiber, host_);  // nobody can go on: a deadlock
  switch_fiber(thread.fiber, resumed(*following));
}

void Machine::yield() {
  if (by_priority_) current_->warp->priority = random_.next32();
  make_ready(*current_);
  let_others_run();
}

void Machine::pause() {
  if (++idle_pauses_ > kIdlePauses) {
    fault(
        "waits for something that does not happen (is it done by another block, in a launch that is not cooperative, "
        "or without release?); " +
        whereabouts(blocks_, launch_->cooperative ? blocks_.size() : 1));
  }
  // Whoever it waits for goes first.
  if (by_priority_) current_->warp->priority |= 0x80000000u;
  const bool by_priority = std::exchange(by_priority_, by_priority_ && random_.coin());
  make_ready(*current_);
  Thread* following = next();
  by_priority_ = by_priority;
  if (following == current_) {
    following->state = State::kRunning;
    return;
  }
  Thread& thread = *current_;
  switch_fiber(thread.fiber, resumed(*following));
}

}  // namespace emulator
