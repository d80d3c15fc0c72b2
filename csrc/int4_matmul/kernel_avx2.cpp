// A panel of 32 outputs: 1x32 to 6x16 where the weight is decoded in registers, else 6x16.
#include "int4_matmul/decode_avx2.h"
#include "int4_matmul/panel_engine.h"

namespace pycompress::int4_matmul {
const Kernel kAvx2{"int4_matmul_6x16_avx2", Isa::avx2, kUnits8, run_block<Avx2>, block_scratch_bytes<Avx2>};

}  // namespace pycompress::int4_matmul
