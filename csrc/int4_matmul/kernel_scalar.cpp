// The specification: plain loops, any layout, any CPU. Every other kernel is tested against this one.
#include "int4_matmul/int4_matmul.h"
#include "int8_matmul/scalar_rows.h"

namespace pycompress::int4_matmul {
namespace {

// A row of the weight as it was before packing.
struct Row {
  float* scale;         // [G]
  uint8_t* zero_point;  // [G], where the weight has them
  uint8_t* q;           // [ceil(K/2)]
};

// w[n,k] / scale: exact
float step(const Shape& s, const Row& row, int64_t k) {
  const int q = row.q[k / 2] >> (k % 2 * 4) & 15;
  if (s.format == Format::nf4) return kNf4[q];
  return float(q - (s.has_zero_point ? row.zero_point[k / s.group_size] : kSymmetricZeroPoint));
}

float dot(const Args& a, int64_t m, const Shape& s, const Row& row) {
  double sum = 0;
  for (int64_t k = 0; k < s.k; ++k) {
    sum += double(int8_matmul::element(a, m, k)) * step(s, row, k) * row.scale[k / s.group_size];
  }
  return float(sum);
}

void run(const Block& block) {
  const Args& a = *block.args;
  const Shape& s = block.weight.shape;
  const int64_t groups = groups_of(s).count;
  Row row;
  row.scale = reinterpret_cast<float*>(block.scratch);
  row.zero_point = reinterpret_cast<uint8_t*>(row.scale + groups);
  row.q = row.zero_point + groups;
  const int nr = block.weight.layout->nr;
  const int64_t n_end = block.panels.end * nr < a.n ? block.panels.end * nr : a.n;
  for (int64_t n = block.panels.begin * nr; n < n_end; ++n) {
    unpack_row(block.weight, n, row.q, row.scale, row.zero_point);
    for (int64_t m = block.rows.begin; m < block.rows.end; ++m) {
      const float value = dot(a, m, s, row) + block.bias[n];
      store_float(a.y, m * a.ldy + n, a.dtype, int8_matmul::activate(value, a.activation));
    }
  }
}

int64_t scratch_bytes(int64_t, const Shape& s) { return groups_of(s).count * 5 + (s.k + 1) / 2; }

}  // namespace

const Kernel kScalar{"int4_matmul_scalar", Isa::scalar, kRows, run, scratch_bytes};

}  // namespace pycompress::int4_matmul
