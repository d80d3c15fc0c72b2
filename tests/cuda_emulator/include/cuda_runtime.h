// Stands in for CUDA's header of this name: with it g++ builds the kernels of csrc as they are, to run on the CPU.
// See ../emulator.h for what the emulator does, and how a test uses it.
#pragma once

#define CUDART_VERSION 13000

#include "cuda_emulator/arithmetic.h"
#include "cuda_emulator/built_in.h"
#include "cuda_emulator/host.h"
#include "cuda_emulator/warp.h"
