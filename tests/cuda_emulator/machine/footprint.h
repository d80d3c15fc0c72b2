// Which global memory a launch has touched: sectors of 32 bytes for the counters, and for every byte the block that
// wrote it, to find blocks that meet there without having synchronised.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace emulator {

class Footprint {
 public:
  // Forgets everything. `blocks` of the grid; sectors and writers: what is to be kept.
  void start(uint32_t blocks, bool sectors, bool writers);

  // Notes the access. False where another block has written there and `block` cannot know it: `writer` is that block.
  bool read(uint64_t address, size_t bytes, uint32_t block, uint32_t* writer);
  bool write(uint64_t address, size_t bytes, uint32_t block, uint32_t* writer);

  // Synchronisation of blocks through the word at an address: what a block knows of the others passes through it.
  void acquire(uint64_t address, uint32_t block);
  void acquire_release(uint64_t address, uint32_t block);

  uint64_t read_sectors() const { return read_sectors_; }
  uint64_t written_sectors() const { return written_sectors_; }

 private:
  static constexpr uint64_t kPageBytes = 4096, kSectorBytes = 32, kSectors = kPageBytes / kSectorBytes;
  static constexpr size_t kCached = 64;

  struct Writers {
    uint32_t block[kPageBytes] = {};  // + 1; 0: nobody
    uint32_t epoch[kPageBytes] = {};  // of the writing block
  };
  struct Page {
    uint64_t read[kSectors / 64] = {}, written[kSectors / 64] = {};
    std::unique_ptr<Writers> writers;
  };
  // For every block its latest epoch that is known; a block's own epoch ends with each release.
  using Clock = std::vector<uint32_t>;

  Page& page(uint64_t number);
  void mark(uint64_t address, size_t bytes, uint64_t (Page::*sectors)[kSectors / 64], uint64_t& count);
  bool met(const Page& page, uint64_t offset, uint32_t block, uint32_t* writer);
  uint32_t epoch(uint32_t block) const;
  Clock& clock(uint32_t block);
  static void join(Clock& to, const Clock& from);

  bool sectors_ = false, writers_ = false;
  uint32_t blocks_ = 0;
  uint64_t read_sectors_ = 0, written_sectors_ = 0;
  std::unordered_map<uint64_t, Page> pages_;  // of this map the elements stay where they are
  struct {
    uint64_t number = ~uint64_t{0};
    Page* page = nullptr;
  } cached_[kCached];
  std::unordered_map<uint32_t, Clock> clocks_;  // of the blocks that have synchronised
  std::unordered_map<uint64_t, Clock> sync_words_;
};

}  // namespace emulator
