#include <algorithm>
#include <cstddef>
#include <cstring>

#include "common/check.h"
#include "common/memory.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

const Layout* find_layout(int id) {
  for (const Layout& layout : kLayouts) {
    if (layout.id == id) return &layout;
  }
  return nullptr;
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// FNV-1a. Guards against a damaged or foreign buffer, not against an attacker.
uint64_t header_checksum(const PackedHeader& header) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&header);
  uint64_t hash = 1469598103934665603ull;
  for (size_t i = 0; i < offsetof(PackedHeader, checksum); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  return hash;
}

int64_t sums_bytes(const Layout& layout, int64_t n) { return round_up(padded_n(layout, n) * 4, kAlignment); }

// Where the first group of output n lies, counted from the start of the panels, and how far the next group is.
struct Row {
  int64_t start, step;
};

Row locate(const Layout& layout, int64_t n, int64_t total_n, int64_t total_k) {
  const int64_t panel = n / layout.nr, column = n % layout.nr;
  const int64_t width = std::min<int64_t>(layout.nr, padded_n(layout, total_n) - panel * layout.nr);
  return {panel * layout.nr * round_up(total_k, layout.ku) + column * layout.ku, width * layout.ku};
}

// The outputs of one panel: `rows` of the weight, padded to `width`.
struct Panel {
  const int8_t* weight;
  int64_t rows, width, k, ld;
  uint8_t* out;
  int32_t* sums;
};

// The sum of 64 bytes of s8.
int32_t sum_64(const int8_t* values) {
  constexpr uint64_t kEven = 0x00ff00ff00ff00ffull;
  uint64_t pairs = 0;  // four sums of 16 bits; each byte as u8, 128 too large
  for (int i = 0; i < 64; i += 8) {
    uint64_t v;
    std::memcpy(&v, values + i, sizeof v);
    v ^= 0x8080808080808080ull;
    pairs += (v & kEven) + ((v >> 8) & kEven);
  }
  return int32_t((pairs * 0x0001000100010001ull) >> 48) - 64 * 128;
}

// A word is a group of one output. 64 bytes of each output at a time: a cache line read, 16 lines or more written whole.
// 5 times as fast as byte by byte, and a checkpoint loads no faster than its weights are packed.
template <typename Word>
void pack_panel(const Layout& layout, const Panel& panel) {
  constexpr int64_t kWord = sizeof(Word), kStep = 64 / kWord;
  check(layout.ku == kWord && (layout.offset == 0 || layout.offset == 128), "int8_matmul: layout ", layout.id,
        " is none that pack writes");
  Word flip;  // adding 128 to a byte flips its top bit
  std::memset(&flip, layout.offset, sizeof flip);
  const int64_t groups = panel.k / kWord, stride = panel.width * kWord;
  for (int64_t begin = 0; begin < groups; begin += kStep) {
    const int64_t count = std::min(kStep, groups - begin);
    for (int64_t r = 0; r < panel.rows; ++r) {
      const int8_t* source = panel.weight + r * panel.ld + begin * kWord;
      uint8_t* out = panel.out + begin * stride + r * kWord;
      for (int64_t g = 0; g < count; ++g) {
        Word word;
        std::memcpy(&word, source + g * kWord, sizeof word);
        word = Word(word ^ flip);
        std::memcpy(out + g * stride, &word, sizeof word);
      }
      if (count == kStep) {
        panel.sums[r] += sum_64(source);
      } else {
        for (int64_t kk = 0; kk < count * kWord; ++kk) panel.sums[r] += source[kk];
      }
    }
    for (int64_t g = begin; panel.rows < panel.width && g < begin + count; ++g) {
      std::memset(panel.out + g * stride + panel.rows * kWord, layout.offset, size_t(stride - panel.rows * kWord));
    }
  }
  if (groups * kWord == panel.k) return;
  uint8_t* last = panel.out + groups * stride;
  std::memset(last, layout.offset, size_t(stride));
  for (int64_t r = 0; r < panel.rows; ++r) {
    for (int64_t kk = groups * kWord; kk < panel.k; ++kk) {
      const int8_t value = panel.weight[r * panel.ld + kk];
      panel.sums[r] += value;
      last[r * kWord + kk - groups * kWord] = uint8_t(value + layout.offset);
    }
  }
}

}  // namespace

int64_t padded_n(const Layout& layout, int64_t n) { return round_up(n, layout.lanes); }

int64_t panel_count(const Layout& layout, int64_t n) { return (n + layout.nr - 1) / layout.nr; }

int64_t packed_bytes(const Layout& layout, int64_t n, int64_t k) {
  check(n >= 0 && k >= 0 && k <= kMaxK && n <= (int64_t(1) << 40) / (k + 8), "int8_matmul: weight [N=", n, ", K=", k,
        "] is out of range; K may be at most ", kMaxK);
  return int64_t(sizeof(PackedHeader)) + sums_bytes(layout, n) + padded_n(layout, n) * round_up(k, layout.ku);
}

void pack(const Layout& layout, const int8_t* weight, int64_t n, int64_t k, int64_t ld, void* dst) {
  const int64_t bytes = packed_bytes(layout, n, k);
  check(reinterpret_cast<uintptr_t>(dst) % kAlignment == 0, "int8_matmul: the packed weight must be 64-byte aligned");
  advise_huge_pages(dst, size_t(bytes));

  auto* base = static_cast<char*>(dst);
  PackedHeader header{};
  header.magic = kPackedMagic;
  header.version = kPackedVersion;
  header.layout = uint16_t(layout.id);
  header.n = n;
  header.k = k;
  header.total_bytes = bytes;
  header.checksum = header_checksum(header);
  std::memcpy(base, &header, sizeof header);

  auto* sums = reinterpret_cast<int32_t*>(base + sizeof header);
  auto* panels = reinterpret_cast<uint8_t*>(base + sizeof header + sums_bytes(layout, n));
  std::memset(sums, 0, size_t(sums_bytes(layout, n)));
  const int64_t padded = padded_n(layout, n);
  for (int64_t row = 0; row < padded; row += layout.nr) {
    const Panel panel{weight + row * ld,
                      std::clamp<int64_t>(n - row, 0, layout.nr),
                      std::min<int64_t>(layout.nr, padded - row),
                      k,
                      ld,
                      panels + row * round_up(k, layout.ku),
                      sums + row};
    if (layout.ku == 4) {
      pack_panel<uint32_t>(layout, panel);
    } else if (layout.ku == 2) {
      pack_panel<uint16_t>(layout, panel);
    } else {
      pack_panel<uint8_t>(layout, panel);
    }
  }
}

void unpack_row(const PackedWeight& packed, int64_t n, int8_t* row) {
  const Layout& layout = *packed.layout;
  const Row at = locate(layout, n, packed.n, packed.k);
  const uint8_t* group = packed.panels + at.start;
  for (int64_t kk = 0; kk < packed.k; kk += layout.ku, group += at.step) {
    for (int64_t j = 0; j < layout.ku && kk + j < packed.k; ++j) row[kk + j] = int8_t(group[j] - layout.offset);
  }
}

void unpack(const PackedWeight& packed, int8_t* weight, int64_t ld) {
  for (int64_t n = 0; n < packed.n; ++n) unpack_row(packed, n, weight + n * ld);
}

PackedWeight open_packed(const void* data, int64_t bytes) {
  const char* remedy = "; pack it again from the int8 weight (pack_weight, or load_state_dict into a module)";
  check(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, "int8_matmul: the packed weight must be 64-byte aligned",
        remedy);
  check(bytes >= int64_t(sizeof(PackedHeader)), "int8_matmul: packed weight of ", bytes, " bytes is too short for its ",
        sizeof(PackedHeader), "-byte header", remedy);
  PackedHeader header;
  std::memcpy(&header, data, sizeof header);
  check(header.magic == kPackedMagic, "int8_matmul: this is not a packed int8 weight (magic ", header.magic, ")",
        remedy);
  check(header.version == kPackedVersion, "int8_matmul: packed weight has version ", header.version, ", expected ",
        kPackedVersion, remedy);
  check(header.checksum == header_checksum(header), "int8_matmul: the header of the packed weight is corrupt", remedy);
  const Layout* layout = find_layout(header.layout);
  check(layout != nullptr, "int8_matmul: packed weight has the unknown layout ", header.layout, remedy);
  check(header.total_bytes == bytes && packed_bytes(*layout, header.n, header.k) == bytes,
        "int8_matmul: packed weight [N=", header.n, ", K=", header.k, "] should have ", header.total_bytes,
        " bytes, got ", bytes, remedy);
  const auto* base = static_cast<const char*>(data);
  return {layout, header.n, header.k, reinterpret_cast<const int32_t*>(base + sizeof header),
          reinterpret_cast<const uint8_t*>(base + sizeof header + sums_bytes(*layout, header.n))};
}

}  // namespace pycompress::int8_matmul
