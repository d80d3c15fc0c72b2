// A small random generator (splitmix64): every draw of the emulator comes from one of these, so that a seed says all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}

  uint64_t next64() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint32_t next32() { return static_cast<uint32_t>(next64() >> 32); }
  // 0 .. count - 1
  size_t below(size_t count) { return static_cast<size_t>(uint64_t{next32()} * count >> 32); }
  bool coin() { return (next32() & 1) != 0; }

 private:
  uint64_t state_;
};

}  // namespace emulator
