#include "int8_conv2d/int8_conv2d.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "common/kernel_table.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace pycompress::int8_conv2d {
namespace {

// Best first; the one place that decides.
constexpr const Kernel* kKernels[] = {
#ifdef PYCOMPRESS_HAVE_AVX512VNNI
    &kAvx512Vnni,
#endif
#ifdef PYCOMPRESS_HAVE_AVXVNNI
    &kAvxVnni,
#endif
#ifdef PYCOMPRESS_HAVE_AVX512
    &kAvx512,
#endif
#ifdef PYCOMPRESS_HAVE_AVX2
    &kAvx2,
#endif
    &kScalar,
};

constexpr int64_t kWaveBytes = 256 * 1024;  // of images that a thread quantises before it multiplies: part of L2
constexpr int64_t kSoloBytes = 2 << 20;     // a larger image is shared by all threads
constexpr int64_t kTeamBytes = 16 << 20;    // of images that all threads quantise before they multiply
constexpr double kFewProducts = 1 << 20;    // microseconds: a team is not worth waking
constexpr int64_t kOverread = 64;           // whole registers of scales and bias are read behind the last
constexpr int64_t kLargestGeometry = int64_t(1) << 40;

// ---- checks ----------------------------------------------------------------------------------------------------

// Windows along one side: the last starts inside what the padding in front and the image span.
void check_side(const char* side, int64_t size, int64_t stride, int64_t pad, int64_t dilation, int64_t out) {
  constexpr int64_t kMost = int64_t(1) << 30;
  check(size >= 0 && size <= kMost && stride >= 1 && stride <= kMost && pad >= 0 && pad <= kMost && dilation >= 1 &&
            dilation <= kMost && out >= 1 && out <= kMost,
        "int8_conv2d: ", side, " of x ", size, ", stride ", stride, ", padding ", pad, ", dilation ", dilation,
        ", of y ", out, " is out of range");
}

void check_args(const Args& a, const PackedConv& w) {
  check(a.n >= 0 && a.threads >= 1, "int8_conv2d: N=", a.n, ", threads=", a.threads);
  check(a.c == w.shape.per_group * w.shape.groups, "int8_conv2d: x has C=", a.c, " but weight has ", w.shape.per_group,
        " channels in each of ", w.shape.groups, " groups");
  check_side("height", a.h, a.stride_h, a.pad_top, a.dilation_h, a.out_h);
  check_side("width", a.w, a.stride_w, a.pad_left, a.dilation_w, a.out_w);
  const bool work = a.n * w.shape.out > 0;
  check(!work || (a.y != nullptr && a.weight_scale != nullptr), "int8_conv2d: y or weight_scale is missing");
  check(a.n * a.c * a.h * a.w == 0 || a.x != nullptr, "int8_conv2d: x is missing");
  check(a.x_stride_c == 1 || a.x_stride_w == 1 || a.n * a.c * a.h * a.w == 0,
        "int8_conv2d: neither the channels nor the columns of x are adjacent (strides ", a.x_stride_c, " and ",
        a.x_stride_w, "); copy x first");
  if (a.mode == Mode::static_) {
    check(a.input_scale != nullptr && a.input_zero_point != nullptr,
          "int8_conv2d: static mode needs input_scale and input_zero_point");
    const float scale = *a.input_scale;
    check(std::isnormal(scale) && scale > 0, "int8_conv2d: input_scale=", scale, ", expected a positive normal number");
    const int32_t zero_point = *a.input_zero_point;
    check(zero_point >= 0 && zero_point <= 255, "int8_conv2d: input_zero_point=", zero_point, ", expected 0 to 255");
  } else {
    check(a.mode == Mode::dynamic_, "int8_conv2d: weight_only multiplies in float, which is not done here");
    check(a.input_scale == nullptr && a.input_zero_point == nullptr,
          "int8_conv2d: input_scale and input_zero_point belong to static mode");
  }
}

// ---- geometry --------------------------------------------------------------------------------------------------

Geometry make_geometry(const Args& a, const PackedConv& weight, int element_bytes, std::vector<int64_t>& runs) {
  const WeightShape& s = weight.shape;
  Geometry g{};
  g.padded = weight.padded;
  g.pixel = s.groups * g.padded;
  g.by_pixel = a.x_stride_c == 1 && !(a.x_stride_w == 1 && a.w > 1);
  // A kernel of one row leaves out the rows between its windows; likewise columns, where they can be skipped cheaply.
  g.row_step = s.kh == 1 ? a.stride_h : 1;
  g.column_step = s.kw == 1 && g.by_pixel ? a.stride_w : 1;
  const int64_t below = a.stride_h / g.row_step, right = a.stride_w / g.column_step;
  g.rows = (a.out_h - 1) * below + (s.kh - 1) * a.dilation_h + 1;
  g.columns = (a.out_w - 1) * right + (s.kw - 1) * a.dilation_w + 1;
  check(double(g.rows) * double(g.columns) * double(std::max<int64_t>(g.pixel, 1)) < double(kLargestGeometry),
        "int8_conv2d: a padded image of ", g.rows, " x ", g.columns, " x ", g.pixel, " is out of range");
  g.window_row = below * g.columns * g.pixel;
  g.window_col = right * g.pixel;
  const int64_t line = kAlignment / element_bytes;
  g.image = (g.rows * g.columns * g.pixel + line - 1) / line * line;

  const bool adjacent = s.groups == 1 && (a.dilation_w == 1 || s.kw == 1);
  for (int64_t i = 0; i < s.kh; ++i) {
    for (int64_t j = 0; j < (adjacent ? 1 : s.kw); ++j) {
      runs.push_back((i * a.dilation_h * g.columns + j * a.dilation_w) * g.pixel);
    }
  }
  g.run = runs.data();
  g.runs = int64_t(runs.size());
  g.run_groups = (adjacent ? s.kw : 1) * g.padded / weight.layout->ku;
  return g;
}

// ---- the scale of an image -------------------------------------------------------------------------------------

// An image of x as `count` runs of `length` adjacent elements.
struct Runs {
  int64_t count, length, inner, outer_stride, inner_stride;
  int64_t start(int64_t i) const { return i / inner * outer_stride + i % inner * inner_stride; }
};

Runs image_runs(const Args& a, bool by_pixel) {
  struct Level {
    int64_t size, stride;
  } levels[3] = {{a.c, a.x_stride_c}, {a.h, a.x_stride_h}, {a.w, a.x_stride_w}};
  if (by_pixel) std::rotate(levels, levels + 1, levels + 3);
  int64_t length = levels[2].size;
  int last = 1;
  while (last >= 0 && (levels[last].stride == length || levels[last].size == 1)) length *= levels[last--].size;
  if (last < 0) return {1, length, 1, 0, 0};
  if (last == 0) return {levels[0].size, length, 1, levels[0].stride, 0};
  return {levels[0].size * levels[1].size, length, levels[1].size, levels[0].stride, levels[1].stride};
}

float worse(float a, float b) {
  if (!(a <= FLT_MAX)) return a;
  return !(b <= FLT_MAX) || b > a ? b : a;
}

// Part `part` of `parts` of max |x[n]|.
float largest(const Args& a, const Kernel& kernel, const Runs& runs, int64_t n, int64_t part, int64_t parts) {
  const int64_t size = dtype_size(a.dtype);
  const char* image = static_cast<const char*>(a.x) + n * a.x_stride_n * size;
  if (runs.count == 1) {
    const Range r = split(runs.length, parts, part);
    return kernel.largest(image + r.begin * size, r.end - r.begin, a.dtype);
  }
  float most = 0.0f;
  const Range share = split(runs.count, parts, part);
  for (int64_t i = share.begin; i < share.end; ++i) {
    most = worse(most, kernel.largest(image + runs.start(i) * size, runs.length, a.dtype));
  }
  return most;
}

float image_scale(const Args& a, float most) {
  if (!(most <= FLT_MAX)) return NAN;  // NaN or Inf in the image
  return a.mode == Mode::static_ ? *a.input_scale : std::fmax(most / 127.0f, FLT_MIN);
}

Grid image_grid(const Args& a, const Kernel& kernel, float scale) {
  const int32_t zero_point = a.mode == Mode::static_ ? *a.input_zero_point : 128;
  const float low = a.mode == Mode::static_ ? float(-zero_point) : -127.0f;
  const float high = a.mode == Mode::static_ ? float(255 - zero_point) : 127.0f;
  return {std::isnan(scale) ? 0.0f : 1.0f / scale, low, high, kernel.is_unsigned ? zero_point : 0};
}

// ---- sharing out -----------------------------------------------------------------------------------------------

struct Problem {
  const Args& a;
  const PackedConv& weight;
  const Kernel& kernel;
  Geometry g;
  Runs runs;
  const float *bias, *scale;
  int64_t blocks, panels;  // of an image; of all groups
};

void quantize(const Problem& p, int64_t n, Range rows, float scale, char* buffer) {
  const char* image = static_cast<const char*>(p.a.x) + n * p.a.x_stride_n * dtype_size(p.a.dtype);
  p.kernel.quantize({&p.a, &p.g, image_grid(p.a, p.kernel, scale), image, rows, buffer, p.weight.shape.groups});
}

void multiply(const Problem& p, const float* scales, const char* buffer, int64_t first, Range blocks, Range panels,
              char* scratch) {
  p.kernel.multiply({&p.a, &p.g, &p.weight, p.bias, p.scale, scales, image_grid(p.a, p.kernel, 1.0f).zero, buffer,
                     first, blocks, panels, scratch});
}

// One thread alone, some images at a time.
void solo(const Problem& p, Range images, int64_t wave, char* buffer, float* scales, char* scratch) {
  const int64_t image_bytes = p.g.image * p.kernel.element_bytes;
  for (int64_t first = images.begin; first < images.end; first += wave) {
    const int64_t count = std::min(wave, images.end - first);
    for (int64_t i = 0; i < count; ++i) {
      scales[i] = image_scale(p.a, largest(p.a, p.kernel, p.runs, first + i, 0, 1));
      quantize(p, first + i, {0, p.g.rows}, scales[i], buffer + i * image_bytes);
    }
    multiply(p, scales, buffer, first, {0, count * p.blocks}, {0, p.panels}, scratch);
  }
}

struct Shares {
  int blocks, panels;
};

// Threads along the outputs of an image and along its channels: the products of the largest share, and what it reads.
Shares choose_shares(const Problem& p, int64_t blocks) {
  const double weight_bytes = double(p.weight.group_bytes * p.weight.shape.groups);
  const double block_bytes = double(p.g.image * p.kernel.element_bytes) / double(p.blocks);
  const double products = kBlock * double(p.g.runs * p.g.run_groups * p.weight.layout->ku) * p.weight.layout->nr;
  Shares best{1, 1};
  double best_cost = -1;
  for (int across = 1; across <= p.a.threads && across <= p.panels; ++across) {
    const int along = int(std::min<int64_t>(p.a.threads / across, blocks));
    const auto most_panels = double((p.panels + across - 1) / across),
               most_blocks = double((blocks + along - 1) / along);
    const double reads = weight_bytes * most_panels / double(p.panels) + block_bytes * most_blocks;
    const double cost = most_panels * most_blocks * products / 300 + reads / 30;  // nanoseconds, on a Zen 5 server
    if (best_cost < 0 || cost < best_cost) {
      best = {along, across};
      best_cost = cost;
    }
  }
  return best;
}

// All threads together on [first, first + count): scales, quantising and products, each shared out.
void team(const Problem& p, int64_t first, int64_t count, char* buffer, float* scales, float* parts, char* scratch) {
  const int64_t image_bytes = p.g.image * p.kernel.element_bytes, share = align(p.kernel.scratch_bytes);
  const int threads = p.a.threads;
  const int64_t pieces = (threads + count - 1) / count;  // of each image
  const int64_t items = count * pieces;
  parallel(threads, [&](int t) {
    const Range mine = split(items, threads, t);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      parts[i] = largest(p.a, p.kernel, p.runs, first + i / pieces, i % pieces, pieces);
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    float most = 0.0f;
    for (int64_t j = 0; j < pieces; ++j) most = worse(most, parts[i * pieces + j]);
    scales[i] = image_scale(p.a, most);
  }
  parallel(threads, [&](int t) {
    const Range mine = split(items, threads, t);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t image = i / pieces;
      quantize(p, first + image, split(p.g.rows, pieces, i % pieces), scales[image], buffer + image * image_bytes);
    }
  });
  const Shares shares = choose_shares(p, count * p.blocks);
  parallel(shares.blocks * shares.panels, [&](int t) {
    multiply(p, scales, buffer, first, split(count * p.blocks, shares.blocks, t / shares.panels),
             split(p.panels, shares.panels, t % shares.panels), scratch + t * share);
  });
}

// What each part of the scratch takes, and the images that go into it.
struct Plan {
  int64_t alone, wave, team_wave;  // images that threads take alone, at a time; that all take together
  int64_t columns, share, buffers, scales;
};

Plan make_plan(const Problem& p) {
  const int64_t image_bytes = p.g.image * p.kernel.element_bytes, threads = p.a.threads;
  const auto fit = [&](int64_t bytes) { return std::max<int64_t>(bytes / std::max<int64_t>(image_bytes, 1), 1); };
  Plan plan{};
  plan.alone = threads == 1 ? p.a.n : image_bytes <= kSoloBytes ? p.a.n / threads * threads : 0;
  plan.wave = std::min(fit(kWaveBytes), std::max<int64_t>(plan.alone / threads, 1));
  plan.team_wave = std::min(fit(kTeamBytes), p.a.n - plan.alone);
  plan.columns = align((p.weight.shape.out + kOverread) * 4);
  plan.share = align(p.kernel.scratch_bytes);
  const int64_t slots = std::max(plan.alone > 0 ? threads * plan.wave : 0, plan.team_wave);
  plan.buffers = align(slots * image_bytes);
  plan.scales = align((slots + 2 * threads + 2 * plan.team_wave) * 4);  // scales, then parts of maxima
  return plan;
}

// f32 with zeros behind the end, so that whole registers can be read.
const float* widened(const void* values, Dtype dtype, int64_t n, char* to) {
  auto* copy = reinterpret_cast<float*>(to);
  for (int64_t i = 0; i < n; ++i) copy[i] = values == nullptr ? 0.0f : load_float(values, i, dtype);
  std::fill(copy + n, copy + n + kOverread, 0.0f);
  return copy;
}

}  // namespace

const Kernel& best_kernel() { return best_of(kKernels); }
const Kernel& kernel_for(const Layout& layout) { return best_for(kKernels, layout); }

Prepared prepare(const void* packed, int64_t bytes) {
  const PackedConv weight = open_packed(packed, bytes);
  return {weight, &int8_conv2d::kernel_for(*weight.layout)};
}

void run(const Args& caller, const Prepared& prepared) {
  const PackedConv& weight = prepared.weight;
  const WeightShape& s = weight.shape;
  check_args(caller, weight);
  if (caller.n == 0 || s.out == 0) return;

  Args a = caller;
  const double products = double(a.n) * double(a.out_h * a.out_w) * double(s.out) * double(s.per_group * s.kh * s.kw);
  if (products < kFewProducts) a.threads = 1;
  std::vector<int64_t> runs;
  Problem p{a,
            weight,
            *prepared.kernel,
            {},
            {},
            nullptr,
            nullptr,
            block_count(a.out_h * a.out_w),
            s.groups * int8_matmul::panel_count(*weight.layout, s.out / s.groups)};
  p.g = make_geometry(a, weight, p.kernel.element_bytes, runs);
  p.runs = image_runs(a, p.g.by_pixel);

  // One reservation by the calling thread, so that nothing inside the team can fail.
  const Plan plan = make_plan(p);
  char* scratch =
      thread_scratch().reserve(size_t(2 * plan.columns + a.threads * plan.share + plan.buffers + plan.scales));
  p.scale = widened(a.weight_scale, Dtype::f32, s.out, scratch);
  p.bias = widened(a.bias, a.bias_dtype, s.out, scratch + plan.columns);
  char* shares = scratch + 2 * plan.columns;
  char* buffers = shares + a.threads * plan.share;
  auto* scales = reinterpret_cast<float*>(buffers + plan.buffers);

  const int64_t image_bytes = p.g.image * p.kernel.element_bytes;
  if (plan.alone > 0) {
    parallel(a.threads, [&](int t) {
      solo(p, split(plan.alone, a.threads, t), plan.wave, buffers + t * plan.wave * image_bytes, scales + t * plan.wave,
           shares + t * plan.share);
    });
  }
  for (int64_t first = plan.alone; first < a.n; first += plan.team_wave) {
    const int64_t count = std::min(plan.team_wave, a.n - first);
    team(p, first, count, buffers, scales, scales + plan.team_wave, shares);
  }
}

}  // namespace pycompress::int8_conv2d
