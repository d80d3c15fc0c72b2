// What the index form of sparse_linear is packed into: the choice to gather, its limits, and damaged headers.
#include <cstddef>

#include "sparse_index_form.h"

namespace {

void test_gather_choice() {
  const auto gathers = [](int rows, int columns, double kept, const sl::IndexLayout& layout) {
    SparseCase c{0, 64, 512, WeightType::s8, kept, false};
    c.block_rows = rows;
    c.block_columns = columns;
    SparseProblem p(c);
    const Packed packed(layout, p.bitmap());
    test_form(p, layout, packed.weight);
    return packed.weight.gather;
  };
  for (double kept : {0.1, 0.2, 0.3}) expect(gathers(4, 1, kept, sl::kQuads4), "gather", "4 x 1 blocks");
  for (double kept : {0.1, 0.2, 0.5}) expect(!gathers(1, 4, kept, sl::kQuads4), "gather", "1 x 4 blocks");
  for (double kept : {0.1, 0.2, 0.5}) expect(!gathers(4, 4, kept, sl::kQuads4), "gather", "4 x 4 blocks");
  expect(!gathers(1, 1, 1.0, sl::kQuads4), "gather", "nothing pruned");
  for (const sl::IndexLayout* layout : kLayouts) {
    if (layout->type == WeightType::s8 && !layout->may_gather)
      expect(!gathers(4, 1, 0.2, *layout), "gather", "no kernel");
  }
}

// What a u16 cannot name, or an int32 not sum, has no index form: the very limit has, and is right.
void test_limits() {
  for (const sl::IndexLayout* layout : kLayouts) {
    const std::string name = layout_name(*layout);
    const bool integer = layout->type == WeightType::s8;
    const int64_t columns = sl::kMaxUnits * layout->unit;
    SparseCase c{0, 1, columns, layout->type, integer ? 0.4 : 1.0, false};
    SparseProblem p(c);
    test_form(p, *layout, Packed(*layout, p.bitmap()).weight);
    c.k = columns + 1;
    c.kept = 0.01;
    SparseProblem wide(c);
    expect(sl::pack_index(*layout, wide.bitmap()).empty(), name, "packed more units than a list can name");
    if (!integer) continue;
    for (int64_t count : {sl::kMaxRowCount, sl::kMaxRowCount + 1}) {
      SparseProblem full({0, 2, count, WeightType::s8, 1.0, false});
      expect(sl::pack_index(*layout, full.bitmap()).empty() == (count > sl::kMaxRowCount), name, "a row's length");
    }
  }
}

// ---- damage ----------------------------------------------------------------------------------------------------

// FNV-1a of what stands before it.
void seal(sl::IndexHeader& header) {
  header.checksum = 1469598103934665603ull;
  for (size_t i = 0; i < offsetof(sl::IndexHeader, checksum); ++i) {
    header.checksum = (header.checksum ^ reinterpret_cast<unsigned char*>(&header)[i]) * 1099511628211ull;
  }
}

void test_header_errors(const sl::IndexLayout& layout) {
  SparseProblem p({0, 20, 30, layout.type});
  const std::vector<char> good = sl::pack_index(layout, p.bitmap());
  const auto bytes = int64_t(good.size());
  Exact<char> packed(good.data(), bytes);
  for (size_t i = 0; i < offsetof(sl::IndexHeader, padding); ++i) {  // what is behind it says nothing
    for (int bit = 0; bit < 8; ++bit) {
      packed[int64_t(i)] = char(packed[int64_t(i)] ^ (1 << bit));
      expect_error("header bit", kRemedy, [&] { sl::open_index(packed.data(), bytes); });
      packed[int64_t(i)] = char(packed[int64_t(i)] ^ (1 << bit));
    }
  }
  for (int64_t size : {int64_t(0), int64_t(64), int64_t(127), int64_t(128), bytes / 2, bytes - 64, bytes - 1}) {
    const Exact<char> part(good.data(), size);
    expect_error("truncated", kRemedy, [&] { sl::open_index(part.data(), size); });
  }
  Exact<char> longer(bytes + 64);
  std::memcpy(longer.data(), good.data(), good.size());
  expect_error("too long", kRemedy, [&] { sl::open_index(longer.data(), bytes + 64); });
  std::memcpy(longer.data() + 1, good.data(), good.size());
  expect_error("misaligned", "64-byte aligned", [&] { sl::open_index(longer.data() + 1, bytes); });

  // What a whole header may still say: of another version of this library, of other sizes.
  const std::pair<const char*, std::function<void(sl::IndexHeader&)>> changes[] = {
      {"not the index form", [](sl::IndexHeader& h) { h.magic ^= 1; }},
      {"has version 2, expected 1", [](sl::IndexHeader& h) { h.version = 2; }},
      {"unknown layout 11", [](sl::IndexHeader& h) { h.layout = 11; }},
      {"[N=100, K=30] should have", [](sl::IndexHeader& h) { h.n = 100; }},
      {"should have", [](sl::IndexHeader& h) { h.list_count += 32; }},
      {"should have", [](sl::IndexHeader& h) { h.value_count += 32; }},
      {"should have", [](sl::IndexHeader& h) { h.total_bytes += 64; }},
  };
  for (const auto& [message, change] : changes) {
    sl::IndexHeader header;
    std::memcpy(&header, good.data(), sizeof header);
    change(header);
    seal(header);
    std::memcpy(packed.data(), &header, sizeof header);
    expect_error(message, message, [&] { sl::open_index(packed.data(), bytes); });
    expect_error(message, kRemedy, [&] { sl::open_index(packed.data(), bytes); });
  }
}

}  // namespace

int main() {
  unsetenv("PYCOMPRESS_ISA");
  test_gather_choice();
  test_limits();
  for (const sl::IndexLayout* layout : kLayouts) test_header_errors(*layout);
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
