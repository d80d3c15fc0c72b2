// The specification: plain loops, any layout, any CPU. Every other kernel is tested against this one.
#include "int8_matmul/scalar_rows.h"

namespace pycompress::int8_matmul {
namespace {

constexpr int64_t kRows = 16;  // rows quantised at a time, so that each weight row is fetched once for all of them

int64_t dot(const int8_t* q, const int8_t* w, int32_t zero_point, int64_t k) {
  int64_t sum = 0;
  for (int64_t begin = 0; begin < k; begin += kMaxChunkK) {
    const int64_t end = begin + kMaxChunkK < k ? begin + kMaxChunkK : k;
    int32_t chunk = 0;
    for (int64_t i = begin; i < end; ++i) chunk += (int32_t(q[i]) - zero_point) * w[i];
    sum += chunk;
  }
  return sum;
}

float weight_only_dot(const Args& a, int64_t m, const int8_t* w) {
  double sum = 0;
  for (int64_t k = 0; k < a.k; ++k) sum += double(element(a, m, k)) * w[k];
  return float(sum);
}

void run_rows(const Block& block, Range rows) {
  const Args& a = *block.args;
  const bool quantized = a.mode != Mode::weight_only;
  auto* x_scale = reinterpret_cast<float*>(block.scratch);
  auto* q = reinterpret_cast<int8_t*>(x_scale + kRows);
  int8_t* foreign = q + kRows * a.k;  // a weight row, where the layout is not the plain one

  for (int64_t m = rows.begin; m < rows.end && quantized; ++m) {
    x_scale[m - rows.begin] = quantize_row(block, m, q + (m - rows.begin) * a.k);
  }
  const int nr = block.weight.layout->nr;
  const int64_t n_end = block.panels.end * nr < a.n ? block.panels.end * nr : a.n;
  for (int64_t n = block.panels.begin * nr; n < n_end; ++n) {
    const int8_t* w = foreign;
    if (block.weight.layout->id == kRowMajor.id) {
      w = reinterpret_cast<const int8_t*>(block.weight.panels + n * a.k);
    } else {
      unpack_row(block.weight, n, foreign);
    }
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const int64_t i = m - rows.begin;
      float value;
      if (quantized) {
        value = float(dot(q + i * a.k, w, block.zero_point, a.k)) * block.scale[n] * x_scale[i] + block.bias[n];
      } else {
        value = weight_only_dot(a, m, w) * block.scale[n] + block.bias[n];
      }
      store_float(a.y, m * a.ldy + n, a.dtype, activate(value, a.activation));
    }
  }
}

void run(const Block& block) {
  for (int64_t m = block.rows.begin; m < block.rows.end; m += kRows) {
    run_rows(block, {m, m + kRows < block.rows.end ? m + kRows : block.rows.end});
  }
}

int64_t scratch_bytes(Mode, int64_t k) { return kRows * 4 + (kRows + 1) * k; }

}  // namespace

const Kernel kScalar{"int8_matmul_scalar", Isa::scalar, kRowMajor, run, scratch_bytes};

}  // namespace pycompress::int8_matmul
