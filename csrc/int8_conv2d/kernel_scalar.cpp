// The specification: plain loops, any layout, any CPU. Every other kernel is tested against this one.
#include <cfloat>
#include <cmath>

#include "int8_conv2d/int8_conv2d.h"
#include "int8_matmul/scalar_rows.h"

namespace pycompress::int8_conv2d {
namespace {

float largest(const char* x, int64_t count, Dtype dtype) {
  float most = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(load_float(x, i, dtype));
    if (!(magnitude <= FLT_MAX)) return magnitude;
    if (magnitude > most) most = magnitude;
  }
  return most;
}

int16_t step_of(float x, const Grid& grid) {
  return int16_t(int32_t(std::nearbyint(int8_matmul::clamp(x * grid.inverse, grid.low, grid.high))) + grid.zero);
}

void quantize(const Quantize& q) {
  const Args& a = *q.args;
  const Geometry& g = *q.geometry;
  const int64_t per_group = a.c / q.groups;
  auto* out = static_cast<int16_t*>(q.buffer) + q.rows.begin * g.columns * g.pixel;
  for (int64_t r = q.rows.begin; r < q.rows.end; ++r) {
    for (int64_t s = 0; s < g.columns; ++s) {
      const int64_t i = r * g.row_step - a.pad_top, j = s * g.column_step - a.pad_left;
      const bool inside = i >= 0 && i < a.h && j >= 0 && j < a.w;
      for (int64_t k = 0; k < g.pixel; ++k, ++out) {
        const int64_t group = k / g.padded, c = k % g.padded;
        *out = 0;
        if (!inside || c >= per_group || q.grid.inverse == 0.0f) continue;
        const int64_t at = (group * per_group + c) * a.x_stride_c + i * a.x_stride_h + j * a.x_stride_w;
        *out = step_of(load_float(q.image, at, a.dtype), q.grid);
      }
    }
  }
}

int32_t dot(const int16_t* window, const Geometry& g, const int8_t* w, int64_t run_values) {
  int32_t sum = 0;
  for (int64_t r = 0; r < g.runs; ++r) {
    for (int64_t i = 0; i < run_values; ++i) sum += int32_t(window[g.run[r] + i]) * *w++;
  }
  return sum;
}

void multiply(const Multiply& m) {
  const Args& a = *m.args;
  const Geometry& g = *m.geometry;
  const WeightShape& s = m.weight->shape;
  const Layout& layout = *m.weight->layout;
  const int64_t per_group = s.out / s.groups, pixels = a.out_h * a.out_w, blocks = block_count(pixels);
  const int64_t panels = int8_matmul::panel_count(layout, per_group), terms = s.kh * s.kw * m.weight->padded;
  auto* w = reinterpret_cast<int8_t*>(m.scratch);
  for (int64_t p = m.panels.begin; p < m.panels.end; ++p) {
    const int64_t group = p / panels, begin = p % panels * layout.nr;
    const int64_t end = begin + layout.nr < per_group ? begin + layout.nr : per_group;
    for (int64_t n = begin; n < end; ++n) {
      int8_matmul::unpack_row(group_weight(*m.weight, group), n, w);
      const int64_t o = group * per_group + n;
      for (int64_t b = m.blocks.begin; b < m.blocks.end; ++b) {
        const int64_t image = b / blocks, first = b % blocks * kBlock;
        const int64_t last = b % blocks == blocks - 1 ? pixels : first + kBlock;
        const auto* x = static_cast<const int16_t*>(m.buffer) + image * g.image + group * g.padded;
        for (int64_t pixel = first; pixel < last; ++pixel) {
          const int64_t start = pixel / a.out_w * g.window_row + pixel % a.out_w * g.window_col;
          const int32_t sum = dot(x + start, g, w, terms / g.runs);
          const float value = float(sum) * m.scale[o] * m.x_scale[image] + m.bias[o];
          const int64_t at = a.channels_last ? ((m.first + image) * pixels + pixel) * s.out + o
                                             : ((m.first + image) * s.out + o) * pixels + pixel;
          store_float(a.y, at, a.dtype, int8_matmul::activate(value, a.activation));
        }
      }
    }
  }
}

}  // namespace

const Kernel kScalar{
    "int8_conv2d_scalar", Isa::scalar, int8_matmul::kRowMajor, 2, false, kMaxTerms, largest, quantize, multiply};

}  // namespace pycompress::int8_conv2d
