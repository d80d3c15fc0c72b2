// Host side of a CUDA operator: the device's properties, its guard, and launches whose errors name the operator.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pycompress::cuda {

// An error of the CUDA runtime: "int8_linear: CUDA error in the launch of quantize_rows: invalid argument".
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check_cuda(cudaError_t error, const char* op, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // an error that was told is not told again by the next call
    throw CudaError(std::string(op) + ": CUDA error in " + what + ": " + cudaGetErrorString(error));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a call runs: the device of its tensors and its current stream.
struct Place {
  int device = 0;
  cudaStream_t stream = nullptr;
};

struct DeviceInfo {
  int multiprocessors, major, minor;
  int shared_bytes;  // the most that a block may ask for
  int shared_per_multiprocessor;
  int capability() const { return 10 * major + minor; }
};

// Asked once a device; no synchronisation.
const DeviceInfo& device_info(int device);

// Shared memory is given out in units, and the system takes some for every block: on all targets that much.
constexpr int kSharedUnit = 128, kSharedReserved = 1024;

// How many blocks that ask for so much a multiprocessor has the shared memory for.
inline int blocks_by_shared(const DeviceInfo& info, int shared_bytes) {
  const int taken = (shared_bytes + kSharedReserved + kSharedUnit - 1) / kSharedUnit * kSharedUnit;
  return info.shared_per_multiprocessor / taken;
}

// The most that each of `blocks` on a multiprocessor may ask for.
inline int shared_of_each(const DeviceInfo& info, int blocks) {
  const int share = info.shared_per_multiprocessor / blocks / kSharedUnit * kSharedUnit - kSharedReserved;
  return share < info.shared_bytes ? share : info.shared_bytes;
}

// Makes a device current, and the one before it again at the end.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&before_), op, "cudaGetDevice");
    if (before_ != device) {
      check_cuda(cudaSetDevice(device), op, "cudaSetDevice");
    }
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) {
      cudaSetDevice(before_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Shape {
  dim3 grid, block;
  int shared_bytes = 0;
  bool cooperative = false;  // all blocks run at the same time, so that they may wait for each other
};

// Starts kernel(args...) on place.stream; the device must be current (DeviceGuard). An empty grid starts nothing.
template <class... Parameters, class... Args>
void launch(const char* op, const char* name, void (*kernel)(Parameters...), const Place& place, const Shape& shape,
            const Args&... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) {
    return;
  }
  if (shape.shared_bytes > 48 * 1024) {
    // All that a block may have, so that a thread that launches the same kernel with less takes nothing away from this.
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    device_info(place.device).shared_bytes),
               op, name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = place.stream;
  cudaLaunchAttribute attribute{};
  if (shape.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...), op, name);
}

}  // namespace pycompress::cuda
