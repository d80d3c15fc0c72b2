#include <algorithm>
#include <cstddef>
#include <cstring>

#include "common/check.h"
#include "common/memory.h"
#include "int4_matmul/int4_matmul.h"

namespace pycompress::int4_matmul {
namespace {

const Layout* find_layout(int id) {
  for (const Layout& layout : kLayouts) {
    if (layout.id == id) return &layout;
  }
  return nullptr;
}

// FNV-1a. Guards against a damaged or foreign buffer, not against an attacker.
uint64_t header_checksum(const PackedHeader& header) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&header);
  uint64_t hash = 1469598103934665603ull;
  for (size_t i = 0; i < offsetof(PackedHeader, checksum); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  return hash;
}

void check_shape(const Shape& s) {
  check(s.n >= 0 && s.k >= 0 && s.k <= kMaxK && s.n <= (int64_t(1) << 40) / (s.k + 8), "int4_matmul: weight [N=", s.n,
        ", K=", s.k, "] is out of range; K may be at most ", kMaxK);
  check(s.group_size >= 1 && s.group_size <= kMaxK, "int4_matmul: group_size=", s.group_size, ", expected 1 to ",
        kMaxK);
  check(s.format == Format::int4 || !s.has_zero_point,
        "int4_matmul: zero points belong to the format int4, not to nf4");
}

// Where output n's scale of the first group lies, counted from the start of the panels, and how wide its panel is.
struct Row {
  int64_t panel, column, width;
};

Row locate(const Layout& layout, const Shape& s, int64_t n) {
  const int64_t panel = n / layout.nr;
  const int64_t width = std::min<int64_t>(layout.nr, padded_n(layout, s.n) - panel * layout.nr);
  return {panel * panel_bytes(s, groups_of(s), layout.nr), n % layout.nr, width};
}

// Visits the groups of output n: group(g, first_k, end_k, scale at, zero point at, first unit at, bytes between units).
template <class Byte, class Visit>
void visit_groups(const Layout& layout, const Shape& s, int64_t n, Byte* panels, const Visit& group) {
  const Groups groups = groups_of(s);
  const Row row = locate(layout, s, n);
  Byte* at = panels + row.panel;
  for (int64_t g = 0; g < groups.count; ++g) {
    Byte* const units = at + head_bytes(s, row.width);
    group(g, g * s.group_size, std::min((g + 1) * s.group_size, s.k), at + row.column * 4,
          at + row.width * 4 + row.column, units + row.column * 4, row.width * 4);
    at = units + (g + 1 < groups.count ? groups.units : groups.last_units) * row.width * 4;
  }
}

unsigned nibble(const uint8_t* row, int64_t k) { return row[k / 2] >> (k % 2 * 4) & 15u; }

// 8 values from k on, those from `end` on as 0
uint32_t read_unit(const uint8_t* row, int64_t k, int64_t end) {
  uint32_t unit = 0;
  for (int64_t i = 0; i < kUnit && k + i < end; ++i) unit |= uint32_t(nibble(row, k + i)) << (4 * i);
  return unit;
}

}  // namespace

int64_t padded_n(const Layout& layout, int64_t n) { return (n + layout.lanes - 1) / layout.lanes * layout.lanes; }

int64_t panel_count(const Layout& layout, int64_t n) { return (n + layout.nr - 1) / layout.nr; }

int64_t packed_bytes(const Layout& layout, const Shape& s) {
  check_shape(s);
  const Groups groups = groups_of(s);
  const int64_t whole = s.n / layout.nr, rest = padded_n(layout, s.n) - whole * layout.nr;
  return int64_t(sizeof(PackedHeader)) + whole * panel_bytes(s, groups, layout.nr) + panel_bytes(s, groups, rest);
}

void pack(const Layout& layout, const Shape& s, const PlainWeight& weight, void* dst) {
  const int64_t bytes = packed_bytes(layout, s);
  check(reinterpret_cast<uintptr_t>(dst) % kAlignment == 0, "int4_matmul: the packed weight must be 64-byte aligned");
  check(s.n * s.k == 0 || (weight.q != nullptr && weight.scale != nullptr), "int4_matmul: weight or scale is missing");
  check(s.n * s.k == 0 || s.has_zero_point == (weight.zero_point != nullptr),
        "int4_matmul: zero points are missing, or given for a weight that has none");
  advise_huge_pages(dst, size_t(bytes));

  auto* base = static_cast<uint8_t*>(dst);
  PackedHeader header{};
  header.magic = kPackedMagic;
  header.version = kPackedVersion;
  header.layout = uint8_t(layout.id);
  header.format = uint8_t(s.format);
  header.n = s.n;
  header.k = s.k;
  header.group_size = s.group_size;
  header.total_bytes = bytes;
  header.has_zero_point = s.has_zero_point;
  header.checksum = header_checksum(header);
  std::memcpy(base, &header, sizeof header);

  uint8_t* const panels = base + sizeof header;
  const int64_t row_bytes = (s.k + 1) / 2, groups = groups_of(s).count;
  // Zeros for the outputs behind N: nothing that was in the memory may reach a sum, be it never stored.
  if (s.n % layout.lanes != 0) {
    const int64_t last = locate(layout, s, s.n - 1).panel;
    std::memset(panels + last, 0, size_t(bytes - int64_t(sizeof header) - last));
  }
  for (int64_t n = 0; n < s.n; ++n) {
    const uint8_t* row = weight.q + n * row_bytes;
    visit_groups(layout, s, n, panels,
                 [&](int64_t g, int64_t k, int64_t end, uint8_t* scale, uint8_t* zero, uint8_t* unit, int64_t step) {
                   std::memcpy(scale, weight.scale + n * groups + g, sizeof(float));
                   if (s.has_zero_point) *zero = weight.zero_point[n * groups + g];
                   for (; k < end; k += kUnit, unit += step) {
                     uint32_t value;
                     if (k % 2 == 0 && k + kUnit <= end) {
                       value = uint32_t(row[k / 2]) | uint32_t(row[k / 2 + 1]) << 8 | uint32_t(row[k / 2 + 2]) << 16 |
                               uint32_t(row[k / 2 + 3]) << 24;
                     } else {
                       value = read_unit(row, k, end);
                     }
                     std::memcpy(unit, &value, sizeof value);
                   }
                 });
  }
}

void unpack_row(const PackedWeight& packed, int64_t n, uint8_t* q, float* scale, uint8_t* zero_point) {
  const Shape& s = packed.shape;
  if (q != nullptr) std::memset(q, 0, size_t((s.k + 1) / 2));
  visit_groups(*packed.layout, s, n, packed.panels,
               [&](int64_t g, int64_t k, int64_t end, const uint8_t* scale_at, const uint8_t* zero_at,
                   const uint8_t* unit, int64_t step) {
                 if (scale != nullptr) std::memcpy(scale + g, scale_at, sizeof(float));
                 if (zero_point != nullptr && s.has_zero_point) zero_point[g] = *zero_at;
                 for (; k < end && q != nullptr; k += kUnit, unit += step) {
                   uint32_t value;
                   std::memcpy(&value, unit, sizeof value);
                   for (int64_t i = 0; i < kUnit && k + i < end; ++i) {
                     q[(k + i) / 2] = uint8_t(q[(k + i) / 2] | (value >> (4 * i) & 15u) << ((k + i) % 2 * 4));
                   }
                 }
               });
}

void unpack(const PackedWeight& packed, uint8_t* q, float* scale, uint8_t* zero_point) {
  const Shape& s = packed.shape;
  const int64_t row_bytes = (s.k + 1) / 2, groups = groups_of(s).count;
  for (int64_t n = 0; n < s.n; ++n) {
    unpack_row(packed, n, q == nullptr ? nullptr : q + n * row_bytes, scale == nullptr ? nullptr : scale + n * groups,
               zero_point == nullptr ? nullptr : zero_point + n * groups);
  }
}

PackedWeight open_packed(const void* data, int64_t bytes) {
  const char* remedy = "; pack it again from the plain weight (pack_weight, or load_state_dict into a module)";
  check(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, "int4_matmul: the packed weight must be 64-byte aligned",
        remedy);
  check(bytes >= int64_t(sizeof(PackedHeader)), "int4_matmul: packed weight of ", bytes, " bytes is too short for its ",
        sizeof(PackedHeader), "-byte header", remedy);
  PackedHeader header;
  std::memcpy(&header, data, sizeof header);
  check(header.magic == kPackedMagic, "int4_matmul: this is not a packed int4 weight (magic ", header.magic, ")",
        remedy);
  check(header.version == kPackedVersion, "int4_matmul: packed weight has version ", header.version, ", expected ",
        kPackedVersion, remedy);
  check(header.checksum == header_checksum(header), "int4_matmul: the header of the packed weight is corrupt", remedy);
  const Layout* layout = find_layout(header.layout);
  check(layout != nullptr, "int4_matmul: packed weight has the unknown layout ", int(header.layout), remedy);
  check(header.format <= uint8_t(Format::nf4) && header.has_zero_point <= 1,
        "int4_matmul: packed weight has the unknown format ", int(header.format), remedy);
  const Shape shape{header.n, header.k, header.group_size, Format(header.format), header.has_zero_point != 0};
  check(header.total_bytes == bytes && packed_bytes(*layout, shape) == bytes, "int4_matmul: packed weight [N=", shape.n,
        ", K=", shape.k, "] in groups of ", shape.group_size, " should have ", header.total_bytes, " bytes, got ",
        bytes, remedy);
  return {layout, shape, static_cast<const uint8_t*>(data) + sizeof header};
}

}  // namespace pycompress::int4_matmul
