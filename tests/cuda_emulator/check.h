// What the emulator's own tests say: a line for each thing that is not so.
#pragma once

#include <cstdio>

namespace emulator_tests {

inline int failures = 0;

inline void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::printf("%s:%d: not so: %s\n", file, line, what);
  ++failures;
}

#define CHECK(condition) emulator_tests::check(condition, #condition, __FILE__, __LINE__)

void test_arithmetic();  // the functions of CUDA, the 16-bit formats
void test_tensor();      // ldmatrix and mma, by formulas of their own
void test_warp();        // shuffles, votes, barriers with a result
void test_runtime();     // launches: errors, records, devices
void test_counters();    // bytes, sectors, bank conflicts
void test_faults();      // faults.h: all caught

}  // namespace emulator_tests
