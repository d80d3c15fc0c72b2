// The choice from an operation's table of kernels, best first; its last row is the scalar one, which runs everywhere.
#pragma once

#include <cstddef>

#include "common/isa.h"

namespace pycompress {

// The best one that may run here.
template <class Kernel, size_t kCount>
const Kernel& best_of(const Kernel* const (&table)[kCount]) {
  for (const Kernel* kernel : table) {
    if (isa_usable(kernel->isa)) return *kernel;
  }
  return *table[kCount - 1];
}

// The best one that may run here and reads weights packed in this layout. The scalar one reads all.
template <class Kernel, size_t kCount, class Layout>
const Kernel& best_for(const Kernel* const (&table)[kCount], const Layout& layout) {
  for (const Kernel* kernel : table) {
    if (kernel->layout.id == layout.id && isa_usable(kernel->isa)) return *kernel;
  }
  return *table[kCount - 1];
}

}  // namespace pycompress
