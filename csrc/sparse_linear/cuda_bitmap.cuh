// What a warp of sparse_bitmap does with the rows it takes: the values through a ring in shared memory, the bits turned so
// that each lane has columns of its own, and the products.
//
// Values. Rows lie one behind the other, so that those of a warp are one stream. It flows through a ring of kRingBytes a
// warp in stages of 512 bytes, 16 a lane, by cp.async: every word is asked for once, and up to kRingBytes are under way
// while the warp computes. A value stands in the ring at its byte offset in memory modulo kRingBytes.
//
// Bits. A group is 32 words of 32 columns (16 of f32, so that a full group fills half of the ring at most). Lane j reads
// word j and counts; a scan tells where its values begin. Then the 32 x 32 bits are transposed: lane l gets bit l of each
// word, columns l, l + 32, l + 64, ... It walks over those that are set, so that zeros cost nothing:
//
//   columns   word 0: 0..31 | word 1: 32..63 | ...      lane l: bit j of `mine` is bit l of word j
//   value     of (j, l): start of word j + how many bits of word j are set below l
//   x         column 32 j + l of shared memory: in the same bank for every j, so that 32 lanes never meet in one
//
// x lies in shared memory as [planes][columns][tokens of a plane], a plane having at most 16 bytes a column: what a lane
// reads at once. Where a column has less than 4 bytes, those of the same lane lie together: of bytes, 0 32 64 96 1 33 ...
#pragma once

#include "int8_matmul/cuda_finish.cuh"
#include "sparse_linear/cuda.h"

namespace pycompress::sparse_linear {
namespace {

using cuda::Global;
using cuda::kAllLanes;
using cuda::kWarp;

constexpr int kRingBytes = 4096, kStageBytes = 16 * kWarp, kStages = kRingBytes / kStageBytes;

template <class V>
constexpr int kGroupWords = sizeof(V) == 4 ? 16 : 32;
template <class V>
constexpr int kGroupColumns = 32 * kGroupWords<V>;
// A group that does not begin with a stage, and the next stages, are in the ring at the same time.
static_assert(kGroupColumns<float> * 4 <= kRingBytes / 2 && kGroupColumns<__half> * 2 <= kRingBytes / 2,
              "ring too small");

// ---- the stream of values ------------------------------------------------------------------------------------------

class ValueStream {
 public:
  __device__ ValueStream(Global<const char> values, int64_t bytes, char* ring, int lane)
      : values_(values), bytes_(bytes), ring_(ring), lane_(lane) {}

  // Starts anew with the values at bytes begin..end, begin at most `bytes`. All lanes must be done with what was in the
  // ring.
  __device__ void open(int64_t begin, int64_t end) {
    end = min(max(end, begin), bytes_);
    origin_ = begin == end ? end : begin & ~int64_t(15);
    at_ = static_cast<int>(begin - origin_);
    stages_ = static_cast<int>((end - origin_ + kStageBytes - 1) / kStageBytes);
    end_ = (end + 15) & ~int64_t(15);
    issued_ = arrived_ = 0;
    fill();
  }

  // Starts as many copies as there is room for.
  __device__ void fill() {
    const int room = min(stages_, at_ / kStageBytes + kStages);
#pragma unroll 1
    for (; issued_ < room; ++issued_) {
      const int offset = issued_ * kStageBytes + 16 * lane_;
      const int64_t from = origin_ + offset;
      if (from < end_) {
        values_.cp_async<16>(ring_ + offset % kRingBytes, from, static_cast<int>(min(bytes_ - from, int64_t(16))));
      }
      cuda::cp_async_commit();
    }
  }

  // Waits until the next `count` bytes are there, for this lane: a __syncwarp must follow.
  __device__ void wait(int count) {
    const int needed = min(stages_, (at_ + count + kStageBytes - 1) / kStageBytes);
    if (needed <= arrived_) return;
    arrived_ = needed;
    switch (issued_ - needed) {
      case 0: cuda::cp_async_wait<0>(); break;
      case 1: cuda::cp_async_wait<1>(); break;
      case 2: cuda::cp_async_wait<2>(); break;
      default: cuda::cp_async_wait<3>(); break;
    }
  }

  // Copies are left only where row_start does not belong to the bitmap.
  __device__ void close() { cuda::cp_async_wait<0>(); }

  __device__ void advance(int count) { at_ += count; }
  __device__ int at() const { return at_; }  // of the next value, in bytes behind a multiple of 16 below the first

  // The value at byte `at` of the stream.
  template <class V>
  __device__ V value(int at) const {
    return cuda::shared_load<V>(ring_ + (at & (kRingBytes - 1)));
  }

 private:
  Global<const char> values_;
  int64_t bytes_, origin_ = 0, end_ = 0;
  char* ring_;
  int lane_, at_ = 0, stages_ = 0, issued_ = 0, arrived_ = 0;
};

// ---- bits ----------------------------------------------------------------------------------------------------------

struct Bits {
  Global<const char> bits;
  int64_t bytes;
  int row_bytes, k;
};

// Where a group begins: its first byte, and how many columns the row has from there on.
struct Group {
  int64_t at;
  int left;
};

// The word at byte 4 * i: without what lies behind the last byte.
__device__ inline uint32_t load_word(const Bits& b, int64_t i) {
  if (4 * i + 4 <= b.bytes) return b.bits.load_once_as<uint32_t>(4 * i);
  uint32_t word = 0;
#pragma unroll 1
  for (int64_t at = b.bytes - 1; at >= 4 * i; --at) word = word << 8 | b.bits.load_as<uint8_t>(at);
  return word;
}

// Lane j's word of memory under a group, and the last lane's next one. A row begins at any byte: one word more than the
// group has may lie under it.
struct RawWords {
  uint32_t own = 0, next = 0;
};

template <int Words>
__device__ inline RawWords load_words(const Bits& b, const Group& group, int lane) {
  RawWords raw;
  const int offset = static_cast<int>(group.at % 4), bytes = min((group.left + 7) / 8, 4 * Words) + offset;
  const int64_t i = group.at / 4 + lane;
  if (4 * lane < bytes) raw.own = load_word(b, i);
  if (Words == kWarp && lane == kWarp - 1 && 4 * kWarp < bytes) raw.next = load_word(b, i + 1);
  return raw;
}

// Word `lane` of the group: without bits past K.
template <int Words>
__device__ inline uint32_t align_word(const RawWords& raw, const Group& group, int lane) {
  uint32_t above = __shfl_down_sync(kAllLanes, raw.own, 1);
  if (lane == kWarp - 1) above = raw.next;
  const uint32_t word = __funnelshift_r(raw.own, above, static_cast<uint32_t>(group.at % 4) * 8);
  const int left = group.left - 32 * lane;
  if (lane >= Words || left <= 0) return 0;
  return left >= 32 ? word : word & ((1u << left) - 1);
}

// Bit j of lane l becomes bit l of lane j.
__device__ inline uint32_t transpose_bits(uint32_t word, int lane) {
  uint32_t low = 0x0000ffffu;  // bits whose number has no `distance` in it
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, word, distance);
    word = (lane & distance) == 0 ? (word & low) | ((other & low) << distance)
                                  : (word & ~low) | ((other & ~low) >> distance);
    low ^= low << (distance / 2);
  }
  return word;
}

// The sum over the lanes below this one.
__device__ inline int exclusive_scan(int value, int lane) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += below;
  }
  return sum - value;
}

// ---- products ------------------------------------------------------------------------------------------------------

// M tokens of X a column.
template <class X, int M>
struct Columns {
  static constexpr int kPlanes = M * int(sizeof(X)) > 16 ? M * int(sizeof(X)) / 16 : 1;
  static constexpr int kTokens = M / kPlanes;  // of a plane
  using Part = cuda::Pack<X, kTokens>;
  static constexpr int kBytes = M * int(sizeof(X));
  static constexpr int kTogether = kBytes >= 4 ? 1 : 4 / kBytes;  // columns of a lane in a word of shared memory

  Part* parts;
  int columns;  // of a plane

  // Where column 32 j + lane behind column `base`, a multiple of 128, stands in its plane.
  static __device__ int place(int base, int j, int lane) {
    return base + j / kTogether * (kTogether * kWarp) + lane * kTogether + j % kTogether;
  }

  __device__ void load(int place, X (&x)[M]) const {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const Part part = cuda::shared_load<Part>(parts + plane * columns + place);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) x[plane * kTokens + t] = part.value[t];
    }
  }
  __device__ void store(int place, const X (&x)[M]) const {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      Part part;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) part.value[t] = x[plane * kTokens + t];
      parts[plane * columns + place] = part;
    }
  }
};

__device__ inline int widened(int8_t x) { return x; }
__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return cuda::to_float(x); }
__device__ inline float widened(__half x) { return cuda::to_float(x); }
__device__ inline int add_product(int value, int x, int sum) { return sum + value * x; }
__device__ inline float add_product(float value, float x, float sum) { return fmaf(value, x, sum); }

struct alignas(8) WordStart {
  uint32_t word;
  int at;  // of its first value, in the stream
};

// sums += the products of one group. words: 32 of them in shared memory, of this warp. column: the group's first in x.
template <class V, class X, int M, class Sum>
__device__ inline void multiply_group(uint32_t word, int column, const Columns<X, M>& x, ValueStream& stream,
                                      WordStart* words, int lane, Sum (&sums)[M]) {
  const int count = __popc(word), before = exclusive_scan(count, lane);
  const int total = __shfl_sync(kAllLanes, before + count, kWarp - 1) * int(sizeof(V));
  words[lane] = {word, stream.at() + before * int(sizeof(V))};
  uint32_t mine = transpose_bits(word, lane);
  stream.wait(total);
  __syncwarp(kAllLanes);

  const uint32_t below = (1u << lane) - 1;
  const auto value_of = [&](int j) {
    const auto start = cuda::shared_load<WordStart>(words + j);
    return widened(stream.value<V>(start.at + __popc(start.word & below) * int(sizeof(V))));
  };
  while (mine != 0) {  // two at a time: the loads of one wait while those of the other are under way
    const int first = __ffs(static_cast<int>(mine)) - 1;
    mine &= mine - 1;
    const bool both = mine != 0;
    const int second = both ? __ffs(static_cast<int>(mine)) - 1 : first;
    mine &= mine - 1;
    const auto value0 = value_of(first), value1 = value_of(second);
    X x0[M], x1[M];
    x.load(x.place(column, first, lane), x0);
    x.load(x.place(column, second, lane), x1);
#pragma unroll
    for (int t = 0; t < M; ++t) sums[t] = add_product(value0, widened(x0[t]), sums[t]);
    if (both) {  // not a product with 0, which would make NaN of an infinite x
#pragma unroll
      for (int t = 0; t < M; ++t) sums[t] = add_product(value1, widened(x1[t]), sums[t]);
    }
  }
  __syncwarp(kAllLanes);
  stream.advance(total);
  stream.fill();
}

// Every lane gets the sum over all lanes for token lane / (32 / M).
template <int M, class Sum>
__device__ inline Sum add_lanes(Sum (&sums)[M], int lane) {
  int distance = kWarp / 2;
#pragma unroll
  for (int half = M / 2; half > 0; half /= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int t = 0; t < half; ++t) {
      const Sum kept = upper ? sums[t + half] : sums[t], given = upper ? sums[t] : sums[t + half];
      sums[t] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
    distance /= 2;
  }
#pragma unroll
  for (int step = kWarp / 2 / M; step > 0; step /= 2) sums[0] += __shfl_xor_sync(kAllLanes, sums[0], step);
  return sums[0];
}

}  // namespace
}  // namespace pycompress::sparse_linear
