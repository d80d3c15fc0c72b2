// One function, one instruction: all that the CUDA kernels cannot say in C++. Nothing else may hold inline assembly, so
// that the emulator of tests/cuda_emulator, which brings a ptx.h of its own, runs everything else as it stands.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pycompress::cuda {

// The block's dynamic shared memory, aligned to 128 bytes. Kernels use no other: its size is the launch's.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- global memory: T of 1, 2, 4, 8 or 16 bytes, aligned to its size. Used through Global (device.h) alone. ---------

namespace ptx {

// Cached as usual; sees what this kernel or an earlier one wrote.
template <class T>
__device__ inline T load(const T* from) {
  return *from;
}

// Read once by anybody: past the first-level cache. The memory must not be written while the kernel runs.
template <class T>
__device__ inline T load_once(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  T value;
  auto* word = reinterpret_cast<uint32_t*>(&value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(word[0]) : "l"(from));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(from));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(from));
  }
  return value;
}

template <class T>
__device__ inline void store(T* to, T value) {
  *to = value;
}

// Not read again soon: evicted first.
template <class T>
__device__ inline void store_once(T* to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  const auto* word = reinterpret_cast<const uint32_t*>(&value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.cs.b32 [%0], %1;" ::"l"(to), "r"(word[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(word[0]), "r"(word[1]) : "memory");
  } else {
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                 "r"(word[3])
                 : "memory");
  }
}

// Between blocks of one launch that run at the same time (cooperative): what a block wrote before add_release is seen
// by the block whose load_acquire reads the sum.
__device__ inline uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ inline uint32_t add_release(uint32_t* to, uint32_t value) {  // returns what was there before
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

// Starts a copy of Bytes (4, 8 or 16; both sides aligned to it) from global to shared memory: `valid` bytes of it, zeros
// behind them. It has arrived after cp_async_wait, for the thread that waited; for others after a barrier as well.
template <int Bytes>
__device__ inline void cp_async(void* shared, const void* global, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "what cp.async can copy");
  if constexpr (Bytes == 16) {  // .cg: past the first-level cache, which only this size may be
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(valid)
                 : "memory");
  }
}

}  // namespace ptx

// ---- copies: groups of cp_async ----------------------------------------------------------------------------------

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most Pending of this thread's groups are under way.
template <int Pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// A pause in a loop that waits for another block.
__device__ inline void pause() { __nanosleep(64); }

// ---- shared memory: plain loads and stores are fine; of these the emulator counts the bank conflicts -----------------

template <class T>
__device__ inline T shared_load(const void* from) {
  return *static_cast<const T*>(from);
}
template <class T>
__device__ inline void shared_store(void* to, T value) {
  *static_cast<T*>(to) = value;
}

// ---- shared memory to registers: 8 x 8 matrices of 16-bit elements, a row of 16 bytes each ----------------------------
// Lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 (l % 4) and the next of row l / 4 of each.

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// ---- d[16,8] += a[16,K] b[K,8]; fragments as the PTX manual draws them for .row.col ------------------------------------

// K = 32, signed bytes; d wraps around
__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with a 2:4 sparse a: K = 32 (16-bit types) or 64 (bytes), a holds the two kept elements of every four, `meta`
// their places, two bits each; selector 0, see "sparse matrix storage" in the PTX manual.
__device__ inline void mma_sp_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta));
}
__device__ inline void mma_sp_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta));
}
__device__ inline void mma_sp_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta));
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

// c + sum of four products of signed bytes
__device__ inline int32_t dp4a(uint32_t a, uint32_t b, int32_t c) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
}

// 2^x to 2 units in the last place; below 2^-126 it is 0, of -infinity 0, of NaN NaN.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pycompress::cuda
