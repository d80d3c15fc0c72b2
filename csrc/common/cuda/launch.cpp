#include "common/cuda/launch.h"

#include <map>
#include <mutex>

namespace pycompress::cuda {

namespace {

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, what, device), "pycompress", "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

const DeviceInfo& device_info(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;  // of a map the elements stay where they are
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    return found->second;
  }
  const DeviceInfo info{
      attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrComputeCapabilityMajor, device),
      attribute(cudaDevAttrComputeCapabilityMinor, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
  return known.emplace(device, info).first->second;
}

}  // namespace pycompress::cuda
