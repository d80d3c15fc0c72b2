// Dividing work into nearly equal parts.
#pragma once

#include <cstdint>

namespace pycompress {

struct Range {
  int64_t begin, end;
};

// Part `i` of `parts` nearly equal parts of [0, n); the larger ones come first.
static inline Range split(int64_t n, int64_t parts, int64_t i) {
  const int64_t base = n / parts, extra = n % parts;
  const int64_t begin = i * base + (i < extra ? i : extra);
  return {begin, begin + base + (i < extra ? 1 : 0)};
}

}  // namespace pycompress
