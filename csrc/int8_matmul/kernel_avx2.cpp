// 6x16 tile, AVX2: s8 weights widened to s16 as they are loaded, vpmaddwd. 12 accumulators, 2 weights, 1 broadcast.
#include "int8_matmul/dot_avx2.h"
#include "int8_matmul/tile_engine.h"

namespace pycompress::int8_matmul {
const Kernel kAvx2{"int8_matmul_6x16_avx2", Isa::avx2, kPairs8, run_block<Avx2>, block_scratch_bytes<Avx2>};

}  // namespace pycompress::int8_matmul
