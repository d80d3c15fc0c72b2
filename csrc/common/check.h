// Argument checks. The message names the op, the value and what was expected; Python turns an ArgumentError into
// ValueError, an IndexError into IndexError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pycompress {

struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// An index outside a table.
struct IndexError : std::out_of_range {
  using std::out_of_range::out_of_range;
};

template <class T>
std::string show(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return std::to_string(value);
  } else {
    return std::string(value);
  }
}

// check(K > 0, "op: K must be positive, got K=", K)
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) throw ArgumentError((show(parts) + ...));
}

}  // namespace pycompress
