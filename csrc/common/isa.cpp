#include "common/isa.h"

#include <algorithm>
#include <cstdlib>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#include "common/check.h"

namespace pycompress {
namespace {

constexpr Isa kBestFirst[] = {Isa::avx512vnni, Isa::avxvnni, Isa::avx512, Isa::avx2, Isa::scalar};

#if defined(__x86_64__) || defined(__i386__)

// CPUID is asked directly for what GCC's __builtin_cpu_supports has no name for. The operating system's support
// for the wide registers is part of what "avx2" and "avx512f" check, and each level below requires one of those.

bool leaf7_1_eax(int bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && ((a >> bit) & 1);
}

bool cpu_has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && ((c >> 29) & 1);
}

bool cpu_has(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2: return avx2;
    case Isa::avxvnni: return avx2 && leaf7_1_eax(4);
    case Isa::avx512: return avx512;
    case Isa::avx512vnni: return avx512 && __builtin_cpu_supports("avx512vnni");
  }
  return false;
}

std::vector<std::string> read_cpu_features() {
  std::vector<std::string> names;
  __builtin_cpu_init();
#define PYCOMPRESS_FEATURE(name) \
  if (__builtin_cpu_supports(name)) names.push_back(name)
  PYCOMPRESS_FEATURE("sse4.2");
  PYCOMPRESS_FEATURE("avx");
  PYCOMPRESS_FEATURE("avx2");
  PYCOMPRESS_FEATURE("fma");
  PYCOMPRESS_FEATURE("avx512f");
  PYCOMPRESS_FEATURE("avx512bw");
  PYCOMPRESS_FEATURE("avx512dq");
  PYCOMPRESS_FEATURE("avx512vl");
  PYCOMPRESS_FEATURE("avx512vnni");
#undef PYCOMPRESS_FEATURE
  if (cpu_has_f16c()) names.push_back("f16c");
  if (cpu_has(Isa::avxvnni)) names.push_back("avxvnni");
  if (cpu_has_bf16()) names.push_back("avx512bf16");
  if (cpu_has_vbmi2()) names.push_back("avx512vbmi2");
  return names;
}

#else

bool cpu_has(Isa isa) { return isa == Isa::scalar; }
std::vector<std::string> read_cpu_features() { return {}; }

#endif

// PYCOMPRESS_ISA, or null where it is unset or empty.
const char* forced_name() {
  const char* name = std::getenv("PYCOMPRESS_ISA");
  return name == nullptr || *name == '\0' ? nullptr : name;
}

bool built_with(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#ifdef PYCOMPRESS_HAVE_AVX2
    case Isa::avx2: return true;
#endif
#ifdef PYCOMPRESS_HAVE_AVXVNNI
    case Isa::avxvnni: return true;
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    case Isa::avx512: return true;
#endif
#ifdef PYCOMPRESS_HAVE_AVX512VNNI
    case Isa::avx512vnni: return true;
#endif
    default: return false;
  }
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avxvnni: return "avxvnni";
    case Isa::avx512: return "avx512";
    case Isa::avx512vnni: return "avx512vnni";
    default: return "scalar";
  }
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found;
    for (Isa isa : kBestFirst) {
      if (built_with(isa) && cpu_has(isa)) found.push_back(isa);
    }
    return found;
  }();
  return isas;
}

Isa selected_isa() {
  const char* wanted = forced_name();
  if (wanted == nullptr) return available_isas().front();
  std::string have;
  for (Isa isa : available_isas()) {
    if (std::string(wanted) == isa_name(isa)) return isa;
    have += (have.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  for (Isa isa : kBestFirst) {
    check(std::string(wanted) != isa_name(isa), "PYCOMPRESS_ISA=", wanted,
          ": this CPU or this build lacks it; available here: ", have);
  }
  throw ArgumentError("PYCOMPRESS_ISA=" + std::string(wanted) +
                      ": unknown instruction set; expected one of scalar, avx2, avxvnni, avx512, avx512vnni");
}

bool isa_usable(Isa needed) {
  const auto& available = available_isas();
  if (std::find(available.begin(), available.end(), needed) == available.end()) return false;
  const Isa forced = selected_isa();
  if (forced_name() == nullptr || needed == Isa::scalar || needed == forced) return true;
  switch (forced) {
    case Isa::avxvnni: return needed == Isa::avx2;
    case Isa::avx512: return needed == Isa::avx2;
    case Isa::avx512vnni: return needed == Isa::avx2 || needed == Isa::avx512;
    default: return false;
  }
}

bool cpu_has_bf16() {
#if defined(__x86_64__) || defined(__i386__)
  static const bool has = cpu_has(Isa::avx512) && leaf7_1_eax(5);
  return has;
#else
  return false;
#endif
}

bool cpu_has_vbmi2() {
#if defined(__x86_64__) || defined(__i386__)
  static const bool has =
      cpu_has(Isa::avx512vnni) && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  return has;
#else
  return false;
#endif
}

std::vector<std::string> cpu_features() { return read_cpu_features(); }

}  // namespace pycompress
