// Bytes, sectors and bank conflicts, against what is drawn on paper.
#include "check.h"
#include "faults.h"

namespace emulator_tests {

namespace {

namespace cuda = pycompress::cuda;

struct Params {
  cuda::Global<const float> x;
  cuda::Global<float> y;
  int stride;
};

// Thread t reads x[stride t] twice, the second time only in the lower lanes, and writes y[t].
__global__ void strided(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (round == 0 || t % 32 < 8) sum += p.x.load(int64_t{t} * p.stride);
  }
  p.y.store(t, sum);
}

emulator::Counters count_strided(int stride) {
  constexpr int kThreads = 64;
  emulator::Buffer<float> x(faults::values(static_cast<size_t>(kThreads * stride)), "x"), y(kThreads, "y");
  emulator::run({}, [&] {
    cuda::launch("test", "strided", strided, cuda::Place{}, {dim3(1), dim3(kThreads)},
                 Params{x.data(), y.data(), stride});
  });
  return emulator::counters();
}

void test_global() {
  const emulator::Counters dense = count_strided(1);
  CHECK(dense.loads == 64 + 16 && dense.loaded_bytes == 4 * 80 && dense.stores == 64 && dense.stored_bytes == 256);
  CHECK(dense.read_sectors == 8 && dense.written_sectors == 8 && dense.moved_bytes() == 512);
  CHECK(dense.requests == 6);  // of 2 warps: two loads, one store
  CHECK(dense.request_sectors == 2 * (4 + 1 + 4));
  const emulator::Counters sparse = count_strided(32);
  CHECK(sparse.read_sectors == 64 && sparse.requests == 6 && sparse.request_sectors == 2 * (32 + 8 + 4));
}

// The rows of ldmatrix and the floats of shared_store a pitch apart.
__global__ void shared_rows(Params p) {
  char* s = cuda::dynamic_shared();
  const int t = static_cast<int>(threadIdx.x);
  p.x.cp_async<16>(s + t * p.stride, 4 * t, t == 31 ? 12 : 16);
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
  __syncthreads();
  uint32_t r[4];
  cuda::ldmatrix_x4(r, s + t * p.stride);
  __syncthreads();
  cuda::shared_store(s + t * p.stride, __uint_as_float(r[0]));
}

emulator::Counters count_shared(int pitch) {
  emulator::Buffer<float> x(faults::values(128), "x");
  emulator::run({}, [&] {
    cuda::launch("test", "shared_rows", shared_rows, cuda::Place{}, {dim3(1), dim3(32), 32 * pitch},
                 Params{x.data(), nullptr, pitch});
  });
  return emulator::counters();
}

void test_shared() {
  // 128 bytes apart all rows start at bank 0; 144 bytes apart the rows of a phase share no bank.
  const emulator::Counters same = count_shared(128), apart = count_shared(144);
  CHECK(same.copies == 32 && same.copied_bytes == 31 * 16 + 12 && same.read_sectors == 16);
  CHECK(same.matrix_phases == 4 && same.matrix_conflicts == 4 * 7);
  CHECK(same.shared_phases == 4 + 1 && same.shared_conflicts == 4 * 7 + 31);
  CHECK(apart.matrix_phases == 4 && apart.matrix_conflicts == 0);
  CHECK(apart.shared_phases == 4 + 1 && apart.shared_conflicts == 3);  // floats 36 words apart: 8 different banks
}

}  // namespace

void test_counters() {
  test_global();
  test_shared();
}

}  // namespace emulator_tests
