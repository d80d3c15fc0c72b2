// The specification: plain loops. Every other kernel is tested against this one.
#include "int8_embedding/int8_embedding.h"

namespace pycompress::int8_embedding {
namespace {

float value(const Args& a, int64_t i, int64_t d) {
  const int64_t row = whole(a.index, a.wide, i);
  const float weight = a.weight == nullptr ? 1.0f : a.weight[i];
  return weight * a.table.scale[row] * float(a.table.rows[row * a.table.d + d]);
}

float reduced(const Args& a, int64_t bag, int64_t d) {
  float result = 0;
  int64_t terms = 0;
  for (int64_t i = bag_begin(a, bag); i < bag_begin(a, bag + 1); ++i) {
    if (whole(a.index, a.wide, i) == a.padding) continue;
    const float v = value(a, i, d);
    if (a.reduce == Reduce::max) {
      result = terms == 0 || v > result ? v : result;
    } else {
      result += v;
    }
    ++terms;
  }
  return a.reduce == Reduce::mean && terms > 0 ? result / float(terms) : result;
}

void run_outputs(const Args& a, Range outputs) {
  for (int64_t out = outputs.begin; out < outputs.end; ++out) {
    for (int64_t d = 0; d < a.table.d; ++d) {
      const float v = a.reduce == Reduce::rows ? value(a, out, d) : reduced(a, out, d);
      store_float(a.y, out * a.table.d + d, a.dtype, v);
    }
  }
}

}  // namespace

const Kernel kScalar{"int8_embedding_scalar", Isa::scalar, run_outputs};

}  // namespace pycompress::int8_embedding
