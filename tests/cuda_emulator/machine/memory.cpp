// Global and shared memory: what is known of it, and the checks of every access.
#include "cuda_emulator/memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#include "machine/machine.h"

namespace emulator {

bool watching = false;

// ---- the buffers that the test registered ---------------------------------------------------------------------------

namespace {

struct Regions {
  std::mutex mutex;  // buffers may be made while another thread launches
  std::vector<Region> by_start;
};

Regions& regions() {
  static Regions regions;
  return regions;
}

std::vector<Region>::iterator first_behind(std::vector<Region>& list, const char* address) {
  return std::upper_bound(list.begin(), list.end(), address,
                          [](const char* at, const Region& region) { return at < region.start; });
}

}  // namespace

void register_buffer(const void* start, size_t bytes, const std::string& name, Access access) {
  Regions& all = regions();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto* at = static_cast<const char*>(start);
  all.by_start.insert(first_behind(all.by_start, at), Region{at, bytes, name, access});
}

void unregister_buffer(const void* start) {
  Regions& all = regions();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto behind = first_behind(all.by_start, static_cast<const char*>(start));
  if (behind != all.by_start.begin() && (behind - 1)->start == start) all.by_start.erase(behind - 1);
}

bool any_buffers() { return !regions().by_start.empty(); }

const Region* region_of(const void* address) {
  auto& list = regions().by_start;
  const auto* at = static_cast<const char*>(address);
  const auto behind = first_behind(list, at);
  if (behind == list.begin()) return nullptr;
  const Region& region = *(behind - 1);
  // one past the end is told as a place of this buffer, too
  return at <= region.start + region.bytes ? &region : nullptr;
}

void check_bounds(const void* address, size_t bytes, bool write, const char* what) {
  if (bytes == 0) return;
  if (reinterpret_cast<uintptr_t>(address) < 4096) machine().fault(std::string(what) + " at a null pointer");
  if (regions().by_start.empty()) return;
  const Region* region = region_of(address);
  const auto* at = static_cast<const char*>(address);
  if (region == nullptr || at + bytes > region->start + region->bytes) {
    machine().fault(std::string(what) + " of " + std::to_string(bytes) + " bytes out of bounds, at " +
                    describe(address));
  }
  if (write && region->access == Access::kReadOnly) {
    machine().fault(std::string(what) + " to read-only memory, at " + describe(address));
  }
}

// ---- accesses -------------------------------------------------------------------------------------------------------

namespace {

void check_aligned(const void* address, size_t bytes, const char* what) {
  if (misaligned(address, bytes)) {
    machine().fault(std::string(what) + " of " + std::to_string(bytes) + " bytes misaligned, at " + describe(address));
  }
}

[[noreturn]] void fault_of_blocks(const char* what, const void* address, uint32_t writer) {
  machine().fault(std::string(what) + " where block number " + std::to_string(writer) +
                  " has written, without having synchronised with it; at " + describe(address));
}

}  // namespace

__attribute__((noinline)) void check_load(const void* from, size_t bytes) {
  Machine& m = machine();
  check_aligned(from, bytes, "load");
  if (!watching) return;
  m.may_yield();
  check_bounds(from, bytes, false, "load");
  Counters& counters = m.counters();
  ++counters.loads;
  counters.loaded_bytes += bytes;
  uint32_t writer;
  if (!m.footprint().read(reinterpret_cast<uint64_t>(from), bytes, m.current().block->number, &writer)) {
    fault_of_blocks("load", from, writer);
  }
  if (m.options().count) note_access(__builtin_return_address(0), from, bytes, false);
}

__attribute__((noinline)) void check_store(const void* to, size_t bytes) {
  Machine& m = machine();
  check_aligned(to, bytes, "store");
  if (!watching) return;
  m.may_yield();
  m.progress();
  check_bounds(to, bytes, true, "store");
  Counters& counters = m.counters();
  ++counters.stores;
  counters.stored_bytes += bytes;
  uint32_t writer;
  if (!m.footprint().write(reinterpret_cast<uint64_t>(to), bytes, m.current().block->number, &writer)) {
    fault_of_blocks("store", to, writer);
  }
  if (m.options().count) note_access(__builtin_return_address(0), to, bytes, false);
}

uint32_t load_acquire(const uint32_t* from) {
  Machine& m = machine();
  check_aligned(from, 4, "load_acquire");
  check_bounds(from, 4, false, "load_acquire");
  m.pause();  // others have their chance to write it
  m.footprint().acquire(reinterpret_cast<uint64_t>(from), m.current().block->number);
  return *from;
}

uint32_t add_release(uint32_t* to, uint32_t value) {
  Machine& m = machine();
  check_aligned(to, 4, "add_release");
  check_bounds(to, 4, true, "add_release");
  m.yield();
  m.progress();
  m.footprint().acquire_release(reinterpret_cast<uint64_t>(to), m.current().block->number);
  const uint32_t before = *to;
  *to += value;
  return before;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

namespace {

// AddressSanitizer sees an access behind the last byte by itself.
constexpr size_t kGuard = PYCOMPRESS_ASAN ? 0 : 512;
constexpr unsigned char kGuardByte = 0xfb;

}  // namespace

char* allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes + kGuard) != 0) throw std::bad_alloc();
  auto* shared = static_cast<char*>(memory);
  std::memset(shared + bytes, kGuardByte, kGuard);
  return shared;
}

void free_shared(char* shared) { std::free(shared); }

// Every 16 and every 32 bits of it are a NaN, every byte pair different from the next.
void poison_shared(char* shared, size_t bytes, Random& random) {
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t word = random.next64() | 0x7f817f817f817f81u;
    std::memcpy(shared + i, &word, std::min<size_t>(8, bytes - i));
  }
}

void check_shared_guard(const Block& block) {
  const size_t bytes = machine().launch().shared_bytes;
  for (size_t i = 0; i < kGuard; ++i) {
    if (static_cast<unsigned char>(block.shared[bytes + i]) != kGuardByte) {
      machine().fault("kernel " + kernel_name(machine().launch().kernel->function) + ": block " + name(block.index) +
                      " has written behind its " + std::to_string(bytes) + " bytes of shared memory, at byte " +
                      std::to_string(bytes + i));
    }
  }
}

char* shared_memory() { return machine().current().block->shared; }

bool is_shared(const void* address, size_t bytes) {
  const char* shared = machine().current().block->shared;
  const auto* at = static_cast<const char*>(address);
  return at >= shared && at + bytes <= shared + machine().launch().shared_bytes;
}

uint32_t shared_offset(const void* shared) {
  if (!is_shared(shared, 0)) machine().fault("shared_address of what is not shared memory");
  return static_cast<uint32_t>(static_cast<const char*>(shared) - shared_memory());
}

namespace {

void check_shared(const void* address, size_t bytes, const char* what) {
  check_aligned(address, bytes, what);
  if (!is_shared(address, bytes)) {
    machine().fault(std::string(what) + " of " + std::to_string(bytes) +
                    " bytes outside of shared memory, at its byte " +
                    std::to_string(static_cast<const char*>(address) - shared_memory()) + " of " +
                    std::to_string(machine().launch().shared_bytes));
  }
  if (watching) machine().may_yield();
}

}  // namespace

__attribute__((noinline)) void check_shared_load(const void* from, size_t bytes) {
  check_shared(from, bytes, "shared load");
  if (machine().options().count) note_access(__builtin_return_address(0), from, bytes, true);
}

__attribute__((noinline)) void check_shared_store(const void* to, size_t bytes) {
  check_shared(to, bytes, "shared store");
  if (machine().options().count) note_access(__builtin_return_address(0), to, bytes, true);
}

}  // namespace emulator
