// 6x64 tile, AVX-512 VNNI: 24 accumulators, 4 weight registers, 1 broadcast; 64 x 4 products a vpdpbusd.
#include "int8_matmul/dot_avx512vnni.h"
#include "int8_matmul/tile_engine.h"

namespace pycompress::int8_matmul {
const Kernel kAvx512Vnni{"int8_matmul_6x64_avx512vnni", Isa::avx512vnni, kQuads16, run_block<Avx512Vnni>,
                         block_scratch_bytes<Avx512Vnni>};

}  // namespace pycompress::int8_matmul
