// What the CUDA kernels are written in: global memory whose every access is an instruction that can be counted, bytes
// seen as other types, sums over a warp or a block. Plain C++ above ptx.h: the emulator runs it as it stands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/cuda/ptx.h"
#include "common/dtype.h"

namespace pycompress::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A pointer to global memory that cannot be dereferenced: what a kernel reads and writes goes through one of these
// instructions, so that tests/cuda_emulator can count its bytes and check bounds and alignment. Indices count elements.
template <class T>
class Global {
 public:
  using Value = std::remove_const_t<T>;

  Global() = default;
  __host__ __device__ Global(T* pointer) : pointer_(pointer) {}  // NOLINT: a pointer is what the host has

  __host__ __device__ bool is_null() const { return pointer_ == nullptr; }
  __device__ Global operator+(int64_t elements) const { return Global(pointer_ + elements); }

  __device__ Value load(int64_t i) const { return ptx::load<Value>(pointer_ + i); }
  __device__ void store(int64_t i, Value value) const { ptx::store<Value>(pointer_ + i, value); }

  // sizeof(Vector) bytes from element i on, aligned to that size; _once: nobody needs them again soon
  template <class Vector>
  __device__ Vector load_as(int64_t i) const {
    return ptx::load<Vector>(reinterpret_cast<const Vector*>(pointer_ + i));
  }
  template <class Vector>
  __device__ Vector load_once_as(int64_t i) const {
    return ptx::load_once<Vector>(reinterpret_cast<const Vector*>(pointer_ + i));
  }
  template <class Vector>
  __device__ void store_as(int64_t i, Vector value) const {
    ptx::store<Vector>(reinterpret_cast<Vector*>(pointer_ + i), value);
  }
  template <class Vector>
  __device__ void store_once_as(int64_t i, Vector value) const {
    ptx::store_once<Vector>(reinterpret_cast<Vector*>(pointer_ + i), value);
  }

  // Starts the copy of Bytes from element i on into shared memory; `valid` bytes of it, zeros behind them.
  template <int Bytes>
  __device__ void cp_async(void* shared, int64_t i, int valid = Bytes) const {
    ptx::cp_async<Bytes>(shared, pointer_ + i, valid);
  }

  // Flags between blocks, T = uint32_t; see ptx.h.
  __device__ uint32_t load_acquire(int64_t i) const { return ptx::load_acquire(pointer_ + i); }
  __device__ uint32_t add_release(int64_t i, uint32_t value) const { return ptx::add_release(pointer_ + i, value); }

 private:
  T* pointer_ = nullptr;
};

// ---- element types: float, __nv_bfloat16, __half -------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x) {  // rounds to nearest even
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

__device__ inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// The element at a byte of an array whose type only the call knows.
__device__ inline float load_float(Global<const char> from, int64_t byte, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return from.load_as<float>(byte);
    case Dtype::bf16: return to_float(from.load_as<__nv_bfloat16>(byte));
    default: return to_float(from.load_as<__half>(byte));
  }
}
__device__ inline void store_float(Global<char> to, int64_t byte, Dtype dtype, float x) {
  switch (dtype) {
    case Dtype::f32: return to.store_as<float>(byte, x);
    case Dtype::bf16: return to.store_as<__nv_bfloat16>(byte, from_float<__nv_bfloat16>(x));
    default: return to.store_as<__half>(byte, from_float<__half>(x));
  }
}

// The elements of a vector: Pack<__half, 8> is 16 bytes that load_as and store_as take.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

// ---- sums --------------------------------------------------------------------------------------------------------

// Every lane gets combine over the values of all 32; all 32 must be here.
template <class T, class Combine>
__device__ inline T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

template <class T>
__device__ inline T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

__device__ inline float warp_max(float value) {
  return warp_reduce(value, [](float a, float b) { return fmaxf(a, b); });
}

// Every thread gets combine over the values of the whole block, of whole warps; none: what adds nothing. shared: a T for
// each warp, which nobody may write to before the next barrier.
template <class T, class Combine>
__device__ inline T block_reduce(T value, T none, Combine combine, T* shared) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  value = warp_reduce(value, combine);
  if (warps == 1) return value;
  if (lane == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? shared[lane] : none, combine);
}

template <class T>
__device__ inline T block_sum(T value, T* shared) {
  return block_reduce(value, T(0), [](T a, T b) { return a + b; }, shared);
}

}  // namespace pycompress::cuda
