// Words for what happened: threads, where they are, addresses.
#include "machine/machine.h"

namespace emulator {

std::string name(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string name(const Thread& thread) {
  return "block " + name(thread.block->index) + ", thread " + name(thread.index);
}

namespace {

std::string place(const Thread& thread) {
  switch (thread.state) {
    case State::kAtBarrier: return "wait at __syncthreads";
    case State::kAtWarpOperation: return std::string("wait at ") + thread.operation->name;
    case State::kExited: return "have exited";
    default: return "run";
  }
}

}  // namespace

std::string whereabouts(const std::vector<Block>& blocks, size_t count) {
  constexpr int kMost = 24;  // of places told: the rest is alike
  std::string text;
  int told = 0;
  for (size_t slot = 0; slot < count; ++slot) {
    const Block& block = blocks[slot];
    for (unsigned first = 0, end; first < block.thread_count; first = end) {
      const std::string where = place(block.threads[first]);
      for (end = first + 1; end < block.thread_count && place(block.threads[end]) == where; ++end) {}
      if (told++ == kMost) return text + "; ...";
      text += (text.empty() ? "" : "; ") + ("block " + name(block.index)) + " threads " + std::to_string(first) + "-" +
              std::to_string(end - 1) + " " + where;
    }
  }
  return text;
}

std::string describe(const void* address) {
  const Region* region = region_of(address);
  if (region != nullptr) {
    return "byte " + std::to_string(static_cast<const char*>(address) - region->start) + " of " + region->name + " (" +
           std::to_string(region->bytes) + " bytes)";
  }
  char text[32];
  snprintf(text, sizeof(text), "%p", address);
  return text;
}

}  // namespace emulator
