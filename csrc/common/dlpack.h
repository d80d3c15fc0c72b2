// The part of DLPack's C structures (dlpack.h, version 0) that hands memory to torch, numpy and others without a copy.
#pragma once

#include <cstdint>

namespace pycompress::dlpack {

enum class Code : uint8_t { floating = 2, bfloat = 4 };

struct Device {
  int32_t type = 1;  // CPU
  int32_t id = 0;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);
};

}  // namespace pycompress::dlpack
