// The index form of sparse_linear, read by a decoder that knows only the drawing in index.h.
#pragma once

#include "sparse_linear/index_pack.h"
#include "sparse_linear_check.h"

namespace {

constexpr const char* kRemedy = "pack it again from the bitmap";

constexpr const sl::IndexLayout* kLayouts[] = {&sl::kFloats1, &sl::kFloats2, &sl::kFloats4, &sl::kHalves1,
                                               &sl::kHalves2, &sl::kHalves4, &sl::kQuads1,  &sl::kPairs2,
                                               &sl::kQuads2,  &sl::kPairs4,  &sl::kQuads4};

inline std::string layout_name(const sl::IndexLayout& layout) { return "layout " + std::to_string(layout.id); }

inline void expect(bool right, const std::string& where, const char* what) {
  if (right) return;
  std::printf("FAILED %s: %s\n", where.c_str(), what);
  ++failures;
}

inline int64_t strip_count(int64_t n) { return (n + sl::kStrip - 1) / sl::kStrip; }

// A packed weight in memory of its own, aligned, and opened.
struct Packed {
  Exact<char> memory;
  sl::IndexWeight weight;

  Packed(const sl::IndexLayout& layout, const sl::Bitmap& bitmap) : Packed(sl::pack_index(layout, bitmap)) {}
  explicit Packed(const std::vector<char>& bytes)
      : memory(bytes.data(), int64_t(bytes.size())), weight(sl::open_index(memory.data(), memory.count())) {}
};

// Column j of the value of one row at one unit.
inline double element_of(const sl::IndexLayout& layout, const char* value, int j) {
  if (layout.type == WeightType::f32) return pc::load_float(value, 0, Dtype::f32);
  if (layout.type == WeightType::bf16) return pc::load_float(value, 0, Dtype::bf16);
  if (layout.unit == 4) return reinterpret_cast<const int8_t*>(value)[j];
  return reinterpret_cast<const int16_t*>(value)[j];
}

// The weight that lists and values say, [N, K], by the drawing in index.h. `wrong` names what contradicts it.
inline std::vector<double> decode(const sl::IndexWeight& w, const char*& wrong) {
  const sl::IndexLayout& layout = *w.layout;
  const int bytes = sl::value_bytes(layout), columns = w.gather ? 4 : layout.unit;
  std::vector<double> dense(size_t(w.n * w.k));
  const auto add = [&](int64_t n, int64_t k, double value) {
    if (n < w.n && k < w.k) {
      dense[size_t(n * w.k + k)] += value;
    } else if (n >= w.n || value != 0) {  // a unit may end behind K
      wrong = "a weight outside the matrix";
    }
  };
  for (int64_t s = 0; s < strip_count(w.n); ++s) {
    const uint16_t *list = w.lists + w.strips[s].list, *const end = w.lists + w.strips[s + 1].list;
    const char* value = w.values + w.strips[s].value * bytes;
    int64_t n = s * sl::kStrip;
    while (list < end) {
      const int rows = *list++;
      if ((rows != 1 && rows != 2 && rows != 4) || rows > layout.max_group) {
        wrong = "a group of an impossible size";
        return dense;
      }
      const uint16_t* units = list + (1 << rows) - 1;
      for (int p = 1; p < 1 << rows; ++p) {
        for (int i = *list++; i > 0; --i, units += w.gather ? 4 : 1) {
          for (int r = 0; r < rows; ++r) {
            if ((p >> r & 1) == 0) continue;
            for (int j = 0; j < columns; ++j) {
              const int64_t k = w.gather ? units[j] : int64_t(*units) * columns + j;
              add(n + r, k, element_of(layout, value, j));
            }
            value += bytes;
          }
        }
      }
      list = units;
      n += rows;
    }
    if (list != end) wrong = "a strip's lists end elsewhere";
    if (value != w.values + w.strips[s + 1].value * bytes) wrong = "a strip's values end elsewhere";
    if (n < std::min(w.n, (s + 1) * sl::kStrip) || n > (s + 1) * sl::kStrip) wrong = "a strip of too few or many rows";
  }
  return dense;
}

inline void test_form(SparseProblem& p, const sl::IndexLayout& layout, const sl::IndexWeight& w) {
  const auto wrong = [&](const std::string& what) { fail(p, "pack_index", layout_name(layout).c_str(), what); };
  if (w.layout->id != layout.id || w.n != p.c.n || w.k != p.c.k || w.nnz != p.nnz) wrong("header");
  if (w.gather && !layout.may_gather) wrong("gathers where no kernel can");
  if (layout.type != WeightType::s8 && w.strips[strip_count(p.c.n)].value != p.nnz) wrong("a value that is not kept");
  const char* contradiction = nullptr;
  const std::vector<double> dense = decode(w, contradiction);
  if (contradiction != nullptr) wrong(contradiction);
  int64_t at = 0;
  for (int64_t n = 0; n < strip_count(p.c.n) * sl::kStrip; ++n) {
    double sum = 0;
    for (int64_t k = 0; k < p.c.k && n < p.c.n; ++k) {
      const double expected = p.keeps(n, k) ? p.value(at++) : 0.0;
      sum += expected;
      if (dense[size_t(n * p.c.k + k)] == expected) continue;
      return wrong("w[" + std::to_string(n) + "," + std::to_string(k) + "] is wrong");
    }
    if (w.row_init[n] != -layout.offset * sum) return wrong("row_init[" + std::to_string(n) + "]");
  }
}

// Four rows that keep the same columns are what 4 x 1 blocks are: only these are worth gathering, at the usual sparsity.

}  // namespace
