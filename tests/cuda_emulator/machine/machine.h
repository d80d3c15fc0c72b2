// What the parts of the emulator share: the threads, warps and blocks that are under way, and who of them runs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"
#include "machine/fiber.h"
#include "machine/footprint.h"
#include "machine/random.h"

namespace emulator {

struct Block;
struct Warp;

enum class State { kReady, kRunning, kAtBarrier, kAtWarpOperation, kExited };

// A copy by cp.async, in the order of issue.
struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
  uint32_t group;  // of this thread's groups, the one that it belongs to; may not be committed yet
  bool arrived;
};

// An access by one thread, kept until it can be put together with those that the other lanes of its warp made.
struct AccessNote {
  const void* site;  // the instruction
  uint32_t epoch;    // how many barriers and warp operations the thread had passed
  uint16_t bytes;
  bool shared;
  uint64_t address;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  unsigned number = 0, lane = 0;  // in the block, in the warp
  State state = State::kReady;

  const Operation* operation = nullptr;  // kAtWarpOperation: which, with whom, on what
  unsigned mask = 0;
  void* operands = nullptr;
  Barrier barrier = Barrier::kPlain;  // kAtBarrier

  std::vector<Copy> copies;  // those not waited for yet
  uint32_t groups = 0;       // committed so far
  uint32_t epoch = 0;
  std::vector<AccessNote> notes;
};

struct Warp {
  Thread* threads = nullptr;
  unsigned lanes = 0;  // those that exist; the last warp of a block may have fewer than 32
  unsigned ready = 0;  // those that could run now
  unsigned waits = 0;  // those at a warp operation
  unsigned exited = 0;
  uint32_t priority = 0;  // lower first, where the block goes by priority
};

struct Block {
  uint3 index{};
  uint32_t number = 0;
  unsigned thread_count = 0;
  char* shared = nullptr;
  unsigned at_barrier = 0, exited = 0;
  int true_predicates = 0;  // of those at the barrier
  int barrier_result = 0;   // of the last one
  std::vector<Thread> threads;
  std::vector<Warp> warps;
};

struct Launch {
  const Kernel* kernel = nullptr;
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

// The one machine. All functions that follow are called by the thread that runs, on its fiber.
class Machine {
 public:
  // Runs a kernel to its end; by the host.
  void run(const Launch& launch, const Options& options, Counters& counters);

  Thread& current() { return *current_; }
  bool is_running() const { return current_ != nullptr; }
  const Launch& launch() const { return *launch_; }
  const Options& options() const { return *options_; }
  Random& random() { return random_; }
  Counters& counters() { return *counters_; }
  Footprint& footprint() { return footprint_; }

  void make_ready(Thread& thread);
  // The current thread's state is not kRunning any more: others run until it is their turn to let it go on.
  void let_others_run();
  // At an access to memory: as likely as the options say, others run first.
  void may_yield() {
    if (random_.next32() < yield_below_) yield();
  }
  void yield();
  // Something happened that another thread or block may have waited for.
  void progress() { idle_pauses_ = 0; }
  void pause();

  // Throws a Fault that ends the launch: `what`, and which kernel, block and thread it happened in.
  [[noreturn]] void fault(const std::string& what);

 private:
  static void thread_main();
  void run_blocks(size_t count);  // blocks_[0] .. [count - 1], at the same time
  void start_block(size_t slot, uint32_t number, size_t first_stack);
  void finish_block(Block& block);
  Thread* next();
  Fiber& resumed(Thread& thread);
  void check_exit();
  [[noreturn]] void exit_thread();
  void abandon();

  const Launch* launch_ = nullptr;
  const Options* options_ = nullptr;
  Counters* counters_ = nullptr;
  Random random_;
  uint32_t yield_below_ = 0;
  bool by_priority_ = false;
  int idle_pauses_ = 0;

  Fiber host_;
  StackPool stacks_;
  std::vector<Block> blocks_;  // kept for the next launch
  std::vector<Warp*> ready_;
  Thread* current_ = nullptr;
  std::string fault_;
  Footprint footprint_;
};

Machine& machine();

// ---- what is told of threads (report.cpp) ---------------------------------------------------------------------------

std::string name(uint3 index);  // "(1,0,0)"
std::string name(const Thread& thread);
// Where the threads of all blocks are, neighbours at the same place together.
std::string whereabouts(const std::vector<Block>& blocks, size_t count);
// The function's name in the file that holds it; "?" where that was stripped.
std::string kernel_name(const void* function);

// ---- memory (memory.cpp, copies.cpp) --------------------------------------------------------------------------------

struct Region {
  const char* start;
  size_t bytes;
  std::string name;
  Access access;
};
// The registered buffer that holds the address, or nullptr.
const Region* region_of(const void* address);
void check_bounds(const void* address, size_t bytes, bool write, const char* what);
// The address as a person finds it: "byte 24 of x (96 bytes)".
std::string describe(const void* address);

char* allocate_shared(size_t bytes);  // with a guard behind it, where no sanitizer watches
void poison_shared(char* shared, size_t bytes, Random& random);
void check_shared_guard(const Block& block);
void free_shared(char* shared);
bool is_shared(const void* address, size_t bytes);  // within the current block's

void finish_copies(Thread& thread);  // at the thread's exit

// ---- counting (counters.cpp) ----------------------------------------------------------------------------------------

void note_access(const void* site, const void* address, size_t bytes, bool shared);
// Puts the notes of a warp's lanes together, counts them and forgets them.
void count_notes(Warp& warp, Counters& counters);
// Extra passes that `count` accesses of `bytes` each, made at once, need for the 32 banks.
unsigned bank_conflicts(const uint64_t* addresses, int count, int bytes);

}  // namespace emulator
