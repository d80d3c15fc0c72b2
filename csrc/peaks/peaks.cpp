#include "peaks/peaks.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace pycompress::peaks {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Makes the compiler believe that the value is used.
template <class T>
void keep(const T& value) {
  asm volatile("" ::"m"(value));
}

// Independent scalar chains; the compiler may vectorise them for the baseline instruction set.
template <class Number>
double burn_scalar(int64_t rounds) {
  Number sum[16] = {};
  for (int64_t i = 0; i < rounds; ++i) {
    for (int j = 0; j < 16; ++j) sum[j] = sum[j] * Number(3) + Number(1);
    asm volatile("" ::"r"(sum) : "memory");
  }
  keep(sum);
  return double(rounds) * 16 * 2;
}

double burn_exp_scalar(int64_t rounds) {
  float y = -0.7f;
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+m"(y));
    keep(std::exp2(y));
  }
  return double(rounds);
}

double read_scalar(const void* data, int64_t bytes) {
  const auto* p = static_cast<const uint64_t*>(data);
  uint64_t sum = 0;
  for (int64_t i = 0; i < bytes / 8; ++i) sum += p[i];
  return double(sum);
}

constexpr const Loops* kLoops[] = {
#ifdef PYCOMPRESS_HAVE_AVX512VNNI
    &kAvx512VnniLoops,
#endif
#ifdef PYCOMPRESS_HAVE_AVXVNNI
    &kAvxVnniLoops,
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    &kAvx512Loops,
#endif
#ifdef PYCOMPRESS_HAVE_AVX2
    &kAvx2Loops,
#endif
    &kScalarLoops,
};

const Loops& best_loops() {
  for (const Loops* loops : kLoops) {
    if (isa_usable(loops->isa)) return *loops;
  }
  return kScalarLoops;
}

Burn bf16_loop(const Loops& loops) {
#ifdef PYCOMPRESS_HAVE_AVX512BF16
  if (loops.isa == Isa::avx512vnni && cpu_has_bf16()) return burn_bf16_avx512;
#endif
  (void)loops;
  return nullptr;
}

// Best rate (units a second, in 1e9) over bursts that fill `seconds`; work(i) is one thread's burst.
template <class Work>
double best_rate(int threads, double seconds, const Work& work) {
  std::vector<double> done(size_t(threads), 0.0);
  double best = 0;
  for (const double stop = now() + seconds; now() < stop || best == 0;) {
    const double start = now();
    parallel(threads, [&](int i) { done[size_t(i)] = work(i); });
    const double elapsed = now() - start;
    double total = 0;
    for (double part : done) total += part;
    best = std::max(best, total / elapsed * 1e-9);
  }
  return best;
}

// Rounds that last about two milliseconds: long against a fork, short against another tenant's burst.
double burn_rate(Burn loop, int threads, double seconds) {
  int64_t rounds = 1024;
  for (;; rounds *= 2) {
    const double start = now();
    loop(rounds);
    if (now() - start > 0.002) break;
  }
  return best_rate(threads, seconds, [=](int) { return loop(rounds); });
}

double read_rate(const Loops& loops, int threads, double seconds, int64_t bytes) {
  bytes = bytes / (threads * 4096) * (threads * 4096);
  auto* data = static_cast<char*>(std::aligned_alloc(4096, size_t(bytes)));
  check(data != nullptr, "peaks: cannot allocate ", bytes, " bytes to read");
  advise_huge_pages(data, size_t(bytes));
  std::memset(data, 1, size_t(bytes));
  const int64_t share = bytes / threads;
  const double rate = best_rate(threads, seconds, [&](int i) {
    keep(loops.read(data + i * share, share));
    return double(share);
  });
  std::free(data);
  return rate;
}

}  // namespace

const Loops kScalarLoops{Isa::scalar, burn_scalar<uint32_t>, burn_scalar<float>, burn_exp_scalar, read_scalar};

Rates measure(int threads, double seconds, int64_t buffer_bytes) {
  check(threads >= 1, "peaks: threads=", threads, ", expected at least 1");
  check(seconds > 0 && seconds <= 60, "peaks: seconds=", seconds, ", expected more than 0 and at most 60");
  check(buffer_bytes == 0 || buffer_bytes >= threads * int64_t(4096), "peaks: buffer_bytes=", buffer_bytes,
        " is too small");
  const Loops& loops = best_loops();
  const Burn bf16 = bf16_loop(loops);
  Rates rates{loops.isa, burn_rate(loops.int8, threads, seconds), burn_rate(loops.fp32, threads, seconds),
              0,         burn_rate(loops.exp, threads, seconds),  0};
  if (bf16 != nullptr) rates.bf16_gflops = burn_rate(bf16, threads, seconds);
  if (buffer_bytes > 0) rates.read_gbps = read_rate(loops, threads, seconds, buffer_bytes);
  return rates;
}

}  // namespace pycompress::peaks
