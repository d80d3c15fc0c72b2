// What the threads of a warp or of a block do together. A lane that comes to such an operation waits until every lane
// named in the mask has come to the same one; then it is carried out once, for all of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

// The operands of the lanes that came, each a struct on its own thread's stack; of the others nullptr.
struct Lanes {
  void* operands[32];
  unsigned mask;

  template <class Operands>
  Operands& of(int lane) const {
    return *static_cast<Operands*>(operands[lane]);
  }
};

// A kind of operation; told apart by its address.
struct Operation {
  const char* name;
  void (*execute)(const Lanes& lanes);  // reads the operands, and writes the results among them
};

// Returns when it has been carried out. A lane that has exited, or that waits at another operation for this one, is a
// fault.
void together(const Operation& operation, unsigned mask, void* operands);

unsigned lane_number();

// ---- shuffles and votes ---------------------------------------------------------------------------------------------

struct Shuffle {
  uint64_t value;
  unsigned from;  // the lane whose value this one gets
};
extern const Operation kShuffle, kShuffleXor, kShuffleUp, kShuffleDown;

template <class T>
T shuffle(const Operation& operation, unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "what a shuffle can move");
  Shuffle shuffle{0, from};
  std::memcpy(&shuffle.value, &value, sizeof(T));
  together(operation, mask, &shuffle);
  std::memcpy(&value, &shuffle.value, sizeof(T));
  return value;
}

struct Vote {
  bool predicate;
  unsigned result;
};
extern const Operation kBallot, kAny, kAll, kSyncWarp, kReduceAdd, kReduceMin, kReduceMax;

inline unsigned vote(const Operation& operation, unsigned mask, bool predicate) {
  Vote vote{predicate, 0};
  together(operation, mask, &vote);
  return vote.result;
}

struct Reduce {
  int64_t value;
};

// ---- the block ------------------------------------------------------------------------------------------------------

enum class Barrier { kPlain, kOr, kAnd, kCount };

// Returns when every thread of the block has come: for kOr, kAnd, kCount what all of them say.
int barrier(Barrier kind, bool predicate);

// Lets others run; reported as a fault where nothing but such pauses happens any more.
void pause();

}  // namespace emulator

// ---- under CUDA's names; segments of `width` lanes, a power of two --------------------------------------------------

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned inside = static_cast<unsigned>(width) - 1;
  const unsigned from = (emulator::lane_number() & ~inside) | (static_cast<unsigned>(source) & inside);
  return emulator::shuffle(emulator::kShuffle, mask, value, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = emulator::lane_number(), from = lane ^ static_cast<unsigned>(lane_mask);
  const unsigned last = lane | (static_cast<unsigned>(width) - 1);
  return emulator::shuffle(emulator::kShuffleXor, mask, value, from <= last ? from : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::lane_number(), inside = lane & (static_cast<unsigned>(width) - 1);
  return emulator::shuffle(emulator::kShuffleUp, mask, value, delta <= inside ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::lane_number(), last = static_cast<unsigned>(width) - 1;
  const unsigned inside = lane & last;
  return emulator::shuffle(emulator::kShuffleDown, mask, value, delta <= last - inside ? lane + delta : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::vote(emulator::kBallot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulator::vote(emulator::kAny, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulator::vote(emulator::kAll, mask, predicate != 0));
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::vote(emulator::kSyncWarp, mask, false); }

template <class T>
T __reduce_add_sync(unsigned mask, T value) {  // wraps around
  emulator::Reduce reduce{value};
  emulator::together(emulator::kReduceAdd, mask, &reduce);
  return static_cast<T>(reduce.value);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  emulator::Reduce reduce{value};
  emulator::together(emulator::kReduceMin, mask, &reduce);
  return static_cast<T>(reduce.value);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  emulator::Reduce reduce{value};
  emulator::together(emulator::kReduceMax, mask, &reduce);
  return static_cast<T>(reduce.value);
}

inline void __syncthreads() { emulator::barrier(emulator::Barrier::kPlain, false); }
inline int __syncthreads_or(int predicate) { return emulator::barrier(emulator::Barrier::kOr, predicate != 0); }
inline int __syncthreads_and(int predicate) { return emulator::barrier(emulator::Barrier::kAnd, predicate != 0); }
inline int __syncthreads_count(int predicate) { return emulator::barrier(emulator::Barrier::kCount, predicate != 0); }
inline void __nanosleep(unsigned) { emulator::pause(); }
