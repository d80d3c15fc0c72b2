// A GPU for tests, on the CPU. g++ builds the .cu sources of csrc against tests/cuda_emulator/include, as they stand:
//
//   g++ -std=c++17 -x c++ -I tests/cuda_emulator/include -I csrc -c csrc/int8_matmul/kernel_cuda.cu
//
// and csrc/common/cuda/launch.h then starts kernels here. What is emulated, and how it shows what a GPU shows only now
// and then:
//   threads            each a fiber that runs until it must wait; which one goes on is drawn from the seed. At accesses
//                      to global memory a thread may stop as well (`yield`), so that it lags far behind the others.
//   blocks             one after another in an order drawn from the seed; of a cooperative launch all at once.
//   shared memory      exactly as long as the launch said, and full of NaNs at the start of every block.
//   cp.async           each copy arrives, as the seed says, when it is issued or at the wait that covers it.
//   warp operations    shuffles, votes, ldmatrix, mma: carried out when every lane named in the mask has come.
//
// Reported as a Fault, thrown out of the launch: misaligned accesses; accesses outside the Buffers, if there are any;
// barriers and warp operations that some thread never comes to; copies nobody waits for; a block that reads or writes
// what another wrote, without add_release and load_acquire between them. All else that is wrong with a kernel shows up as
// a wrong result under some seed, or as an error of AddressSanitizer (shared memory), so run several.
//
// What it cannot show: memory has one order here, in which all threads see every access, so that any warp operation
// between a lane's write and another's read is as good as __syncwarp, which a GPU may not grant. Registers do not limit
// how many blocks run at a time. Products and sums are never fused, while nvcc fuses those that a kernel does not round
// by __fmul_rn. mma adds the products one after the other.
//
//   emulator::Buffer<float> x(values), y(n);
//   for (uint64_t seed = 0; seed < 8; ++seed) {
//     emulator::Options options;
//     options.seed = seed;
//     emulator::run(options, [&] { run_cuda(args, place); });
//     EXPECT(emulator::counters().moved_bytes() <= 1.05 * floor);
//   }
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Arrival { kDrawn, kAtIssue, kAtWait };

struct Options {
  uint64_t seed = 1;
  double yield = 0.02;                // how likely a thread stops at an access to global memory
  Arrival arrival = Arrival::kDrawn;  // when copies arrive
  bool count = true;                  // sectors and bank conflicts; bytes are counted in any case
  bool check_blocks = true;           // whether blocks meet at the same memory
  bool check_copies = true;           // whether a kernel may end with copies that it never waited for
};

// The launches of `body` run under these options; counters and launches start anew. Outside of run() the options are
// those of the environment: PYCOMPRESS_EMULATOR_SEED, else seed 1, no yields, nothing counted.
void run(const Options& options, const std::function<void()>& body);

// ---- what was counted -----------------------------------------------------------------------------------------------

struct Counters {
  uint64_t loads = 0, stores = 0, copies = 0;  // how many accesses to global memory, one thread each
  uint64_t loaded_bytes = 0, stored_bytes = 0, copied_bytes = 0;
  uint64_t read_sectors = 0, written_sectors = 0;    // different ones: sectors of 32 bytes, the unit of device memory
  uint64_t requests = 0, request_sectors = 0;        // accesses of a warp, and the sectors that each of them touches
  uint64_t matrix_phases = 0, matrix_conflicts = 0;  // ldmatrix: 8 rows of 16 bytes at a time; extra passes of those
  uint64_t shared_phases = 0, shared_conflicts = 0;  // shared_load, shared_store and the arriving side of cp.async

  uint64_t requested_bytes() const { return loaded_bytes + stored_bytes + copied_bytes; }
  uint64_t moved_bytes() const { return 32 * (read_sectors + written_sectors); }  // the least that memory must move

  Counters& operator+=(const Counters& other);
};

struct LaunchRecord {
  std::string kernel;
  int device;
  cudaStream_t stream;
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  Counters counters;
};

Counters counters();                          // over all launches since run() began
const std::vector<LaunchRecord>& launches();  // in order

// ---- memory of the device -------------------------------------------------------------------------------------------

enum class Access { kReadWrite, kReadOnly };

void register_buffer(const void* start, size_t bytes, const std::string& name, Access access);
void unregister_buffer(const void* start);

// `size` elements in memory of exactly that length, aligned to 256 bytes as cudaMalloc does, known to the emulator as
// long as the Buffer lives. Without values every byte is 0xff: NaN as a float, -1 as an integer.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size, const std::string& name = "buffer") : size_(size) {
    allocate(name, Access::kReadWrite);
    std::memset(static_cast<void*>(data_), 0xff, size * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& values, const std::string& name = "buffer", Access access = Access::kReadOnly)
      : size_(values.size()) {
    allocate(name, access);
    if (size_ != 0) std::memcpy(static_cast<void*>(data_), values.data(), size_ * sizeof(T));
  }
  ~Buffer() {
    unregister_buffer(data_);
    std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  std::vector<T> values() const { return std::vector<T>(begin(), end()); }

 private:
  void allocate(const std::string& name, Access access) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, size_ * sizeof(T)) != 0) throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
    register_buffer(data_, size_ * sizeof(T), name, access);
  }

  size_t size_;
  T* data_;
};

// ---- devices --------------------------------------------------------------------------------------------------------

struct Device {
  int major = 8, minor = 0;
  int multiprocessors = 4;
};

// Two devices are there from the start, of compute capability PYCOMPRESS_EMULATED_CAPABILITY ("9.0"; by default 8.0).
// Returns the new one's number. (device_info() asks a device once only: to try another capability add another device.)
int add_device(const Device& device);

}  // namespace emulator
