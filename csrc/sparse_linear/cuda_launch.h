// Host side that both CUDA forms of the pruned linear layer share: checks, and x quantised into the workspace.
#pragma once

#include "sparse_linear/cuda.h"

namespace pycompress::sparse_linear {

// Everything but the weight's own pointers. Throws ArgumentError.
void check_cuda_args(const CudaArgs& args, WeightType type, int64_t n, int64_t k, int64_t workspace_bytes);
void check_aligned(const void* pointer, int alignment, const char* what);

// x in bytes, as int8_matmul's dynamic mode makes them: rows `stride` apart, zeros from K on.
struct Quantized {
  const int8_t* q;
  const float* scale;
  int64_t stride;
};
int64_t quantized_bytes(const LinearArgs& args);

// Starts the kernel that quantises x into args.workspace; the device must be current.
Quantized quantize(const CudaArgs& args, const cuda::Place& place);

}  // namespace pycompress::sparse_linear
