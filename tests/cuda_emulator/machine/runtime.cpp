// The host's side: devices, attributes, launches and their records.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "cuda_emulator/memory.h"
#include "machine/machine.h"

namespace emulator {

namespace {

// What launches of a compute capability may have.
struct Limits {
  int capability;
  int shared_per_multiprocessor, shared_per_block;  // bytes
  int threads_per_multiprocessor, blocks_per_multiprocessor;
};

constexpr int kShared = 48 * 1024;  // of a block, unless the kernel was allowed more
constexpr int kReserved = 1024;     // of the shared memory, for every block
constexpr int kUnit = 128;          // in which a multiprocessor gives it out
constexpr int kThreadsPerBlock = 1024;

const Limits& limits_of(const Device& device) {
  static const Limits kLimits[] = {
      {80, 164 * 1024, 163 * 1024, 2048, 32},  {86, 100 * 1024, 99 * 1024, 1536, 16},
      {89, 100 * 1024, 99 * 1024, 1536, 24},   {90, 228 * 1024, 227 * 1024, 2048, 32},
      {100, 228 * 1024, 227 * 1024, 2048, 32}, {120, 100 * 1024, 99 * 1024, 1536, 24},
  };
  static const Limits kOlder{75, 64 * 1024, 64 * 1024, 1024, 16};
  const Limits* best = &kOlder;
  for (const Limits& limits : kLimits) {
    if (10 * device.major + device.minor >= limits.capability) best = &limits;
  }
  return *best;
}

Device default_device() {
  Device device;
  const char* capability = std::getenv("PYCOMPRESS_EMULATED_CAPABILITY");
  if (capability != nullptr && std::sscanf(capability, "%d.%d", &device.major, &device.minor) != 2) {
    throw std::runtime_error(std::string("PYCOMPRESS_EMULATED_CAPABILITY is ") + capability + "; expected e.g. 8.0");
  }
  return device;
}

Options default_options() {
  Options options;
  const char* seed = std::getenv("PYCOMPRESS_EMULATOR_SEED");
  if (seed != nullptr) options.seed = std::strtoull(seed, nullptr, 10);
  options.yield = 0;
  options.count = false;
  options.check_blocks = false;
  return options;
}

struct Host {
  std::recursive_mutex mutex;  // one launch at a time
  std::vector<Device> devices{default_device(), default_device()};
  std::map<std::pair<int, const void*>, int> allowed_shared;  // of devices and kernels
  Options options = default_options();
  std::vector<LaunchRecord> launches;
  bool recording = false;
  uint64_t launch_count = 0;
};

Host& host() {
  static Host host;
  return host;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// How many such blocks all multiprocessors hold at a time. What registers allow is not known here.
long resident_blocks(const Device& device, int threads, int shared) {
  const Limits& limits = limits_of(device);
  const int by_shared = limits.shared_per_multiprocessor / ((shared + kReserved + kUnit - 1) / kUnit * kUnit);
  const int by_threads = limits.threads_per_multiprocessor / ((threads + 31) / 32 * 32);
  return long{std::min({by_shared, by_threads, limits.blocks_per_multiprocessor})} * device.multiprocessors;
}

cudaError_t check_launch(const Launch& launch) {
  Host& h = host();
  const Device& device = h.devices[static_cast<size_t>(current_device)];
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (threads == 0 || threads > kThreadsPerBlock || launch.block.z > 64 || blocks == 0 || launch.grid.x > 0x7fffffff ||
      launch.grid.y > 65535 || launch.grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto allowed = h.allowed_shared.find({current_device, launch.kernel->function});
  const int most = allowed == h.allowed_shared.end() ? kShared : std::max(kShared, allowed->second);
  if (launch.shared_bytes > static_cast<size_t>(std::min(most, limits_of(device).shared_per_block))) {
    return cudaErrorInvalidValue;
  }
  if (launch.cooperative && static_cast<long>(blocks) > resident_blocks(device, static_cast<int>(threads),
                                                                        static_cast<int>(launch.shared_bytes))) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace

bool any_buffers();

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  Host& h = host();
  const std::lock_guard<std::recursive_mutex> lock(h.mutex);
  Launch launch{&kernel, config.gridDim, config.blockDim, config.dynamicSmemBytes, false};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) launch.cooperative = config.attrs[i].val.cooperative != 0;
  }
  const cudaError_t error = check_launch(launch);
  if (error != cudaSuccess) return remember(error);

  Options options = h.options;
  options.seed = options.seed * 0x100000001b3u + h.launch_count++;
  watching = options.count || options.check_blocks || options.yield > 0 || any_buffers();
  LaunchRecord record{h.recording ? kernel_name(kernel.function) : "",
                      current_device,
                      config.stream,
                      config.gridDim,
                      config.blockDim,
                      config.dynamicSmemBytes,
                      launch.cooperative,
                      {}};
  machine().run(launch, options, record.counters);
  if (h.recording) h.launches.push_back(std::move(record));
  return cudaSuccess;
}

// ---- for tests ------------------------------------------------------------------------------------------------------

void run(const Options& options, const std::function<void()>& body) {
  Host& h = host();
  const std::lock_guard<std::recursive_mutex> lock(h.mutex);
  struct Restore {
    Options options = host().options;
    ~Restore() {
      host().options = options;
      host().recording = false;
    }
  } restore;
  h.options = options;
  h.recording = true;
  h.launches.clear();
  h.launch_count = 0;
  body();
}

Counters counters() {
  Counters sum;
  for (const LaunchRecord& record : host().launches) {
    sum += record.counters;
  }
  return sum;
}

const std::vector<LaunchRecord>& launches() { return host().launches; }

int add_device(const Device& device) {
  host().devices.push_back(device);
  return static_cast<int>(host().devices.size()) - 1;
}

}  // namespace emulator

// ---- under CUDA's names ---------------------------------------------------------------------------------------------

using emulator::host;
using emulator::remember;

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(host().devices.size())) return remember(cudaErrorInvalidDevice);
  emulator::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= static_cast<int>(host().devices.size())) return remember(cudaErrorInvalidDevice);
  const emulator::Device& it = host().devices[static_cast<size_t>(device)];
  const emulator::Limits& limits = emulator::limits_of(it);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = it.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = it.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = it.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = limits.shared_per_multiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = limits.shared_per_block; break;
    default: return remember(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  const auto device = static_cast<size_t>(emulator::current_device);
  if (value < 0 || value > emulator::limits_of(host().devices[device]).shared_per_block) {
    return remember(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::recursive_mutex> lock(host().mutex);
  host().allowed_shared[{emulator::current_device, function}] = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}
