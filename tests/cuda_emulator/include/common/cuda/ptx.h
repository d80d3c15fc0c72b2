// Twin of csrc/common/cuda/ptx.h: the same functions, documented there, for the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_emulator/memory.h"
#include "cuda_emulator/tensor.h"

namespace pycompress::cuda {

inline char* dynamic_shared() { return emulator::shared_memory(); }

inline uint32_t shared_address(const void* shared) { return emulator::shared_offset(shared); }

namespace ptx {

template <class T>
__forceinline__ T load(const T* from) {
  static_assert((sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16, "1, 2, 4, 8 or 16 bytes");
  if (emulator::watching || emulator::misaligned(from, sizeof(T))) {
    emulator::check_load(from, sizeof(T));
  }
  return *from;
}

template <class T>
__forceinline__ T load_once(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  return load(from);
}

template <class T>
__forceinline__ void store(T* to, T value) {
  static_assert((sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16, "1, 2, 4, 8 or 16 bytes");
  if (emulator::watching || emulator::misaligned(to, sizeof(T))) {
    emulator::check_store(to, sizeof(T));
  }
  *to = value;
}

template <class T>
__forceinline__ void store_once(T* to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  store(to, value);
}

inline uint32_t load_acquire(const uint32_t* from) { return emulator::load_acquire(from); }
inline uint32_t add_release(uint32_t* to, uint32_t value) { return emulator::add_release(to, value); }

template <int Bytes>
__forceinline__ void cp_async(void* shared, const void* global, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "what cp.async can copy");
  emulator::start_copy(shared, global, Bytes, valid);
}

}  // namespace ptx

inline void cp_async_commit() { emulator::commit_copies(); }

template <int Pending>
inline void cp_async_wait() {
  emulator::wait_for_copies(Pending);
}

inline void pause() { emulator::pause(); }

template <class T>
__forceinline__ T shared_load(const void* from) {
  static_assert((sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16, "1, 2, 4, 8 or 16 bytes");
  if (emulator::watching || emulator::misaligned(from, sizeof(T))) {
    emulator::check_shared_load(from, sizeof(T));
  }
  return *static_cast<const T*>(from);
}
template <class T>
__forceinline__ void shared_store(void* to, T value) {
  static_assert((sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16, "1, 2, 4, 8 or 16 bytes");
  if (emulator::watching || emulator::misaligned(to, sizeof(T))) {
    emulator::check_shared_store(to, sizeof(T));
  }
  *static_cast<T*>(to) = value;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) { emulator::load_matrices(r, shared); }

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply(emulator::Multiply::kS8, d, a, b, 0);
}
inline void mma_sp_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  emulator::multiply(emulator::Multiply::kSparseBf16, d, a, b, meta);
}
inline void mma_sp_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  emulator::multiply(emulator::Multiply::kSparseF16, d, a, b, meta);
}
inline void mma_sp_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  emulator::multiply(emulator::Multiply::kSparseS8, d, a, b, meta);
}

inline int32_t dp4a(uint32_t a, uint32_t b, int32_t c) { return __dp4a(static_cast<int>(a), static_cast<int>(b), c); }

inline float exp2_fast(float x) { return emulator::exp2_fast(x); }

}  // namespace pycompress::cuda
