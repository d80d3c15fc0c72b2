#include "common/pool.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "common/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pycompress::pool {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> taken, kept;  // kept: oldest first
};

// Never destroyed: a tensor may give its memory back after the statics are gone.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

constexpr size_t kHugePage = size_t(2) << 20;

#if defined(__linux__)

// Aligned to a huge page, so that the whole block can consist of them.
void* allocate(size_t bytes, size_t wanted) {
  void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(mapped);
  char* const data = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (data > begin) munmap(begin, size_t(data - begin));
  if (data < begin + kHugePage) munmap(data + bytes, size_t(begin + kHugePage - data));
  advise_huge_pages(data, wanted / kHugePage * kHugePage);  // the rest in small pages: none is taken in vain
  return data;
}

void release(const Block& block) { munmap(block.data, block.bytes); }

void offer(const Block& block) {
#if defined(MADV_FREE)
  madvise(block.data, block.bytes, MADV_FREE);
#else
  (void)block;
#endif
}

#else

void* allocate(size_t bytes, size_t) {
  void* const data = std::aligned_alloc(kHugePage, bytes);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void release(const Block& block) { std::free(block.data); }
void offer(const Block&) {}

#endif

}  // namespace

void* take(size_t bytes) {
  const size_t rounded = std::max((bytes + kHugePage - 1) / kHugePage, size_t(1)) * kHugePage;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  // The smallest that is large enough and not half empty.
  auto best = p.kept.end();
  for (auto it = p.kept.begin(); it != p.kept.end(); ++it) {
    if (it->bytes >= rounded && it->bytes / 2 <= rounded && (best == p.kept.end() || it->bytes < best->bytes))
      best = it;
  }
  Block block{nullptr, rounded};
  if (best != p.kept.end()) {
    block = *best;
    p.kept.erase(best);
  } else {
    block.data = allocate(rounded, bytes);
  }
  p.taken.push_back(block);
  return block.data;
}

void give_back(void* data) noexcept {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto it = std::find_if(p.taken.begin(), p.taken.end(), [&](const Block& b) { return b.data == data; });
  if (it == p.taken.end()) return;
  const Block block = *it;
  p.taken.erase(it);
  if (p.kept.size() >= kKept) {
    release(p.kept.front());
    p.kept.erase(p.kept.begin());
  }
  offer(block);
  p.kept.push_back(block);
}

size_t kept_bytes() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  size_t bytes = 0;
  for (const Block& block : p.kept) bytes += block.bytes;
  return bytes;
}

}  // namespace pycompress::pool
