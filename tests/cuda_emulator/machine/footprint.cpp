#include "machine/footprint.h"

#include <algorithm>

namespace emulator {

void Footprint::start(uint32_t blocks, bool sectors, bool writers) {
  sectors_ = sectors;
  writers_ = writers && blocks > 1;
  blocks_ = blocks;
  read_sectors_ = written_sectors_ = 0;
  pages_.clear();
  clocks_.clear();
  sync_words_.clear();
  for (auto& cached : cached_) {
    cached = {};
  }
}

Footprint::Page& Footprint::page(uint64_t number) {
  auto& cached = cached_[number % kCached];
  if (cached.number != number) {
    cached.number = number;
    cached.page = &pages_[number];
  }
  return *cached.page;
}

void Footprint::mark(uint64_t address, size_t bytes, uint64_t (Page::*sectors)[kSectors / 64], uint64_t& count) {
  for (uint64_t sector = address / kSectorBytes; sector <= (address + bytes - 1) / kSectorBytes; ++sector) {
    uint64_t& word = (page(sector / kSectors).*sectors)[sector % kSectors / 64];
    const uint64_t bit = uint64_t{1} << sector % 64;
    count += (word & bit) == 0;
    word |= bit;
  }
}

// Whether `block` may touch a byte: nobody wrote it, or itself, or a block that it has heard of since.
bool Footprint::met(const Page& page, uint64_t offset, uint32_t block, uint32_t* writer) {
  const uint32_t other = page.writers->block[offset];
  if (other == 0 || other == block + 1) return false;
  const auto known = clocks_.find(block);
  if (known != clocks_.end() && known->second[other - 1] >= page.writers->epoch[offset]) return false;
  *writer = other - 1;
  return true;
}

bool Footprint::read(uint64_t address, size_t bytes, uint32_t block, uint32_t* writer) {
  if (bytes == 0) return true;
  if (sectors_) mark(address, bytes, &Page::read, read_sectors_);
  if (!writers_) return true;
  for (uint64_t at = address; at < address + bytes; ++at) {
    const Page& holder = page(at / kPageBytes);
    if (holder.writers == nullptr) {
      at |= kPageBytes - 1;  // nothing was written in this page
    } else if (met(holder, at % kPageBytes, block, writer)) {
      return false;
    }
  }
  return true;
}

bool Footprint::write(uint64_t address, size_t bytes, uint32_t block, uint32_t* writer) {
  if (sectors_) mark(address, bytes, &Page::written, written_sectors_);
  if (!writers_) return true;
  const uint32_t now = epoch(block);
  for (uint64_t at = address; at < address + bytes; ++at) {
    Page& holder = page(at / kPageBytes);
    if (holder.writers == nullptr) holder.writers = std::make_unique<Writers>();
    if (met(holder, at % kPageBytes, block, writer)) return false;
    holder.writers->block[at % kPageBytes] = block + 1;
    holder.writers->epoch[at % kPageBytes] = now;
  }
  return true;
}

// ---- vector clocks --------------------------------------------------------------------------------------------------

uint32_t Footprint::epoch(uint32_t block) const {
  const auto known = clocks_.find(block);
  return known == clocks_.end() ? 1 : known->second[block];
}

Footprint::Clock& Footprint::clock(uint32_t block) {
  Clock& clock = clocks_[block];
  if (clock.empty()) {
    clock.resize(blocks_, 0);
    clock[block] = 1;
  }
  return clock;
}

void Footprint::join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < from.size(); ++i) {
    to[i] = std::max(to[i], from[i]);
  }
}

void Footprint::acquire(uint64_t address, uint32_t block) {
  const auto word = sync_words_.find(address);
  if (writers_ && word != sync_words_.end()) join(clock(block), word->second);
}

void Footprint::acquire_release(uint64_t address, uint32_t block) {
  if (!writers_) return;
  Clock& word = sync_words_[address];
  word.resize(blocks_, 0);
  Clock& own = clock(block);
  join(own, word);
  join(word, own);
  ++own[block];
  // Who reads the word itself by a plain load has not synchronised.
  for (uint64_t at = address; at < address + 4; ++at) {
    Page& holder = page(at / kPageBytes);
    if (holder.writers == nullptr) holder.writers = std::make_unique<Writers>();
    holder.writers->block[at % kPageBytes] = block + 1;
    holder.writers->epoch[at % kPageBytes] = own[block] - 1;
  }
}

}  // namespace emulator
