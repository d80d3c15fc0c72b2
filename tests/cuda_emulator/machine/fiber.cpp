#include "machine/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if PYCOMPRESS_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// ---- the switch -----------------------------------------------------------------------------------------------------

#if !defined(PYCOMPRESS_UCONTEXT)

// The registers that a called function must preserve go onto the stack that is left, and come from the one gone to.
extern "C" void pycompress_switch_stack(void** leave, void* go_to);
asm(R"(
.text
.p2align 4
.hidden pycompress_switch_stack
.globl pycompress_switch_stack
.type pycompress_switch_stack, @function
pycompress_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pycompress_switch_stack, . - pycompress_switch_stack
)");

static void switch_stack(Fiber& from, Fiber& to) { pycompress_switch_stack(&from.stack_pointer, to.stack_pointer); }

static void prepare_stack(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  // | 6 registers | entry | 0: where entry would return to |; a function begins with its stack at 8 modulo 16.
  auto* top = reinterpret_cast<uint64_t*>(stack + bytes);
  top -= 2;
  top[0] = reinterpret_cast<uint64_t>(entry);
  top[1] = 0;
  fiber.stack_pointer = top - 6;
  for (int i = 1; i <= 6; ++i) {
    top[-i] = 0;
  }
}

#else

static void switch_stack(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

static void prepare_stack(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

void prepare_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  fiber.fake_stack = nullptr;
  prepare_stack(fiber, stack, bytes, entry);
}

#if PYCOMPRESS_ASAN

// The fiber that was left last: the one switched to learns from it where the host's own stack lies.
static Fiber* left = nullptr;

static void arrived_at(Fiber& fiber) {
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack, &bytes);
  left->stack = stack;
  left->stack_bytes = bytes;
}

void switch_fiber(Fiber& from, Fiber& to) {
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  switch_stack(from, to);
  arrived_at(from);
}

void enter_fiber(Fiber& fiber) { arrived_at(fiber); }

void leave_fiber(Fiber& from, Fiber& to) {
  left = &from;
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
  switch_stack(from, to);
  std::abort();
}

#else

void switch_fiber(Fiber& from, Fiber& to) { switch_stack(from, to); }

void enter_fiber(Fiber&) {}

void leave_fiber(Fiber& from, Fiber& to) {
  switch_stack(from, to);
  std::abort();
}

#endif

// ---- stacks ---------------------------------------------------------------------------------------------------------

namespace {

constexpr size_t kPerSlab = 256;

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

size_t pitch() { return StackPool::kBytes + page_bytes(); }

}  // namespace

char* StackPool::get(size_t number) {
  while (slabs_.size() * kPerSlab <= number) {
    void* slab =
        mmap(nullptr, kPerSlab * pitch(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    slabs_.push_back(static_cast<char*>(slab));
    for (size_t i = 0; i < kPerSlab; ++i) {
      mprotect(slabs_.back() + i * pitch(), page_bytes(), PROT_NONE);
    }
  }
  return slabs_[number / kPerSlab] + number % kPerSlab * pitch() + page_bytes();
}

void StackPool::forget() {
#if PYCOMPRESS_ASAN
  for (char* slab : slabs_) {
    for (size_t i = 0; i < kPerSlab; ++i) {
      __asan_unpoison_memory_region(slab + i * pitch() + page_bytes(), kBytes);
    }
  }
#endif
}

StackPool::~StackPool() {
  forget();
  for (char* slab : slabs_) {
    munmap(slab, kPerSlab * pitch());
  }
}

}  // namespace emulator
