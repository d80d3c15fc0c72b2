// Bitmap to index form: groups of rows, lists by pattern.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/memory.h"
#include "sparse_linear/index_pack.h"

namespace pycompress::sparse_linear {
namespace {

constexpr const IndexLayout* kLayouts[] = {&kFloats1, &kFloats2, &kFloats4, &kHalves1, &kHalves2, &kHalves4,
                                           &kQuads1,  &kPairs2,  &kQuads2,  &kPairs4,  &kQuads4};

int64_t strip_count(int64_t n) { return (n + kStrip - 1) / kStrip; }
int popcount(unsigned bits) { return __builtin_popcount(bits); }

// FNV-1a. Guards against a damaged or foreign buffer, not against an attacker.
uint64_t header_checksum(const IndexHeader& header) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&header);
  uint64_t hash = 1469598103934665603ull;
  for (size_t i = 0; i < offsetof(IndexHeader, checksum); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  return hash;
}

// ---- the cost of a grouping ------------------------------------------------------------------------------------

// Cycles for 64 tokens, measured on a Zen 5 server; only the ratios matter.
constexpr double kLoopCost = 12;                              // a list: its last iteration is mispredicted
constexpr double kUnitCost[5] = {0, 4.6, 5.4, 6.9, 9.0};      // a unit that 1..4 rows want: loads bound the first
constexpr double kGatherCost[5] = {0, 8.0, 9.5, 11.5, 13.5};  // four columns interleaved, then 1..4 rows

using Patterns = std::array<int64_t, 16>;  // units by the set of the four rows that want them

double group_cost(const Patterns& count, int first, int rows, bool gather) {
  Patterns mine{};
  const unsigned mask = (1u << rows) - 1;
  for (unsigned p = 1; p < 16; ++p) mine[(p >> first) & mask] += count[p];
  double cost = 0;
  for (unsigned p = 1; p <= mask; ++p) {
    if (mine[p] == 0) continue;
    cost += kLoopCost +
            (gather ? double((mine[p] + 3) / 4) * kGatherCost[popcount(p)] : double(mine[p]) * kUnitCost[popcount(p)]);
  }
  return cost;
}

struct Choice {
  int rows;  // of each group
  double cost;
};

// How to split four rows into groups.
Choice choose_rows(const Patterns& count, int max_group, bool gather) {
  Choice best{1, 0};
  for (int r = 0; r < 4; ++r) best.cost += group_cost(count, r, 1, gather);
  if (max_group >= 2) {
    const double pairs = group_cost(count, 0, 2, gather) + group_cost(count, 2, 2, gather);
    if (pairs < best.cost) best = {2, pairs};
  }
  if (max_group >= 4) {
    const double four = group_cost(count, 0, 4, gather);
    if (four < best.cost) best = {4, four};
  }
  return best;
}

// ---- reading the bitmap ----------------------------------------------------------------------------------------

// Four rows of the weight, spread out.
class FourRows {
 public:
  explicit FourRows(const Bitmap& weight)
      : weight_(weight), size_(weight_size(weight.type)), values_(size_t(4 * round_up(weight.k)) * size_t(size_)) {}

  // Rows [first, first + 4), those behind N empty. kept: [K] the set of rows that keep each column.
  void read(int64_t first, std::vector<uint8_t>& kept) {
    std::fill(kept.begin(), kept.end(), uint8_t(0));
    std::fill(values_.begin(), values_.end(), char(0));
    const int64_t row_bytes = (weight_.k + 7) / 8;
    for (int r = 0; r < 4 && first + r < weight_.n; ++r) {
      const uint8_t* bits = weight_.bits + (first + r) * row_bytes;
      const char* source = static_cast<const char*>(weight_.values) + weight_.row_start[first + r] * size_;
      for (int64_t byte = 0; byte < row_bytes; ++byte) {
        for (unsigned rest = bits[byte]; rest != 0; rest &= rest - 1, source += size_) {
          const int64_t k = byte * 8 + __builtin_ctz(rest);
          kept[size_t(k)] = uint8_t(kept[size_t(k)] | (1u << r));
          std::memcpy(at(r, k), source, size_t(size_));
        }
      }
    }
  }

  char* at(int r, int64_t k) { return values_.data() + (r * round_up(weight_.k) + k) * size_; }

 private:
  static int64_t round_up(int64_t k) { return (k + 3) / 4 * 4; }
  const Bitmap& weight_;
  int64_t size_;
  std::vector<char> values_;
};

// kept columns -> kept units
void to_units(const std::vector<uint8_t>& kept, int unit, std::vector<uint8_t>& units) {
  std::fill(units.begin(), units.end(), uint8_t(0));
  for (size_t k = 0; k < kept.size(); ++k) units[k / size_t(unit)] = uint8_t(units[k / size_t(unit)] | kept[k]);
}

Patterns count_patterns(const std::vector<uint8_t>& units) {
  Patterns count{};
  for (uint8_t p : units) ++count[p];
  return count;
}

// ---- writing ---------------------------------------------------------------------------------------------------

struct Output {
  std::vector<uint16_t> lists;
  std::vector<char> values;
};

void write_value(const IndexLayout& layout, bool gather, FourRows& rows, int r, const int64_t* columns, Output& out) {
  if (layout.type != WeightType::s8) {
    const char* value = rows.at(r, columns[0]);
    out.values.insert(out.values.end(), value, value + weight_size(layout.type));
    return;
  }
  for (int j = 0; j < (gather ? 4 : layout.unit); ++j) {
    const int64_t k = gather ? columns[j] : columns[0] + j;
    const int8_t value = k < 0 ? int8_t(0) : int8_t(*rows.at(r, k));
    if (layout.unit == 2) {
      const int16_t wide = value;
      const char* bytes = reinterpret_cast<const char*>(&wide);
      out.values.insert(out.values.end(), bytes, bytes + 2);
    } else {
      out.values.push_back(char(value));
    }
  }
}

void write_group(const IndexLayout& layout, bool gather, FourRows& rows, const std::vector<uint8_t>& units, int first,
                 int count, Output& out) {
  const unsigned mask = (1u << count) - 1;
  std::array<std::vector<uint16_t>, 16> lists;
  for (size_t u = 0; u < units.size(); ++u) {
    const unsigned p = (units[u] >> first) & mask;
    if (p != 0) lists[p].push_back(uint16_t(u));
  }
  const size_t step = gather ? 4 : 1;
  out.lists.push_back(uint16_t(count));
  for (unsigned p = 1; p <= mask; ++p) {
    out.lists.push_back(uint16_t((lists[p].size() + step - 1) / step));  // iterations of the kernel
  }
  for (unsigned p = 1; p <= mask; ++p) {
    const std::vector<uint16_t>& list = lists[p];
    for (size_t i = 0; i < list.size(); i += step) {
      int64_t columns[4];
      for (size_t j = 0; j < step; ++j) {
        const bool real = i + j < list.size();
        out.lists.push_back(real ? list[i + j] : list[i]);
        columns[j] = !real ? -1 : gather ? int64_t(list[i + j]) : int64_t(list[i + j]) * layout.unit;
      }
      for (int r = 0; r < count; ++r) {
        if ((p >> r) & 1) write_value(layout, gather, rows, first + r, columns, out);
      }
    }
  }
}

struct Packed {
  bool gather = false;
  std::vector<Strip> strips;
  std::vector<int32_t> row_init;
  Output out;
};

bool fits(const IndexLayout& layout, const Bitmap& weight) {
  if ((weight.k + layout.unit - 1) / layout.unit > kMaxUnits) return false;
  for (int64_t n = 0; n < weight.n && weight.type == WeightType::s8; ++n) {
    if (weight.row_start[n + 1] - weight.row_start[n] > kMaxRowCount) return false;
  }
  return true;
}

// Whether interleaving columns costs less than units of neighbouring columns do.
bool prefers_gather(const IndexLayout& layout, const Bitmap& weight) {
  if (!layout.may_gather || weight.k > kMaxUnits) return false;
  double neighbours = 0, gathered = 0;
  FourRows rows(weight);
  std::vector<uint8_t> kept(size_t(weight.k)), units(size_t((weight.k + layout.unit - 1) / layout.unit));
  const int64_t stride = std::max<int64_t>(4, weight.n / 64 / 4 * 4);  // some 64 samples tell
  for (int64_t n = 0; n < weight.n; n += stride) {
    rows.read(n, kept);
    to_units(kept, layout.unit, units);
    neighbours += choose_rows(count_patterns(units), layout.max_group, false).cost;
    gathered += choose_rows(count_patterns(kept), layout.max_group, true).cost;
  }
  return gathered < neighbours;
}

int32_t row_sum(const Bitmap& weight, int64_t n) {
  const auto* values = static_cast<const int8_t*>(weight.values);
  int32_t sum = 0;
  for (int64_t i = weight.row_start[n]; i < weight.row_start[n + 1]; ++i) sum += values[i];
  return sum;
}

Packed build(const IndexLayout& layout, const Bitmap& weight) {
  Packed packed;
  packed.gather = prefers_gather(layout, weight);
  const int unit = packed.gather ? 1 : layout.unit;
  const int64_t strips = strip_count(weight.n), bytes = value_bytes(layout);
  FourRows rows(weight);
  std::vector<uint8_t> kept(size_t(weight.k)), units(size_t((weight.k + unit - 1) / unit));
  for (int64_t s = 0; s < strips; ++s) {
    packed.strips.push_back({int64_t(packed.out.lists.size()), int64_t(packed.out.values.size()) / bytes});
    for (int64_t n = s * kStrip; n < std::min(weight.n, (s + 1) * kStrip); n += 4) {
      rows.read(n, kept);
      to_units(kept, unit, units);
      const int group = choose_rows(count_patterns(units), layout.max_group, packed.gather).rows;
      for (int first = 0; first < 4; first += group) {
        write_group(layout, packed.gather, rows, units, first, group, packed.out);
      }
    }
  }
  packed.strips.push_back({int64_t(packed.out.lists.size()), int64_t(packed.out.values.size()) / bytes});
  packed.row_init.assign(size_t(strips * kStrip), 0);
  for (int64_t n = 0; n < weight.n && layout.offset != 0; ++n) {
    packed.row_init[size_t(n)] = -layout.offset * row_sum(weight, n);
  }
  return packed;
}

struct Places {  // of the parts, from the start of the buffer
  int64_t strips, row_init, lists, values, end;
};

Places places(const IndexLayout& layout, int64_t n, int64_t list_count, int64_t value_count) {
  Places p;
  p.strips = int64_t(sizeof(IndexHeader));
  p.row_init = p.strips + align((strip_count(n) + 1) * int64_t(sizeof(Strip)));
  p.lists = p.row_init + align(strip_count(n) * kStrip * 4);
  p.values = p.lists + align(list_count * 2);
  p.end = p.values + align(value_count * value_bytes(layout));
  return p;
}

}  // namespace

std::vector<char> pack_index(const IndexLayout& layout, const Bitmap& weight) {
  if (!fits(layout, weight)) return {};
  const Packed packed = build(layout, weight);
  IndexHeader header{};
  header.magic = kIndexMagic;
  header.version = kIndexVersion;
  header.layout = uint16_t(layout.id);
  header.n = weight.n;
  header.k = weight.k;
  header.nnz = weight.row_start[weight.n];
  header.list_count = int64_t(packed.out.lists.size());
  header.value_count = int64_t(packed.out.values.size()) / value_bytes(layout);
  header.gather = packed.gather;
  const Places at = places(layout, weight.n, header.list_count, header.value_count);
  header.total_bytes = at.end;
  header.checksum = header_checksum(header);

  std::vector<char> bytes(size_t(at.end));
  const auto put = [&](int64_t where, const void* from, size_t count) {
    if (count != 0) std::memcpy(bytes.data() + where, from, count);
  };
  put(0, &header, sizeof header);
  put(at.strips, packed.strips.data(), packed.strips.size() * sizeof(Strip));
  put(at.row_init, packed.row_init.data(), packed.row_init.size() * 4);
  put(at.lists, packed.out.lists.data(), packed.out.lists.size() * 2);
  put(at.values, packed.out.values.data(), packed.out.values.size());
  return bytes;
}

IndexWeight open_index(const void* data, int64_t bytes) {
  const char* remedy = "; pack it again from the bitmap (pack_index, or load_state_dict into a module)";
  check(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, "sparse_linear: the index form must be 64-byte aligned",
        remedy);
  check(bytes >= int64_t(sizeof(IndexHeader)), "sparse_linear: index form of ", bytes,
        " bytes is too short for its header", remedy);
  IndexHeader header;
  std::memcpy(&header, data, sizeof header);
  check(header.magic == kIndexMagic, "sparse_linear: this is not the index form of a weight (magic ", header.magic, ")",
        remedy);
  check(header.version == kIndexVersion, "sparse_linear: index form has version ", header.version, ", expected ",
        kIndexVersion, remedy);
  check(header.checksum == header_checksum(header), "sparse_linear: the header of the index form is corrupt", remedy);
  const IndexLayout* layout = nullptr;
  for (const IndexLayout* candidate : kLayouts) {
    if (candidate->id == header.layout) layout = candidate;
  }
  check(layout != nullptr, "sparse_linear: index form has the unknown layout ", header.layout, remedy);
  const Places at = places(*layout, header.n, header.list_count, header.value_count);
  check(header.total_bytes == bytes && at.end == bytes, "sparse_linear: index form [N=", header.n, ", K=", header.k,
        "] should have ", header.total_bytes, " bytes, got ", bytes, remedy);
  const auto* base = static_cast<const char*>(data);
  return {layout,
          header.gather != 0,
          header.n,
          header.k,
          header.nnz,
          reinterpret_cast<const Strip*>(base + at.strips),
          reinterpret_cast<const int32_t*>(base + at.row_init),
          reinterpret_cast<const uint16_t*>(base + at.lists),
          base + at.values};
}

}  // namespace pycompress::sparse_linear
