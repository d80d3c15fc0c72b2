// Argument checks. The message names the op, the value and what was expected; Python turns it into ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pycompress {

struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
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
