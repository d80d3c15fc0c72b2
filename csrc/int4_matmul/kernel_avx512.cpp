// A panel of 64 outputs: 1x64 to 6x32 where the weight is decoded in registers, else 6x64.
#include "int4_matmul/decode_avx512.h"
#include "int4_matmul/panel_engine.h"

namespace pycompress::int4_matmul {
const Kernel kAvx512{"int4_matmul_6x64_avx512", Isa::avx512, kUnits16, run_block<Avx512>, block_scratch_bytes<Avx512>};

}  // namespace pycompress::int4_matmul
