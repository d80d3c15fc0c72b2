// Launches: what CUDA refuses, what is recorded, devices; seeds; and that a fault leaves nothing behind.
#include <algorithm>
#include <set>

#include "check.h"
#include "faults.h"

namespace emulator_tests {

namespace {

namespace cuda = pycompress::cuda;

struct Params {
  cuda::Global<uint32_t> next;
  cuda::Global<uint32_t> order;
};

// The n-th thread to come here writes its number to order[n].
__global__ void take_numbers(Params p) {
  const uint32_t number = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t turn = p.next.add_release(0, 1);
  p.order.store(turn, number);
}

__global__ void nothing(int) {}

std::vector<uint32_t> order_of(uint64_t seed, const cuda::Shape& shape) {
  emulator::Buffer<uint32_t> next(std::vector<uint32_t>{0}, "next", emulator::Access::kReadWrite);
  emulator::Buffer<uint32_t> order(size_t{shape.grid.x} * shape.block.x, "order");
  emulator::Options options;
  options.seed = seed;
  emulator::run(options, [&] {
    cuda::launch("test", "take_numbers", take_numbers, cuda::Place{}, shape, Params{next.data(), order.data()});
  });
  return order.values();
}

void test_orders() {
  std::set<std::vector<uint32_t>> different;
  for (const bool cooperative : {false, true}) {
    const cuda::Shape shape{dim3(4), dim3(64), 0, cooperative};
    for (uint64_t seed = 0; seed < 6; ++seed) {
      std::vector<uint32_t> order = order_of(seed, shape);
      CHECK(order == order_of(seed, shape));  // a seed says all
      different.insert(order);
      std::sort(order.begin(), order.end());
      for (uint32_t i = 0; i < order.size(); ++i) {
        CHECK(order[i] == i);
      }
    }
  }
  CHECK(different.size() == 12);
}

cudaError_t try_launch(dim3 grid, dim3 block, size_t shared, bool cooperative = false) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, nothing, 0);
  CHECK(cudaGetLastError() == error);
  CHECK(cudaGetLastError() == cudaSuccess);  // told once
  return error;
}

void test_errors() {
  constexpr size_t kShared = 48 * 1024;
  CHECK(try_launch(dim3(1), dim3(1024), kShared) == cudaSuccess);
  CHECK(try_launch(dim3(1), dim3(1025), 0) == cudaErrorInvalidConfiguration);
  CHECK(try_launch(dim3(1), dim3(0), 0) == cudaErrorInvalidConfiguration);
  CHECK(try_launch(dim3(1, 65536), dim3(32), 0) == cudaErrorInvalidConfiguration);
  CHECK(try_launch(dim3(1), dim3(32), kShared + 1) == cudaErrorInvalidValue);
  // 4 multiprocessors, 2048 threads and 164 KB each
  CHECK(try_launch(dim3(8), dim3(1024), 0, true) == cudaSuccess);
  CHECK(try_launch(dim3(9), dim3(1024), 0, true) == cudaErrorCooperativeLaunchTooLarge);
  CHECK(try_launch(dim3(13), dim3(32), kShared, true) == cudaErrorCooperativeLaunchTooLarge);

  const auto* function = reinterpret_cast<const void*>(&nothing);
  CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, 163 * 1024) == cudaSuccess);
  CHECK(try_launch(dim3(1), dim3(32), 163 * 1024) == cudaSuccess);
  CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, 163 * 1024 + 1) ==
        cudaErrorInvalidValue);
  cudaGetLastError();
  // Three blocks of 437 units of 128 bytes, the reserved KB among them, fit into 164 KB; of 438 units they do not.
  constexpr int kUnits = 437 * 128 - 1024;
  CHECK(try_launch(dim3(12), dim3(32), kUnits, true) == cudaSuccess);
  CHECK(try_launch(dim3(12), dim3(32), kUnits + 1, true) == cudaErrorCooperativeLaunchTooLarge);
  CHECK(cuda::blocks_by_shared(cuda::device_info(0), kUnits) == 3);
  CHECK(cuda::blocks_by_shared(cuda::device_info(0), kUnits + 1) == 2);
  CHECK(cuda::shared_of_each(cuda::device_info(0), 3) == kUnits);
  CHECK(cuda::shared_of_each(cuda::device_info(0), 1) == 163 * 1024);
  try {
    cuda::launch("an_op", "nothing", nothing, cuda::Place{}, {dim3(1), dim3(2000)}, 0);
    CHECK(false);
  } catch (const cuda::CudaError& error) {
    CHECK(std::string(error.what()) == "an_op: CUDA error in nothing: invalid configuration argument");
  }
}

void test_devices() {
  emulator::Device hopper;
  hopper.major = 9;
  hopper.multiprocessors = 7;
  const int device = emulator::add_device(hopper);
  const cuda::DeviceInfo& info = cuda::device_info(device);
  CHECK(info.capability() == 90 && info.multiprocessors == 7 && info.shared_bytes == 227 * 1024);
  CHECK(cuda::device_info(0).capability() == 80);
  auto* stream = reinterpret_cast<cudaStream_t>(&hopper);
  emulator::run({}, [&] {
    const cuda::DeviceGuard guard(device, "test");
    cuda::launch("test", "nothing", nothing, cuda::Place{device, stream}, {dim3(3), dim3(32), 200 * 1024}, 0);
    cuda::launch("test", "nothing", nothing, cuda::Place{device, stream}, {dim3(0), dim3(32)}, 0);
  });
  CHECK(emulator::launches().size() == 1);
  const emulator::LaunchRecord& record = emulator::launches()[0];
  CHECK(record.kernel == "nothing" && record.device == device && record.stream == stream);
  CHECK(record.grid.x == 3 && record.block.x == 32 && record.shared_bytes == 200 * 1024 && !record.cooperative);
  {
    // A launch with less, by another thread, say, does not take away what this one was allowed.
    const cuda::DeviceGuard guard(device, "test");
    cuda::launch("test", "nothing", nothing, cuda::Place{device, stream}, {dim3(3), dim3(32), 60 * 1024}, 0);
    CHECK(try_launch(dim3(3), dim3(32), 200 * 1024) == cudaSuccess);
  }
  int current = -1;
  CHECK(cudaGetDevice(&current) == cudaSuccess && current == 0);
  CHECK(cudaSetDevice(99) == cudaErrorInvalidDevice);
  cudaGetLastError();
}

__global__ void half_of_them_wait(Params p) {
  if (threadIdx.x % 2 == 0) {
    while (p.next.load_acquire(0) == 0) {
      cuda::pause();
    }
  }
  __syncthreads();
}

// What a fault says: who waits where.
void test_whereabouts() {
  emulator::Buffer<uint32_t> next(std::vector<uint32_t>{0}, "next", emulator::Access::kReadWrite);
  try {
    emulator::run({}, [&] {
      cuda::launch("test", "half_of_them_wait", half_of_them_wait, cuda::Place{}, {dim3(1), dim3(4)},
                   Params{next.data(), nullptr});
    });
    CHECK(false);
  } catch (const emulator::Fault& fault) {
    const std::string text = fault.what();
    CHECK(text.find("kernel half_of_them_wait, block (0,0,0), thread (") != std::string::npos);
    CHECK(text.find("threads 1-1 wait at __syncthreads; block (0,0,0) threads 2-2 run") != std::string::npos);
  }
}

// Blocks that need not run at the same time: the last one to say that it is done reads what all have written.
__global__ void last_block_sums(Params p) {
  if (threadIdx.x != 0) return;
  p.order.store(1 + blockIdx.x, blockIdx.x * blockIdx.x);
  if (p.next.add_release(0, 1) != gridDim.x - 1) return;
  uint32_t sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    sum += p.order.load(1 + block);
  }
  p.order.store(0, sum);
  p.next.store(0, 0);  // for the next launch
}

void test_last_block() {
  emulator::Buffer<uint32_t> next(std::vector<uint32_t>{0}, "next", emulator::Access::kReadWrite);
  for (uint64_t seed = 0; seed < 10; ++seed) {
    for (const bool cooperative : {false, true}) {
      emulator::Buffer<uint32_t> order(1 + 6, "order");
      emulator::Options options;
      options.seed = seed;
      emulator::run(options, [&] {
        cuda::launch("test", "last_block_sums", last_block_sums, cuda::Place{}, {dim3(6), dim3(32), 0, cooperative},
                     Params{next.data(), order.data()});
      });
      CHECK(order[0] == 0 + 1 + 4 + 9 + 16 + 25 && next[0] == 0);
    }
  }
}

struct CopyParams {
  cuda::Global<const uint8_t> x;
  cuda::Global<uint8_t> y;
};

// Thread t copies t of 16 bytes, and finds zeros behind them.
__global__ void copy_some(CopyParams p) {
  char* s = cuda::dynamic_shared();
  const int t = static_cast<int>(threadIdx.x);
  p.x.cp_async<16>(s + 16 * t, 16 * t, t);
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
  for (int i = 0; i < 16; ++i) {
    p.y.store(16 * t + i, static_cast<uint8_t>(s[16 * t + i]));
  }
}

void test_copies() {
  constexpr size_t kThreads = 17;
  const emulator::Buffer<uint8_t> x(std::vector<uint8_t>(16 * kThreads, 7), "x");
  for (const auto arrival : {emulator::Arrival::kAtIssue, emulator::Arrival::kAtWait, emulator::Arrival::kDrawn}) {
    emulator::Buffer<uint8_t> y(16 * kThreads, "y");
    emulator::Options options;
    options.arrival = arrival;
    emulator::run(options, [&] {
      cuda::launch("test", "copy_some", copy_some, cuda::Place{}, {dim3(1), dim3(kThreads), 16 * kThreads},
                   CopyParams{x.data(), y.data()});
    });
    for (size_t i = 0; i < y.size(); ++i) {
      CHECK(y[i] == (i % 16 < i / 16 ? 7 : 0));
    }
  }
}

}  // namespace

void test_runtime() {
  test_last_block();
  test_copies();
  test_orders();
  test_errors();
  test_devices();
  test_whereabouts();
  test_orders();  // the machine works as before
}

}  // namespace emulator_tests
