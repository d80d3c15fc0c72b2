// A panel of the packed weight, and how its bits become numbers. Include after Vec. See panel_engine.h.
#pragma once

#include "int4_matmul/kind.h"
#include "int8_matmul/prepare_rows.h"
#include "int8_matmul/tiles.h"

namespace pycompress::int4_matmul {
namespace {

using int8_matmul::at_least;
using int8_matmul::at_most;
using int8_matmul::round_up;

struct Panel {
  const uint8_t* data;
  int64_t width;  // outputs, padded to whole registers
  int64_t head;   // head_bytes
  Groups groups;
};

constexpr int kTileRows = 6;  // of x that meet the weight at a time: with four registers of outputs 24 sums

// Bytes of weight fetched ahead of their use. The decoding fills the window of instructions in flight, so that they do
// not reach far enough ahead by themselves: at M = 1 37 GB/s of 39.5 that the memory gives, 30 with 4096, 20 with none.
constexpr int64_t kDecodeAhead = 12288;

// Neighbouring units of one group.
struct Segment {
  const uint8_t* group;  // its scales and zero points
  const uint8_t* w;
  int64_t units;
};

// A panel from its first unit to its last.
class Walk {
 public:
  explicit Walk(const Panel& panel) : panel_(&panel), group_(panel.data) {}

  // The next units, at most `limit` of them; none at the end.
  Segment next(int64_t limit) {
    if (g_ == panel_->groups.count) return {group_, group_, 0};
    const int64_t units = g_ + 1 < panel_->groups.count ? panel_->groups.units : panel_->groups.last_units;
    const Segment segment{group_, group_ + panel_->head + unit_ * panel_->width * 4, at_most(limit, units - unit_)};
    unit_ += segment.units;
    if (unit_ == units) {
      group_ += panel_->head + units * panel_->width * 4;
      unit_ = 0;
      ++g_;
    }
    return segment;
  }

 private:
  const Panel* panel_;
  const uint8_t* group_;
  int64_t g_ = 0, unit_ = 0;  // the next is unit_ of group g_, which starts at group_
};

// ---- from bits to numbers --------------------------------------------------------------------------------------

// w / scale
template <class Isa, Kind KIND>
struct Source {
  static constexpr bool kHasZero = KIND == Kind::asymmetric;
  typename Isa::Table table{values_of(KIND)};

  template <int I>
  static Vec::F value(Vec::I units, const typename Isa::Offsets& offsets) {
    return Isa::template step<I>(units, offsets);
  }
  template <int I>
  Vec::F value(Vec::I units, Vec::F zero) const {
    const Vec::F v = Isa::template decode<I, KIND>(units, table);
    return kHasZero ? Vec::sub(v, zero) : v;
  }
};

// Scales and zero points of a group, from register `first` of the panel's outputs on.
template <class Source>
struct GroupHead {
  const float* scales;
  const uint8_t* zeros;

  GroupHead(const uint8_t* group, int64_t width, int64_t first)
      : scales(reinterpret_cast<const float*>(group) + first * Vec::kLanes),
        zeros(group + width * 4 + first * Vec::kLanes) {}
  Vec::F scale(int j) const { return Vec::load(scales + j * Vec::kLanes); }
  template <class Isa>
  Vec::F zero(int j) const {
    if constexpr (Source::kHasZero) return Isa::zero_points(zeros + j * Vec::kLanes);
    return Vec::zero();
  }
};

}  // namespace
}  // namespace pycompress::int4_matmul
