// cp.async: copies that arrive when they like, but at the latest when the thread that issued them waits.
#include <cstring>

#include "cuda_emulator/memory.h"
#include "machine/machine.h"

namespace emulator {

namespace {

void arrive(Copy& copy) {
  if (copy.arrived) return;
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
  std::memset(copy.to + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
  copy.arrived = true;
}

void check_copy(const Copy& copy) {
  Machine& m = machine();
  const auto width = static_cast<size_t>(copy.bytes);
  const std::string what = "cp_async of " + std::to_string(copy.bytes) + " bytes";
  if (copy.valid < 0 || copy.valid > copy.bytes) m.fault(what + ": " + std::to_string(copy.valid) + " of them valid");
  if (misaligned(copy.from, width)) m.fault(what + " misaligned, from " + describe(copy.from));
  if (misaligned(copy.to, width) || !is_shared(copy.to, width)) {
    m.fault(what + " to byte " + std::to_string(copy.to - shared_memory()) + " of " +
            std::to_string(m.launch().shared_bytes) + " of shared memory: outside or misaligned");
  }
  check_bounds(copy.from, static_cast<size_t>(copy.valid), false, "cp_async");
}

void count_copy(const Copy& copy, const void* site) {
  Machine& m = machine();
  Counters& counters = m.counters();
  ++counters.copies;
  counters.copied_bytes += static_cast<uint64_t>(copy.valid);
  uint32_t writer;
  if (!m.footprint().read(reinterpret_cast<uint64_t>(copy.from), static_cast<size_t>(copy.valid),
                          m.current().block->number, &writer)) {
    m.fault("cp_async from where block number " + std::to_string(writer) +
            " has written, without having synchronised with it; at " + describe(copy.from));
  }
  if (m.options().count) {
    if (copy.valid > 0) note_access(site, copy.from, static_cast<size_t>(copy.valid), false);
    note_access(site, copy.to, static_cast<size_t>(copy.bytes), true);
  }
}

}  // namespace

__attribute__((noinline)) void start_copy(void* shared, const void* global, int bytes, int valid) {
  Machine& m = machine();
  if (watching) m.may_yield();
  Thread& thread = m.current();
  Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid, thread.groups, false};
  check_copy(copy);
  if (watching) count_copy(copy, __builtin_return_address(0));
  const Arrival arrival = m.options().arrival;
  if (arrival == Arrival::kAtIssue || (arrival == Arrival::kDrawn && m.random().coin())) {
    arrive(copy);
  } else if (m.random().coin()) {
    poison_shared(copy.to, static_cast<size_t>(bytes), m.random());  // half of it may be there, or none
  }
  thread.copies.push_back(copy);
}

void commit_copies() { ++machine().current().groups; }

void wait_for_copies(int pending) {
  Thread& thread = machine().current();
  size_t done = 0;
  while (done < thread.copies.size() && thread.copies[done].group + static_cast<uint32_t>(pending) < thread.groups) {
    arrive(thread.copies[done++]);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void finish_copies(Thread& thread) {
  if (thread.copies.empty() || !machine().options().check_copies) return;
  const Copy& copy = thread.copies.front();
  machine().fault("ends with " + std::to_string(thread.copies.size()) +
                  " copies under way that it never waited for; the "
                  "first goes to byte " +
                  std::to_string(copy.to - shared_memory()) + " of shared memory" +
                  (copy.group == thread.groups ? ", and its group was not committed" : ""));
}

}  // namespace emulator
