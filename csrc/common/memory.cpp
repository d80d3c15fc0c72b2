#include "common/memory.h"

#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pycompress {
namespace {

// What one call may leave behind in a thread: a larger request is given back at the next smaller one.
constexpr size_t kKeepBytes = size_t(64) << 20;

}  // namespace

Scratch::~Scratch() { std::free(data_); }

char* Scratch::reserve(size_t bytes) {
  const bool oversized = size_ > kKeepBytes && bytes <= kKeepBytes;
  if (bytes > size_ || oversized) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(std::aligned_alloc(4096, rounded));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = rounded;
  }
  return data_;
}

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < (size_t(2) << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace pycompress
