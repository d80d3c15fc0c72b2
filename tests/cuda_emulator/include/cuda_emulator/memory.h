// Accesses to memory, checked and counted before they are made, and copies that arrive later.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// Whether accesses have to be looked at: something is counted, checked, or may yield. Alignment is checked in any case.
extern bool watching;

// A fault where the address is misaligned, outside the buffers that the test registered (if it did), or written by
// another block that this one has not synchronised with; else counted. May let other threads run first.
void check_load(const void* from, size_t bytes);
void check_store(const void* to, size_t bytes);
void check_shared_load(const void* from, size_t bytes);
void check_shared_store(const void* to, size_t bytes);

inline bool misaligned(const void* address, size_t bytes) {
  return (reinterpret_cast<uintptr_t>(address) & (bytes - 1)) != 0;
}

char* shared_memory();  // the block's
uint32_t shared_offset(const void* shared);

void start_copy(void* shared, const void* global, int bytes, int valid);
void commit_copies();
void wait_for_copies(int pending);

uint32_t load_acquire(const uint32_t* from);
uint32_t add_release(uint32_t* to, uint32_t value);

}  // namespace emulator
