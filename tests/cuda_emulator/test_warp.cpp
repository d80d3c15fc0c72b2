// Shuffles, votes and barriers with a result; parts of a warp that go their own way.
#include "check.h"
#include "faults.h"

namespace emulator_tests {

namespace {

namespace cuda = pycompress::cuda;

struct Params {
  cuda::Global<int> out;  // [operation, thread]
};

constexpr int kThreads = 70;  // the third warp has 6 lanes

__global__ void shuffles(Params p) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  const unsigned lanes = t < 64 ? cuda::kAllLanes : 0x3fu;
  int row = 0;
  const auto put = [&](int value) { p.out.store(row++ * kThreads + t, value); };
  put(__shfl_sync(lanes, t, 3));
  put(__shfl_xor_sync(lanes, t, 1));
  put(__shfl_up_sync(lanes, t, 2));
  put(t < 64 ? __shfl_down_sync(lanes, t, 4) : t);
  put(t < 64 ? __shfl_sync(lanes, t, 9, 8) : t);
  put(t < 64 ? __shfl_down_sync(lanes, t, 3, 8) : t);
  put(t < 64 ? __shfl_up_sync(lanes, t, 3, 16) : t);
  put(static_cast<int>(__shfl_xor_sync(lanes, int64_t{t} << 40, 1) >> 40));
  put(static_cast<int>(__ballot_sync(lanes, lane % 3 == 0)));
  put(__any_sync(lanes, t == 33));
  put(__all_sync(lanes, t >= 32));
  put(__reduce_add_sync(lanes, t));
  put(__reduce_max_sync(lanes, -t));
}

void test_shuffles() {
  constexpr size_t kRows = 13;
  emulator::Buffer<int> out(kRows * kThreads, "out");
  cuda::launch("test", "shuffles", shuffles, cuda::Place{}, {dim3(1), dim3(kThreads)}, Params{out.data()});
  for (int t = 0; t < kThreads; ++t) {
    const int lane = t % 32, first = t - lane, count = t < 64 ? 32 : 6;
    const bool full = t < 64;
    int ballot = 0, sum = 0;
    for (int i = 0; i < count; ++i) {
      ballot |= i % 3 == 0 ? static_cast<int>(1u << i) : 0;
      sum += first + i;
    }
    const int expected[kRows] = {first + 3,
                                 t ^ 1,
                                 lane < 2 ? t : t - 2,
                                 full && lane + 4 < 32 ? t + 4 : t,
                                 full ? t / 8 * 8 + 1 : t,
                                 full && t % 8 < 5 ? t + 3 : t,
                                 full && t % 16 >= 3 ? t - 3 : t,
                                 t ^ 1,
                                 ballot,
                                 first == 32,
                                 t >= 32,
                                 sum,
                                 -first};
    for (size_t row = 0; row < kRows; ++row) {
      CHECK(out[row * kThreads + static_cast<size_t>(t)] == expected[row]);
    }
  }
}

// The halves of a warp come to their operations in different orders, and to one together at the end.
__global__ void halves(Params p) {
  const int lane = static_cast<int>(threadIdx.x);
  int value = lane;
  if (lane < 16) {
    value += __shfl_xor_sync(0xffffu, value, 1);
    __syncwarp(0xffffu);
    value += static_cast<int>(__ballot_sync(0xffffu, 1));
  } else {
    value += static_cast<int>(__ballot_sync(0xffff0000u, lane == 16) >> 16);
    value += __shfl_xor_sync(0xffff0000u, value, 2);
  }
  p.out.store(lane, __shfl_xor_sync(cuda::kAllLanes, value, 16));
}

void test_halves() {
  emulator::Buffer<int> out(32, "out");
  cuda::launch("test", "halves", halves, cuda::Place{}, {dim3(1), dim3(32)}, Params{out.data()});
  for (int lane = 0; lane < 32; ++lane) {
    const int partner = lane ^ 16;
    const int expected = partner < 16 ? partner + (partner ^ 1) + 0xffff : partner + 1 + (partner ^ 2) + 1;
    CHECK(out[static_cast<size_t>(lane)] == expected);
  }
}

__global__ void barriers(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  p.out.store(t, __syncthreads_or(t == 69));
  p.out.store(kThreads + t, __syncthreads_or(t == 70));
  p.out.store(2 * kThreads + t, __syncthreads_and(t < 70));
  p.out.store(3 * kThreads + t, __syncthreads_and(t < 69));
  p.out.store(4 * kThreads + t, __syncthreads_count(t % 2));
}

void test_barriers() {
  emulator::Buffer<int> out(5 * kThreads, "out");
  cuda::launch("test", "barriers", barriers, cuda::Place{}, {dim3(1), dim3(kThreads)}, Params{out.data()});
  const int expected[] = {1, 0, 1, 0, 35};
  for (size_t i = 0; i < out.size(); ++i) {
    CHECK(out[i] == expected[i / kThreads]);
  }
}

}  // namespace

void test_warp() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    emulator::Options options;
    options.seed = seed;
    options.yield = 0.3;
    emulator::run(options, [] {
      test_shuffles();
      test_halves();
      test_barriers();
    });
  }
}

}  // namespace emulator_tests
