// A thread of execution with a stack of its own, resumed and left by hand. On x86-64 without a system call, and with no
// signal mask: a switch costs about as much as a function call. Elsewhere, or with PYCOMPRESS_UCONTEXT defined, by
// swapcontext.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) && !defined(PYCOMPRESS_UCONTEXT)
#define PYCOMPRESS_UCONTEXT
#endif
#if defined(PYCOMPRESS_UCONTEXT)
#include <ucontext.h>
#endif

// Whether AddressSanitizer is in the program; the build says so to the files of the emulator that are not instrumented.
#if !defined(PYCOMPRESS_ASAN)
#if defined(__SANITIZE_ADDRESS__)
#define PYCOMPRESS_ASAN 1
#else
#define PYCOMPRESS_ASAN 0
#endif
#endif

namespace emulator {

// Where a fiber, or the host's own thread, was left.
struct Fiber {
#if defined(PYCOMPRESS_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;  // its lowest address; of the host's thread known only to AddressSanitizer
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Makes `fiber` start with entry() when it is switched to; entry must not return.
void prepare_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)());

// Leaves `from`, the one that runs, and goes on with `to`; returns when somebody switches back.
void switch_fiber(Fiber& from, Fiber& to);
// The first statement of entry().
void enter_fiber(Fiber& fiber);
// `from` is not resumed.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);

// Stacks, kept for the next launch, each with a page below it that may not be touched: overrunning one stops the
// process instead of changing another fiber's variables.
class StackPool {
 public:
  static constexpr size_t kBytes = PYCOMPRESS_ASAN ? 256 * 1024 : 128 * 1024;

  StackPool() = default;
  ~StackPool();
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  char* get(size_t number);  // its lowest address
  void forget();             // the fibers on the stacks were abandoned

 private:
  std::vector<char*> slabs_;
};

}  // namespace emulator
