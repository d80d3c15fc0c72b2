// Aligned scratch memory, and huge pages for large packed weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycompress {

constexpr int64_t kAlignment = 64;  // one cache line, and one AVX-512 register

// Up to the next multiple of kAlignment.
static constexpr int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// A buffer that grows and is kept for the next call; one for each calling thread (see thread_scratch).
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  // At least `bytes` bytes at kAlignment; the contents of an earlier call are lost. Throws std::bad_alloc.
  char* reserve(size_t bytes);

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

Scratch& thread_scratch();

// Asks for huge pages over the whole pages inside [data, data + bytes), before they are first written.
// A hint: does nothing where the system has no such thing or the range is small.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace pycompress
