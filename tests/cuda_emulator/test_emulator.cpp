// The emulator's own tests. `make cpp-test` runs them, as all C++ tests, under AddressSanitizer and UBSan.
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "check.h"
#include "faults.h"

namespace emulator_tests {

namespace {

constexpr int kSeeds = 40, kSeedsApart = 8;  // AddressSanitizer takes long over each of its reports

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif

enum class Outcome { kRight, kWrongResult, kFault, kDied };

struct Seen {
  Outcome outcome;
  std::string fault;
};

Seen run_case(const faults::Case& it, bool planted, uint64_t seed) {
  emulator::Options options;
  options.seed = seed;
  // A copy never waited for is a fault by itself, which would hide whether its effect is seen.
  options.check_copies = std::string(it.fault) == "copies nobody waits for";
  Seen seen{Outcome::kRight, {}};
  try {
    emulator::run(options, [&] { seen.outcome = it.run(planted) ? Outcome::kRight : Outcome::kWrongResult; });
  } catch (const emulator::Fault& fault) {
    seen = {Outcome::kFault, fault.what()};
  }
  return seen;
}

// In a process of its own, which AddressSanitizer may stop.
Seen run_apart(const faults::Case& it, uint64_t seed) {
  constexpr int kSaid = 100;  // an exit status below this is not from here
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(9);
    _exit(kSaid + static_cast<int>(run_case(it, true, seed).outcome));
  }
  int status = 0;
  waitpid(child, &status, 0);
  const bool said = WIFEXITED(status) && WEXITSTATUS(status) >= kSaid;
  return {said ? static_cast<Outcome>(WEXITSTATUS(status) - kSaid) : Outcome::kDied, {}};
}

void test_fault(const faults::Case& it) {
  const bool apart = kAsan && it.death == faults::Death::kUnderAsan;
  const int seeds = apart ? kSeedsApart : kSeeds;
  int caught[4] = {}, first = -1;
  std::string words;
  for (int seed = 0; seed < seeds; ++seed) {
    const Seen good = run_case(it, false, static_cast<uint64_t>(seed));
    if (good.outcome != Outcome::kRight) {
      std::printf("%s: its correct twin fails at seed %d %s\n", it.fault, seed, good.fault.c_str());
      ++failures;
    }
    const Seen seen =
        apart ? run_apart(it, static_cast<uint64_t>(seed)) : run_case(it, true, static_cast<uint64_t>(seed));
    ++caught[static_cast<int>(seen.outcome)];
    if (seen.outcome != Outcome::kRight && first < 0) first = seed;
    if (words.empty()) words = seen.fault;
  }
  const int all = seeds - caught[static_cast<int>(Outcome::kRight)];
  std::printf("%-46s %2d of %d, first %2d   %2d wrong, %2d fault, %2d sanitizer\n", it.fault, all, seeds, first,
              caught[static_cast<int>(Outcome::kWrongResult)], caught[static_cast<int>(Outcome::kFault)],
              caught[static_cast<int>(Outcome::kDied)]);
  if (!words.empty()) std::printf("    %s\n", words.c_str());
  CHECK(all > 0);
}

}  // namespace

void test_faults() {
  std::printf("%-46s caught at seeds       how\n", "planted fault");
  size_t count = 0;
  const int before = failures;
  for (const auto* cases : {&faults::synchronisation(), &faults::memory()}) {
    for (const faults::Case& it : *cases) {
      test_fault(it);
      ++count;
    }
  }
  if (failures == before) std::printf("planted faults caught: all %zu\n", count);
}

}  // namespace emulator_tests

int main() {
  emulator_tests::test_arithmetic();
  emulator_tests::test_tensor();
  emulator_tests::test_warp();
  emulator_tests::test_runtime();
  emulator_tests::test_counters();
  emulator_tests::test_faults();
  std::printf(emulator_tests::failures == 0 ? "all passed\n" : "%d failures\n", emulator_tests::failures);
  return emulator_tests::failures == 0 ? 0 : 1;
}
