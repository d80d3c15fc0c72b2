// Faults planted in small kernels, each with the same kernel without it: what the emulator is tested with.
#pragma once

#include <vector>

#include "common/cuda/device.h"
#include "common/cuda/launch.h"
#include "emulator.h"

namespace faults {

namespace cuda = pycompress::cuda;

enum class Death { kNever, kUnderAsan };  // whether the planted fault stops the process under AddressSanitizer

struct Case {
  const char* fault;
  // Launches the kernel, with the fault or without it, and says whether its result is right.
  bool (*run)(bool planted);
  Death death = Death::kNever;
};

const std::vector<Case>& synchronisation();  // faults.cu: barriers, copies, lanes
const std::vector<Case>& memory();           // faults_memory.cu: bounds, alignment, blocks, fragments

// A kernel is a template over whether it has the fault.
template <class Params>
void launch(bool planted, void (*good)(Params), void (*bad)(Params), const Params& params, const cuda::Shape& shape) {
  cuda::launch("faults", "kernel", planted ? bad : good, cuda::Place{}, shape, params);
}

// 0, 1, 2, ... but never the same over many elements
inline float value_at(size_t i) { return static_cast<float>((i * 7 + i / 64) % 1009); }

inline std::vector<float> values(size_t count) {
  std::vector<float> all(count);
  for (size_t i = 0; i < count; ++i) {
    all[i] = value_at(i);
  }
  return all;
}

}  // namespace faults
