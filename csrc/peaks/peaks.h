// What this machine can do, measured now: register-only multiply loops and a read loop, the peaks that a benchmark
// divides by. Each function runs on `threads` threads for about `seconds` and returns the best rate of several bursts.
#pragma once

#include <cstdint>
#include <string>

#include "common/isa.h"

namespace pycompress::peaks {

// Runs `rounds` of independent multiply-accumulates on registers and returns how many operations (2 a
// multiply-accumulate) that were.
using Burn = double (*)(int64_t rounds);

struct Loops {
  Isa isa;
  Burn int8, fp32, exp;                             // exp returns how many exponentials
  double (*read)(const void* data, int64_t bytes);  // returns a value that depends on every byte
};

extern const Loops kScalarLoops, kAvx2Loops, kAvxVnniLoops, kAvx512Loops, kAvx512VnniLoops;
double burn_bf16_avx512(int64_t rounds);

struct Rates {
  Isa isa;
  // bf16_gflops is 0 where there is no such instruction; exp_g is 1e9 f32 exponentials a second.
  double int8_gops, fp32_gflops, bf16_gflops, exp_g, read_gbps;
};

// buffer_bytes: what the read loop walks; take several times the last-level cache. 0 skips reading.
Rates measure(int threads, double seconds, int64_t buffer_bytes);

}  // namespace pycompress::peaks
