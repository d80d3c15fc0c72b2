#include <cstddef>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/checksum.h"
#include "common/memory.h"
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::int8_conv2d {
namespace {

namespace im = int8_matmul;

constexpr int64_t kMostPadding = 4;  // the largest ku

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

const Layout* find_layout(int id) {
  for (const Layout& layout : im::kLayouts) {
    if (layout.id == id) return &layout;
  }
  return nullptr;
}

void check_shape(const WeightShape& s) {
  check(s.out >= 0 && s.per_group >= 0 && s.kh >= 1 && s.kw >= 1 && s.groups >= 1 && s.out % s.groups == 0,
        "int8_conv2d: weight [O=", s.out, ", I/groups=", s.per_group, ", kh=", s.kh, ", kw=", s.kw,
        "] with groups=", s.groups, " is no weight");
  check(*refuses(s.per_group, s.kh, s.kw) == 0, "int8_conv2d: weight [I/groups=", s.per_group, ", kh=", s.kh,
        ", kw=", s.kw, "]: ", refuses(s.per_group, s.kh, s.kw));
  check(s.out <= int64_t(1) << 32, "int8_conv2d: O=", s.out, " is out of range");
}

int64_t terms(const Layout& layout, const WeightShape& s) { return s.kh * s.kw * round_up(s.per_group, layout.ku); }

int64_t group_bytes(const Layout& layout, const WeightShape& s) {
  return round_up(im::packed_bytes(layout, s.out / s.groups, terms(layout, s)), kAlignment);
}

// The position of [o, c, a, b] in the rows that are packed: taps first, channels within.
template <class Visit>
void each_value(const WeightShape& s, int64_t padded, const Visit& visit) {
  for (int64_t c = 0; c < s.per_group; ++c) {
    for (int64_t tap = 0; tap < s.kh * s.kw; ++tap) visit(c * s.kh * s.kw + tap, tap * padded + c);
  }
}

}  // namespace

const char* refuses(int64_t per_group, int64_t kh, int64_t kw) {
  const bool fits = per_group <= kMaxTerms && kh <= kMaxTerms && kw <= kMaxTerms && kh * kw <= kMaxTerms &&
                    kh * kw * round_up(per_group, kMostPadding) <= kMaxTerms;
  return fits ? "" : "kh * kw * I / groups is above 65472, where sums may not fit 32 bits; the reference takes it";
}

int64_t packed_bytes(const Layout& layout, const WeightShape& shape) {
  check_shape(shape);
  const int64_t one = group_bytes(layout, shape);
  check(shape.groups <= (int64_t(1) << 46) / one, "int8_conv2d: groups=", shape.groups, " is out of range");
  return int64_t(sizeof(PackedHeader)) + shape.groups * one;
}

void pack(const Layout& layout, const int8_t* weight, const WeightShape& shape, void* dst) {
  const int64_t bytes = packed_bytes(layout, shape);
  check(reinterpret_cast<uintptr_t>(dst) % kAlignment == 0, "int8_conv2d: the packed weight must be 64-byte aligned");
  PackedHeader header{kPackedMagic, kPackedVersion, uint16_t(layout.id), shape, bytes, 0};
  header.checksum = fnv1a(&header, offsetof(PackedHeader, checksum));
  std::memcpy(dst, &header, sizeof header);

  const int64_t rows = shape.out / shape.groups, k = terms(layout, shape),
                values = shape.per_group * shape.kh * shape.kw;
  const int64_t padded = round_up(shape.per_group, layout.ku), step = group_bytes(layout, shape);
  std::vector<int8_t> matrix(size_t(rows * k), int8_t(0));
  for (int64_t g = 0; g < shape.groups; ++g) {
    for (int64_t row = 0; row < rows; ++row) {
      const int8_t* from = weight + (g * rows + row) * values;
      int8_t* to = matrix.data() + row * k;
      each_value(shape, padded, [&](int64_t plain, int64_t ordered) { to[ordered] = from[plain]; });
    }
    char* at = static_cast<char*>(dst) + sizeof header + g * step;
    const int64_t used = im::packed_bytes(layout, rows, k);
    im::pack(layout, matrix.data(), rows, k, k, at);
    std::memset(at + used, 0, size_t(step - used));
  }
}

void unpack(const PackedConv& packed, int8_t* weight) {
  const WeightShape& s = packed.shape;
  const int64_t rows = s.out / s.groups, values = s.per_group * s.kh * s.kw;
  std::vector<int8_t> ordered(size_t(s.kh * s.kw * packed.padded));
  for (int64_t o = 0; o < s.out; ++o) {
    im::unpack_row(group_weight(packed, o / rows), o % rows, ordered.data());
    int8_t* to = weight + o * values;
    each_value(s, packed.padded, [&](int64_t plain, int64_t at) { to[plain] = ordered[size_t(at)]; });
  }
}

PackedConv open_packed(const void* data, int64_t bytes) {
  const char* remedy = "; pack it again from the int8 weight (pack_conv_weight, or load_state_dict into a module)";
  check(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, "int8_conv2d: the packed weight must be 64-byte aligned",
        remedy);
  check(bytes >= int64_t(sizeof(PackedHeader)), "int8_conv2d: packed weight of ", bytes, " bytes is too short for its ",
        sizeof(PackedHeader), "-byte header", remedy);
  PackedHeader header;
  std::memcpy(&header, data, sizeof header);
  check(header.magic == kPackedMagic, "int8_conv2d: this is not a packed int8 convolution weight (magic ", header.magic,
        ")", remedy);
  check(header.version == kPackedVersion, "int8_conv2d: packed weight has version ", header.version, ", expected ",
        kPackedVersion, remedy);
  check(header.checksum == fnv1a(&header, offsetof(PackedHeader, checksum)),
        "int8_conv2d: the header of the packed weight is corrupt", remedy);
  const Layout* layout = find_layout(header.layout);
  check(layout != nullptr, "int8_conv2d: packed weight has the unknown layout ", header.layout, remedy);
  check(header.total_bytes == bytes && packed_bytes(*layout, header.shape) == bytes,
        "int8_conv2d: packed weight [O=", header.shape.out, ", I/groups=", header.shape.per_group,
        ", groups=", header.shape.groups, "] should have ", header.total_bytes, " bytes, got ", bytes, remedy);

  const WeightShape& s = header.shape;
  const int64_t rows = s.out / s.groups, step = group_bytes(*layout, s);
  PackedConv packed{layout, s, static_cast<const char*>(data) + sizeof header,
                    step,   0, round_up(s.per_group, layout->ku)};
  for (int64_t g = 0; g < s.groups; ++g) {
    const char* at = packed.groups + g * step;
    const PackedWeight matrix = im::open_packed(at, im::packed_bytes(*layout, rows, terms(*layout, s)));
    check(matrix.layout->id == layout->id && matrix.n == rows && matrix.k == terms(*layout, s), "int8_conv2d: group ",
          g, " of the packed weight is of another weight", remedy);
    packed.sums_bytes = reinterpret_cast<const char*>(matrix.panels) - reinterpret_cast<const char*>(matrix.column_sum);
  }
  return packed;
}

}  // namespace pycompress::int8_conv2d
