// Making and opening the index form; see index.h. Not for files built for an instruction set: it needs std::vector.
#pragma once

#include <vector>

#include "sparse_linear/index.h"

namespace pycompress::sparse_linear {

// The index form, to be kept 64-byte aligned; empty where there is none: K beyond kMaxUnits units, an s8 row of more
// than kMaxRowCount weights.
std::vector<char> pack_index(const IndexLayout& layout, const Bitmap& weight);

// Checks the header against the buffer: magic, version, checksum, layout, sizes.
IndexWeight open_index(const void* data, int64_t bytes);

}  // namespace pycompress::sparse_linear
