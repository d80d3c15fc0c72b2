// The loops, written once over a multiply-accumulate. Unnamed namespace: see common/vec_math.h.
#pragma once

#include <cstdint>

#include "common/vec_math.h"

namespace pycompress::peaks {
namespace {

// ACCUMULATORS independent chains: enough to hide the latency, few enough to stay in registers. The empty asm keeps
// the compiler from computing the sum in advance. `lanes` is operations an instruction.
template <int ACCUMULATORS, class Register, class Mac>
double burn(int64_t rounds, int lanes, Register start, Mac mac) {
  Register sum[ACCUMULATORS];
  // Unrolled, or else GCC keeps the array in memory and the loop measures stores.
#pragma GCC unroll 16
  for (int j = 0; j < ACCUMULATORS; ++j) sum[j] = start;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < ACCUMULATORS; ++j) {
      sum[j] = mac(sum[j]);
      asm volatile("" : "+v"(sum[j]));
    }
  }
  return double(rounds) * ACCUMULATORS * lanes;
}

// 2^y of registers, as the softmax kernels compute it; no chain from one to the next.
inline double burn_exp(int64_t rounds) {
  Vec::F y = Vec::set1(-0.7f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      asm volatile("" : "+v"(y));
      const Vec::F power = vexp2(y);
      asm volatile("" ::"v"(power));
    }
  }
  return double(rounds) * 16 * Vec::kLanes;
}

inline double read_all(const void* data, int64_t bytes) {
  constexpr int64_t kVec = sizeof(Vec::I);
  const char* p = static_cast<const char*>(data);
  Vec::I s0 = Vec::izero(), s1 = s0, s2 = s0, s3 = s0;
  for (int64_t i = 0; i + 4 * kVec <= bytes; i += 4 * kVec) {
    s0 = Vec::iadd(s0, Vec::iload(p + i));
    s1 = Vec::iadd(s1, Vec::iload(p + i + kVec));
    s2 = Vec::iadd(s2, Vec::iload(p + i + 2 * kVec));
    s3 = Vec::iadd(s3, Vec::iload(p + i + 3 * kVec));
  }
  alignas(64) int32_t lanes[Vec::kLanes];
  Vec::istore(lanes, Vec::iadd(Vec::iadd(s0, s1), Vec::iadd(s2, s3)));
  double total = 0;
  for (int32_t lane : lanes) total += lane;
  return total;
}

}  // namespace
}  // namespace pycompress::peaks
