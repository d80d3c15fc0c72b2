// ldmatrix and mma: by the fragment layouts of the PTX manual, all 32 lanes together.
#pragma once

#include <cstdint>

namespace emulator {

// r[i] of four matrices; `shared` as each lane gave it.
void load_matrices(uint32_t* r, const void* shared);

enum class Multiply { kS8, kSparseS8, kSparseBf16, kSparseF16 };

// d += a b; d is four int32 or float, a four registers, b two, or four where a is sparse.
void multiply(Multiply kind, void* d, const uint32_t* a, const uint32_t* b, uint32_t meta);

// 2^x, up to 2 units in the last place off, always the same for an x: nobody may rely on more.
float exp2_fast(float x);

}  // namespace emulator
