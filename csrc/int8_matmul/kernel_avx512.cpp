// 6x64 tile, AVX-512 without VNNI: s8 weights widened to s16 as they are loaded, vpmaddwd.
#include "int8_matmul/dot_avx512.h"
#include "int8_matmul/tile_engine.h"

namespace pycompress::int8_matmul {
const Kernel kAvx512{"int8_matmul_6x64_avx512", Isa::avx512, kPairs16, run_block<Avx512>, block_scratch_bytes<Avx512>};

}  // namespace pycompress::int8_matmul
