// Counting what a warp's lanes do at the same time: sectors of global memory, banks of shared memory.
#include <algorithm>
#include <tuple>

#include "machine/machine.h"

namespace emulator {

Counters& Counters::operator+=(const Counters& other) {
  loads += other.loads;
  stores += other.stores;
  copies += other.copies;
  loaded_bytes += other.loaded_bytes;
  stored_bytes += other.stored_bytes;
  copied_bytes += other.copied_bytes;
  read_sectors += other.read_sectors;
  written_sectors += other.written_sectors;
  requests += other.requests;
  request_sectors += other.request_sectors;
  matrix_phases += other.matrix_phases;
  matrix_conflicts += other.matrix_conflicts;
  shared_phases += other.shared_phases;
  shared_conflicts += other.shared_conflicts;
  return *this;
}

// 32 banks of 4 bytes; a bank gives one word a pass, to all who want that word.
unsigned bank_conflicts(const uint64_t* addresses, int count, int bytes) {
  uint64_t words[32 * 4];
  int size = 0;
  for (int i = 0; i < count; ++i) {
    for (uint64_t word = addresses[i] / 4; word <= (addresses[i] + static_cast<uint64_t>(bytes) - 1) / 4; ++word) {
      words[size++] = word;
    }
  }
  std::sort(words, words + size);
  size = static_cast<int>(std::unique(words, words + size) - words);
  unsigned passes[32] = {};
  for (int i = 0; i < size; ++i) {
    ++passes[words[i] % 32];
  }
  return size == 0 ? 0 : *std::max_element(passes, passes + 32) - 1;
}

void note_access(const void* site, const void* address, size_t bytes, bool shared) {
  Thread& thread = machine().current();
  thread.notes.push_back(
      {site, thread.epoch, static_cast<uint16_t>(bytes), shared, reinterpret_cast<uint64_t>(address)});
}

namespace {

// An access as it is put together with those of the other lanes: the same instruction, for the same time since the last
// barrier or warp operation.
struct Key {
  uint32_t epoch;
  const void* site;
  bool shared;
  uint32_t occurrence;
  uint32_t lane;
  uint16_t bytes;
  uint64_t address;

  bool operator<(const Key& other) const {
    return std::tie(epoch, site, shared, occurrence, lane) <
           std::tie(other.epoch, other.site, other.shared, other.occurrence, other.lane);
  }
  bool together_with(const Key& other) const {
    return epoch == other.epoch && site == other.site && shared == other.shared && occurrence == other.occurrence;
  }
};

void count_request(const Key* first, const Key* end, Counters& counters) {
  uint64_t sectors[32 * 2];
  int size = 0;
  for (const Key* key = first; key < end; ++key) {
    sectors[size++] = key->address / 32;
    sectors[size++] = (key->address + key->bytes - 1) / 32;
  }
  std::sort(sectors, sectors + size);
  ++counters.requests;
  counters.request_sectors += static_cast<uint64_t>(std::unique(sectors, sectors + size) - sectors);
}

// 16 bytes a lane go 8 lanes at a time, 8 bytes 16 lanes, less than that all 32.
void count_banks(const Key* first, const Key* end, Counters& counters) {
  const uint32_t lanes = first->bytes == 16 ? 8 : first->bytes == 8 ? 16 : 32;
  while (first < end) {
    uint64_t addresses[32];
    int size = 0;
    const Key* key = first;
    for (; key < end && key->lane / lanes == first->lane / lanes; ++key) {
      addresses[size++] = key->address;
    }
    ++counters.shared_phases;
    counters.shared_conflicts += bank_conflicts(addresses, size, first->bytes);
    first = key;
  }
}

// Whether all lanes made the same accesses in the same order: what kernels do nearly everywhere.
bool in_step(const Warp& warp) {
  const std::vector<AccessNote>& first = warp.threads[0].notes;
  for (unsigned lanes = warp.lanes; lanes != 0; lanes &= lanes - 1) {
    const std::vector<AccessNote>& notes = warp.threads[__builtin_ctz(lanes)].notes;
    if (notes.size() != first.size()) return false;
    for (size_t i = 0; i < notes.size(); ++i) {
      if (notes[i].site != first[i].site || notes[i].epoch != first[i].epoch || notes[i].shared != first[i].shared) {
        return false;
      }
    }
  }
  return true;
}

void count_together(const Key* first, const Key* end, Counters& counters) {
  (first->shared ? count_banks : count_request)(first, end, counters);
}

Key key_of(const AccessNote& note, size_t occurrence, const Thread& thread) {
  return {note.epoch, note.site, note.shared, static_cast<uint32_t>(occurrence), thread.lane, note.bytes, note.address};
}

void count_in_step(const Warp& warp, Counters& counters) {
  for (size_t i = 0; i < warp.threads[0].notes.size(); ++i) {
    Key keys[32];
    int count = 0;
    for (unsigned lanes = warp.lanes; lanes != 0; lanes &= lanes - 1) {
      const Thread& thread = warp.threads[__builtin_ctz(lanes)];
      keys[count++] = key_of(thread.notes[i], 0, thread);
    }
    count_together(keys, keys + count, counters);
  }
}

void count_by_site(const Warp& warp, Counters& counters) {
  static std::vector<Key> keys;  // kept: this runs often
  keys.clear();
  for (unsigned lanes = warp.lanes; lanes != 0; lanes &= lanes - 1) {
    const Thread& thread = warp.threads[__builtin_ctz(lanes)];
    for (const AccessNote& note : thread.notes) {
      keys.push_back(key_of(note, keys.size(), thread));
    }
  }
  // First each lane's own in order, so that its first, second, ... at an instruction are numbered.
  std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
    return std::tie(a.epoch, a.site, a.shared, a.lane, a.occurrence) <
           std::tie(b.epoch, b.site, b.shared, b.lane, b.occurrence);
  });
  uint32_t occurrence = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const bool again = i > 0 && keys[i].epoch == keys[i - 1].epoch && keys[i].site == keys[i - 1].site &&
                       keys[i].shared == keys[i - 1].shared && keys[i].lane == keys[i - 1].lane;
    occurrence = again ? occurrence + 1 : 0;
    keys[i].occurrence = occurrence;
  }
  std::sort(keys.begin(), keys.end());
  for (size_t first = 0, end; first < keys.size(); first = end) {
    for (end = first + 1; end < keys.size() && keys[end].together_with(keys[first]); ++end) {}
    count_together(keys.data() + first, keys.data() + end, counters);
  }
}

}  // namespace

void count_notes(Warp& warp, Counters& counters) {
  (in_step(warp) ? count_in_step : count_by_site)(warp, counters);
  for (unsigned lanes = warp.lanes; lanes != 0; lanes &= lanes - 1) {
    warp.threads[__builtin_ctz(lanes)].notes.clear();
  }
}

}  // namespace emulator
