// Which instruction sets this build and this CPU have, and which one is in force.
#pragma once

#include <string>
#include <vector>

namespace pycompress {

// A level is a set of CPU features; a kernel names the level it was compiled for.
//   avx2       AVX2, FMA, F16C            avxvnni     avx2 + AVX-VNNI (256-bit integer dot product)
//   avx512     avx2 + F, BW, DQ, VL       avx512vnni  avx512 + AVX512-VNNI
enum class Isa : int { scalar = 0, avx2, avxvnni, avx512, avx512vnni };

const char* isa_name(Isa isa);

// Levels that both the CPU (and the operating system) and this build support, best first.
const std::vector<Isa>& available_isas();

// The level in force: PYCOMPRESS_ISA where it is set (read at every call, so that a test can change it), else the best.
// A weight is packed, and a kernel chosen for it, by the level of that moment.
// Throws ArgumentError for a name that is unknown or that the CPU lacks.
Isa selected_isa();

// True where code compiled for `needed` may run: this CPU and build have it, and PYCOMPRESS_ISA, where set, names a
// level that includes it.
bool isa_usable(Isa needed);

// True where the CPU has avx512 and bf16 conversions and dot products (AVX512-BF16).
bool cpu_has_bf16();

// True where the CPU has avx512vnni and the expansion of packed bytes (AVX512-VBMI2).
bool cpu_has_vbmi2();

// What the CPU says of itself, for reports: e.g. {"avx2", "fma", "avx512f", "avx512bf16", ...}.
std::vector<std::string> cpu_features();

}  // namespace pycompress
