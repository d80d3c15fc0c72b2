// The part of the CUDA runtime that csrc/common/cuda/launch.h uses. A launch runs the kernel to its end and returns; a
// fault of the kernel is thrown as emulator::Fault.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "cuda_emulator/built_in.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeCooperative = 2 };
union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulator {

// A kernel with its arguments: call(arguments) runs it as the current thread.
struct Kernel {
  const void* function;
  void (*call)(const void* arguments);
  const void* arguments;
};

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel);

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Bound = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Bound bound(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto call = [](const void* to) {
    const Bound& it = *static_cast<const Bound*>(to);
    std::apply(it.first, it.second);  // by value: every thread has parameters of its own
  };
  return emulator::launch(*config, {reinterpret_cast<const void*>(kernel), call, &bound});
}
