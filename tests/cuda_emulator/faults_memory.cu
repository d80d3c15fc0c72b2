// Faults of memory: bounds, alignment, blocks that meet, rows and fragments of tensor operations.
#include "faults.h"

namespace faults {

namespace {

constexpr int kThreads = 64, kLanes = 32;

struct Params {
  cuda::Global<const float> x;
  cuda::Global<float> y;
  cuda::Global<uint32_t> flag;
  int count;
};

// ---- bounds and alignment -------------------------------------------------------------------------------------------

template <bool kFault>
__global__ void read_beyond(Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (kFault ? i <= p.count : i < p.count) {
    const float x = p.x.load(i);
    if (i < p.count) p.y.store(i, x);
  }
}

template <bool kFault>
__global__ void write_beyond(Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (kFault ? i <= p.count : i < p.count) p.y.store(i, p.x.load(i < p.count ? i : 0));
}

// A copy of 16 bytes reaches over the end, though zeros were wanted there.
template <bool kFault>
__global__ void copy_beyond(Params p) {
  auto* s = reinterpret_cast<float*>(cuda::dynamic_shared());
  const int i = 4 * static_cast<int>(threadIdx.x), left = p.count - i;
  if (left > 0) p.x.cp_async<16>(s + i, i, kFault ? 16 : (left < 4 ? 4 * left : 16));
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
  for (int k = i; k < i + 4 && k < p.count; ++k) {
    p.y.store(k, s[k]);
  }
}

template <bool kFault>
__global__ void write_null(Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.count) return;
  p.y.store(i, p.x.load(i));
  if (kFault && p.flag.is_null()) p.flag.store(0, 1);
}

// The input is written by way of a second, writable pointer to it: in place, where that is not meant.
template <bool kFault>
__global__ void write_input(Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.count) return;
  p.y.store(i, p.x.load(i));
  if (kFault) p.flag.store(i, 0);
}

template <bool kFault>
__global__ void write_behind_shared(Params p) {
  auto* s = reinterpret_cast<float*>(cuda::dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  s[t + (kFault ? 1 : 0)] = p.x.load(t);
  __syncthreads();
  p.y.store(t, s[t + (kFault ? 1 : 0)]);
}

template <bool kFault>
__global__ void read_behind_shared(Params p) {
  auto* s = reinterpret_cast<float*>(cuda::dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  s[t] = p.x.load(t);
  __syncthreads();
  p.y.store(t, kFault && t == kThreads - 1 ? s[t + 1] : s[t]);
}

template <bool kFault>
__global__ void uninitialised_shared(Params p) {
  auto* s = reinterpret_cast<float*>(cuda::dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  if (!kFault || t != 17) s[t] = p.x.load(t);
  __syncthreads();
  p.y.store(t, s[t]);
}

template <bool kFault>
__global__ void misaligned_load(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (4 * t + 4 >= p.count) return;
  const auto v = p.x.load_as<float4>(4 * t + (kFault ? 1 : 0));
  p.y.store_as(4 * t, kFault ? float4{0, v.x, v.y, v.z} : v);
}

template <bool kFault>
__global__ void misaligned_store(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (4 * t + 4 >= p.count) return;
  p.y.store_as(4 * t + (kFault ? 2 : 0), p.x.load_as<float4>(4 * t));
}

template <bool kFault>
__global__ void misaligned_copy(Params p) {
  auto* s = reinterpret_cast<float*>(cuda::dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  if (4 * t + 4 < p.count) p.x.cp_async<16>(s + 4 * t, 4 * t + (kFault ? 1 : 0), 12);
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
  for (int k = 4 * t; k < 4 * t + 3 && k < p.count; ++k) {
    p.y.store(k, s[k]);
  }
}

// y[i] = x[i] for all i < count, or where a kernel leaves the rest alone as far as it goes
template <void (*Good)(Params), void (*Bad)(Params), int kCount, int kChecked>
bool run_copy(bool planted) {
  emulator::Buffer<float> x(values(kCount), "x"), y(kCount, "y");
  constexpr int kBlocks = (kCount + kThreads) / kThreads;
  launch(planted, Good, Bad, Params{x.data(), y.data(), nullptr, kCount},
         {dim3(kBlocks), dim3(kThreads), kThreads * 16});
  for (size_t i = 0; i < kChecked; ++i) {
    if (y[i] != value_at(i)) return false;
  }
  return true;
}

bool run_write_input(bool planted) {
  constexpr int kCount = 10;
  emulator::Buffer<float> x(values(kCount), "x"), y(kCount, "y");
  launch(planted, write_input<false>, write_input<true>,
         Params{x.data(), y.data(), reinterpret_cast<uint32_t*>(x.data()), kCount}, {dim3(1), dim3(kThreads), 0});
  return std::memcmp(x.data(), y.data(), kCount * sizeof(float)) == 0;
}

// The same with one block and shared memory for one float a thread.
template <void (*Good)(Params), void (*Bad)(Params)>
bool run_shared(bool planted) {
  emulator::Buffer<float> x(values(kThreads), "x"), y(kThreads, "y");
  launch(planted, Good, Bad, Params{x.data(), y.data(), nullptr, kThreads}, {dim3(1), dim3(kThreads), kThreads * 4});
  for (size_t i = 0; i < kThreads; ++i) {
    if (y[i] != value_at(i)) return false;
  }
  return true;
}

template <void (*Good)(Params), void (*Bad)(Params)>
bool run_one_block(bool planted) {
  constexpr int kCount = 4 * kThreads - 9;
  emulator::Buffer<float> x(values(kCount), "x"), y(kCount, "y");
  launch(planted, Good, Bad, Params{x.data(), y.data(), nullptr, kCount}, {dim3(1), dim3(kThreads), kThreads * 16});
  for (size_t i = 0; i < kCount - kCount % 4 - 4; ++i) {
    if (y[i] != value_at(i) && i % 4 != 3) return false;
  }
  return true;
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

// Block 1 gives on what block 0 wrote, when it says so.
template <bool kFault>
__global__ void flag_between_blocks(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0) {
    p.y.store(t, p.x.load(t));
    __syncthreads();
    if (t == 0) {
      if (kFault) {
        p.flag.store(0, 1);
      } else {
        p.flag.add_release(0, 1);
      }
    }
  } else {
    if (t == 0) {
      while ((kFault ? p.flag.load(0) : p.flag.load_acquire(0)) == 0) {
        cuda::pause();
      }
    }
    __syncthreads();
    p.y.store(kThreads + t, p.y.load(t));
  }
}

// The flag is raised before the last of what it promises is written.
template <bool kFault>
__global__ void release_too_early(Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0) {
    if (!kFault) p.y.store(t, p.x.load(t));
    __syncthreads();
    if (t == 0) p.flag.add_release(0, 1);
    if (kFault) p.y.store(t, p.x.load(t));
  } else {
    if (t == 0) {
      while (p.flag.load_acquire(0) == 0) {
        cuda::pause();
      }
    }
    __syncthreads();
    p.y.store(kThreads + t, p.y.load(t));
  }
}

bool check_given_on(const emulator::Buffer<float>& y) {
  for (size_t t = 0; t < kThreads; ++t) {
    if (y[kThreads + t] != value_at(t)) return false;
  }
  return true;
}

bool run_release(bool planted) {
  emulator::Buffer<float> x(values(kThreads), "x"), y(2 * kThreads, "y");
  emulator::Buffer<uint32_t> flag(std::vector<uint32_t>{0}, "flag", emulator::Access::kReadWrite);
  launch(planted, release_too_early<false>, release_too_early<true>, Params{x.data(), y.data(), flag.data(), 0},
         {dim3(2), dim3(kThreads), 0, true});
  return check_given_on(y);
}

// The same kernel, right in a cooperative launch, where the blocks need not run at the same time.
template <bool kCooperative>
bool run_flag(bool planted) {
  emulator::Buffer<float> x(values(kThreads), "x"), y(2 * kThreads, "y");
  emulator::Buffer<uint32_t> flag(std::vector<uint32_t>{0}, "flag", emulator::Access::kReadWrite);
  const bool cooperative = kCooperative || !planted;
  launch(kCooperative && planted, flag_between_blocks<false>, flag_between_blocks<true>,
         Params{x.data(), y.data(), flag.data(), 0}, {dim3(2), dim3(kThreads), 0, cooperative});
  return check_given_on(y);
}

template <bool kFault>
__global__ void blocks_overlap(Params p) {
  const int i = static_cast<int>(blockIdx.x * (blockDim.x - (kFault ? 1 : 0)) + threadIdx.x);
  if (i < p.count) p.y.store(i, p.x.load(i));
}

// ---- tensor operations ----------------------------------------------------------------------------------------------

struct TensorParams {
  cuda::Global<const uint32_t> a, b, meta;
  cuda::Global<int32_t> d;
};

// d = a b for the fragments as they lie in memory, lane by lane; faults: registers of a swapped, rows misaligned or
// outside, metadata of the wrong lane or descending.
enum class Wrong { kNothing, kFragment, kMisalignedRow, kRowOutside, kMetaLane, kMetaOrder };

template <Wrong kWrong>
__global__ void multiply_s8(TensorParams p) {
  auto* s = reinterpret_cast<uint32_t*>(cuda::dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x);
  // Rows of 16 bytes: matrix i of a holds register i of all lanes.
  for (int i = 0; i < 4; ++i) {
    s[i * kLanes + lane] = p.a.load(4 * lane + i);
  }
  __syncthreads();
  uint32_t a[4], b[2];
  const int skew = kWrong == Wrong::kMisalignedRow && lane == 9 ? 2
                   : kWrong == Wrong::kRowOutside && lane == 31 ? 4
                                                                : 0;
  cuda::ldmatrix_x4(a, s + 4 * lane + skew);
  if (kWrong == Wrong::kFragment) {
    const uint32_t swap = a[1];
    a[1] = a[2];
    a[2] = swap;
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = p.b.load(4 * lane + i);
  }
  int32_t d[4] = {};
  cuda::mma_s8(d, a, b);
  for (int i = 0; i < 4; ++i) {
    p.d.store(4 * lane + i, d[i]);
  }
}

template <Wrong kWrong>
__global__ void multiply_sparse_s8(TensorParams p) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[4], b[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = p.a.load(4 * lane + i);
    b[i] = p.b.load(4 * lane + i);
  }
  uint32_t meta = p.meta.load(kWrong == Wrong::kMetaLane ? lane ^ 1 : lane);
  if (kWrong == Wrong::kMetaOrder && lane == 6) meta = (meta >> 2 & 0x33333333u) | (meta & 0x33333333u) << 2;
  int32_t d[4] = {};
  cuda::mma_sp_s8(d, a, b, meta);
  for (int i = 0; i < 4; ++i) {
    p.d.store(4 * lane + i, d[i]);
  }
}

// The right result is the good kernel's own, under the same seed: test_tensor.cpp says that it is right.
template <Wrong kWrong, void (*Good)(TensorParams), void (*Bad)(TensorParams)>
bool run_tensor(bool planted) {
  std::vector<uint32_t> bytes(4 * kLanes), places(kLanes);
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<uint32_t>(i * 2654435761u) & 0x3f1f3f1f;
  }
  constexpr uint32_t kPlaces[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};
  for (size_t lane = 0; lane < kLanes; ++lane) {
    places[lane] = 0;
    for (size_t quad = 0; quad < 8; ++quad) {
      places[lane] |= kPlaces[(lane * 5 + quad * 3 + lane * quad) % 6] << 4 * quad;
    }
  }
  emulator::Buffer<uint32_t> a(bytes, "a"), b(bytes, "b"), meta(places, "meta");
  emulator::Buffer<int32_t> d(4 * kLanes, "d"), expected(4 * kLanes, "expected");
  const cuda::Shape shape{dim3(1), dim3(kLanes), 4 * kLanes * 4};
  launch(false, Good, Bad, TensorParams{a.data(), b.data(), meta.data(), expected.data()}, shape);
  launch(planted, Good, Bad, TensorParams{a.data(), b.data(), meta.data(), d.data()}, shape);
  return std::memcmp(d.data(), expected.data(), 4 * kLanes * 4) == 0;
}

template <Wrong kWrong>
constexpr auto kDense = run_tensor<kWrong, multiply_s8<Wrong::kNothing>, multiply_s8<kWrong>>;
template <Wrong kWrong>
constexpr auto kSparse = run_tensor<kWrong, multiply_sparse_s8<Wrong::kNothing>, multiply_sparse_s8<kWrong>>;

}  // namespace

const std::vector<Case>& memory() {
  constexpr int kCount = 2 * kThreads - 5;
  static const std::vector<Case> cases = {
      {"a read beyond global memory", run_copy<read_beyond<false>, read_beyond<true>, kCount, kCount>},
      {"a write beyond global memory", run_copy<write_beyond<false>, write_beyond<true>, kCount, kCount>},
      {"a copy beyond global memory", run_one_block<copy_beyond<false>, copy_beyond<true>>},
      {"a write at a null pointer", run_copy<write_null<false>, write_null<true>, kCount, kCount>},
      {"a write to an input", run_write_input},
      {"a write behind shared memory", run_shared<write_behind_shared<false>, write_behind_shared<true>>,
       Death::kUnderAsan},
      {"a read behind shared memory", run_shared<read_behind_shared<false>, read_behind_shared<true>>,
       Death::kUnderAsan},
      {"a read of uninitialised shared memory", run_shared<uninitialised_shared<false>, uninitialised_shared<true>>},
      {"a misaligned load of 16 bytes", run_one_block<misaligned_load<false>, misaligned_load<true>>},
      {"a misaligned store of 16 bytes", run_one_block<misaligned_store<false>, misaligned_store<true>>},
      {"a misaligned copy of 16 bytes", run_one_block<misaligned_copy<false>, misaligned_copy<true>>},
      {"a flag between blocks without release", run_flag<true>},
      {"a release before the write", run_release},
      {"a wait for a block that does not run", run_flag<false>},
      {"two blocks write the same element", run_copy<blocks_overlap<false>, blocks_overlap<true>, kCount, kCount - 2>},
      {"a fragment of mma in the wrong registers", kDense<Wrong::kFragment>},
      {"a misaligned row of ldmatrix", kDense<Wrong::kMisalignedRow>},
      {"a row of ldmatrix outside of shared memory", kDense<Wrong::kRowOutside>},
      {"metadata of mma.sp in the wrong lane", kSparse<Wrong::kMetaLane>},
      {"metadata of mma.sp not ascending", kSparse<Wrong::kMetaOrder>},
  };
  return cases;
}

}  // namespace faults
