// FNV-1a: guards a header against damage and foreign buffers, not against an attacker.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycompress {

static inline uint64_t fnv1a(const void* data, size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(data);
  uint64_t hash = 1469598103934665603ull;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ byte[i]) * 1099511628211ull;
  return hash;
}

}  // namespace pycompress
