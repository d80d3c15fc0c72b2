// 6x16 tile, AVX-VNNI: vpdpbusd on 256-bit registers, for CPUs that have it without AVX-512.
#include "int8_matmul/dot_avxvnni.h"
#include "int8_matmul/tile_engine.h"

namespace pycompress::int8_matmul {
const Kernel kAvxVnni{"int8_matmul_6x16_avxvnni", Isa::avxvnni, kQuads8, run_block<AvxVnni>,
                      block_scratch_bytes<AvxVnni>};

}  // namespace pycompress::int8_matmul
