// Large buffers that outlive one call: memory for gradients, kept between the steps of a training loop.
//
// The system hands out large memory as pages that it clears one by one when they are first written, and takes them back
// when they are freed: at 60 MB that costs as much as the loss and its gradient together. A block that is returned here
// is kept for the next request instead, and the system is told that it may take the pages back when memory runs short
// (MADV_FREE). At most kKept blocks are kept.
#pragma once

#include <cstddef>

namespace pycompress::pool {

// From this size on. Up to 32 MB the C library may keep freed memory itself, but not when it lies at the heap's end.
constexpr size_t kSmallest = size_t(8) << 20;
constexpr size_t kKept = 2;

// At least `bytes` bytes at kAlignment or better, contents undefined. Throws std::bad_alloc. Any thread may give back.
void* take(size_t bytes);
void give_back(void* block) noexcept;

// Bytes of the blocks that nobody holds.
size_t kept_bytes();

}  // namespace pycompress::pool
