"""int8 linear layer in Triton. The contract, edge cases included, is ``csrc/int8_matmul/int8_matmul.h``.

``y[m, n] = act(x_scale[m] * weight_scale[n] * sum_k (qx[m, k] - zero_point) * qw[n, k] + bias[n])``

Up to four launches, on the current stream of x's device, without synchronisation:

====================  =================================================  =============================================
kernel                makes                                              when
====================  =================================================  =============================================
``_quantize_rows``    q int8 ``(M, K)``, x_scale ``(M,)``                dynamic and static mode
``_sum_weight_rows``  ``sum_k qw[n, k]`` int32 ``(N,)``                  static mode with many rows
``_multiply``         y; with split K int32 or fp32 sums ``(S, M, N)``   always
``_finish``           y from those sums                                  split K
====================  =================================================  =============================================

x may have two levels of rows, ``x[m, k]`` at ``(m // inner_rows) * outer_stride + (m % inner_rows) * row_stride +
k * col_stride``. In static mode q is stored less 128, to be int8; the sums of the weight's rows undo it:
``sum (q - zero_point) qw = sum (q - 128) qw - (zero_point - 128) sum qw``.
input_scale and input_zero_point are read on the device and not checked: that would take a synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycompress.gpu import capability
from pycompress.ops.int8_matmul_reference import Call
from pycompress.ops.rows import row_layout

from .common import OPTIONS, float_dot, grouped_tile, magnitude_bits, on_device_of, round_to_int, store_outputs
from .int8_matmul_tuning import FINISH_COLUMNS, Tiling, autotuned, kind_of, pick, row_block

# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _largest_bits(row, K, col_stride, BLOCK: tl.constexpr):
    """Bits of the largest magnitude in a row of x, infinity and NaN counted as the largest of all."""
    k = tl.arange(0, BLOCK)
    bits = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, K, BLOCK):
        in_k = k0 + k < K
        v = tl.load(row + (k0 + k).to(tl.int64) * col_stride, mask=in_k, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, magnitude_bits(v))
    return tl.max(bits, axis=0)


@triton.jit
def _quantize(v, step, low, high, shift):
    """int8 of ``rne(clamp(v * step, low, high)) + shift``."""
    # The clamp keeps product and rounding apart: fused they would round once, and ties would fall otherwise.
    return (round_to_int(tl.minimum(tl.maximum(v * step, low), high)) + shift).to(tl.int8)


@triton.jit(do_not_specialize=["inner_rows"])
def _quantize_rows(
    x, q, x_scale, input_scale, input_zero_point,
    K, inner_rows, outer_stride, row_stride, col_stride, ldq,
    STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, read twice; the second time it comes from the cache."""
    m = tl.program_id(0)
    row = x + (m // inner_rows).to(tl.int64) * outer_stride + (m % inner_rows).to(tl.int64) * row_stride
    bits = _largest_bits(row, K, col_stride, BLOCK)
    finite = bits < 0x7F800000
    if STATIC:
        scale = tl.load(input_scale)
        zero_point = tl.load(input_zero_point)
        low, high, shift = -zero_point.to(tl.float32), (255 - zero_point).to(tl.float32), zero_point - 128
    else:
        largest = bits.to(tl.float32, bitcast=True)
        scale = tl.maximum(tl.div_rn(largest, 127.0), 1.1754943508222875e-38)  # keeps 1 / scale finite
        low, high, shift = -127.0, 127.0, 0
    # Division is exact to the last bit, as the reference divides. A row that is not finite is multiplied by its scale.
    step = tl.div_rn(1.0, scale)
    k = tl.arange(0, BLOCK)
    for k0 in range(0, K, BLOCK):
        in_k = k0 + k < K
        v = tl.load(row + (k0 + k).to(tl.int64) * col_stride, mask=in_k, other=0.0).to(tl.float32)
        v = tl.where(finite, v, 0.0)
        tl.store(q + m.to(tl.int64) * ldq + k0 + k, _quantize(v, step, low, high, shift), mask=in_k)
    tl.store(x_scale + m, tl.where(finite, scale, float("nan")))


@triton.jit
def _sum_weight_rows(weight, sums, K, BLOCK: tl.constexpr):
    """One row of the weight a program."""
    n = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, K, BLOCK):
        total += tl.load(weight + n.to(tl.int64) * K + k0 + k, mask=k0 + k < K, other=0).to(tl.int32)
    tl.store(sums + n, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["M", "inner_rows"])
def _multiply(
    x, weight, y, partial, x_scale, weight_scale, bias, zero_point, weight_sums,
    M, N, K, inner_rows, outer_stride, row_stride, k_per_split,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    SUM_WEIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of y a program; with SPLIT over the k of program_id(1) alone, into ``partial``.

    x: q int8, or in weight_only mode x itself, k contiguous. EVEN_K: K is a multiple of BK.
    SUM_WEIGHT: static mode sums the weight on its way, otherwise it finds ``weight_sums``.
    """
    tl.static_assert(MODE != "static" or SUM_WEIGHT or not SPLIT, "weight_sums are over all k")
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n, k = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    begin, end = 0, K
    if SPLIT:
        begin = tl.program_id(1) * k_per_split
        end = tl.minimum(begin + k_per_split, K)

    # Rows and columns beyond the last read the first: what they give is not stored.
    row, out = tl.where(m < M, m, 0), tl.where(n < N, n, 0).to(tl.int64)
    row_offset = (row // inner_rows).to(tl.int64) * outer_stride + (row % inner_rows).to(tl.int64) * row_stride
    x_tile = x + row_offset[:, None] + (begin + k)[None, :]
    weight_tile = weight + (out * K)[None, :] + (begin + k)[:, None]
    sums = tl.zeros((BM, BN), tl.float32 if MODE == "weight_only" else tl.int32)
    column_sums = tl.zeros((BN,), tl.int32)
    for k0 in range(begin, end, BK):
        if EVEN_K:
            a, w = tl.load(x_tile), tl.load(weight_tile)
        else:
            in_k = k < end - k0
            a = tl.load(x_tile, mask=in_k[None, :], other=0)
            w = tl.load(weight_tile, mask=in_k[:, None], other=0)
        sums = float_dot(a, w, sums) if MODE == "weight_only" else tl.dot(a, w, sums, out_dtype=tl.int32)
        if SUM_WEIGHT:
            column_sums += tl.sum(w.to(tl.int32), axis=0)
        x_tile += BK
        weight_tile += BK

    if MODE == "static":
        if not SUM_WEIGHT:
            column_sums = tl.load(weight_sums + n, mask=n < N, other=0)
        sums -= (tl.load(zero_point) - 128) * column_sums[None, :]
    if SPLIT:
        to = partial + (tl.program_id(1).to(tl.int64) * M + m)[:, None] * N + n[None, :]
        tl.store(to, sums, mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        store_outputs(
            sums, m, n, y, x_scale, weight_scale, bias, M, N, ACTIVATION, MODE != "weight_only", True, HAS_BIAS
        )


@triton.jit(do_not_specialize=["M", "splits"])
def _finish(
    partial, y, x_scale, weight_scale, bias, M, N, splits,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of a row of y a program. Always in the order of k: a result does not depend on who was first."""
    m, n = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((1, BN), tl.float32 if MODE == "weight_only" else tl.int64)
    for split in range(splits):
        at = partial + (tl.full((1, 1), split, tl.int64) * M + m[:, None]) * N + n[None, :]
        sums += tl.load(at, mask=(n < N)[None, :], other=0).to(sums.dtype)
    store_outputs(sums, m, n, y, x_scale, weight_scale, bias, M, N, ACTIVATION, MODE != "weight_only", True, HAS_BIAS)


# ---- launcher -------------------------------------------------------------------------------------------------


def quantize_rows(
    x: Tensor, input_scale: Tensor | None = None, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """int8 rows of ``x`` ``(..., K)``, and their float32 scales ``(M,)``; NaN where a row is not finite.

    Dynamic, or with ``input_scale`` and ``zero_point`` static, then less 128. The rows are a multiple of 16 bytes
    apart, so that any K can be loaded 16 bytes at a time: the first is a view ``(M, K)``.
    """
    x, (m, k, inner, outer_stride, row_stride, col_stride) = row_layout(x)
    ldq = triton.cdiv(k, 16) * 16
    q = torch.empty(m, ldq, dtype=torch.int8, device=x.device)
    x_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    block, warps = row_block(k)
    if m:
        _quantize_rows[(m,)](
            x, q, x_scale, input_scale, zero_point, k, inner, outer_stride, row_stride, col_stride, ldq,
            STATIC=input_scale is not None, BLOCK=block, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return q[:, :k], x_scale


@dataclass(frozen=True)
class _Rows:
    """What is multiplied: q, or in weight_only mode x; its rows in two levels, k contiguous."""

    x: Tensor
    x_scale: Tensor | None
    m: int
    inner_rows: int
    outer_stride: int
    row_stride: int


def _prepare(call: Call) -> _Rows:
    if call.mode == "weight_only":
        # The tiles are loaded along k: where it is not contiguous, a copy costs less than loads of one element.
        x, x_scale = (call.x if call.x.stride(-1) == 1 else call.x.contiguous()), None
    else:
        x, x_scale = quantize_rows(call.x, call.input_scale, call.input_zero_point)
    x, (m, _, inner_rows, outer_stride, row_stride, _) = row_layout(x)
    return _Rows(x, x_scale, m, inner_rows, outer_stride, row_stride)


def int8_linear(call: Call) -> Tensor:
    """The Triton backend: checked arguments, on one GPU (or interpreted on the CPU)."""
    n, k = call.weight_scale.shape[0], call.x.shape[-1]
    y = torch.empty((*call.x.shape[:-1], n), dtype=call.x.dtype, device=call.x.device)
    if y.numel() == 0:
        return y
    weight = call.weight.contiguous()
    with on_device_of(call.x):
        rows = _prepare(call)
        starts = (k, weight.data_ptr(), rows.x.data_ptr(), rows.outer_stride, rows.row_stride)
        shape = (rows.m, n, k, capability(call.x), kind_of(call), any(start % 16 for start in starts))

        def launch(tiling: Tiling) -> None:
            _launch(call, tiling, rows, weight, y)

        launch(autotuned(shape, launch) or pick(*shape))
    return y


def _launch(call: Call, tiling: Tiling, rows: _Rows, weight: Tensor, y: Tensor) -> None:
    """Multiplies by this tiling."""
    (n, k), m, device = weight.shape, rows.m, y.device
    # Few rows of tiles read the weight little more than once: its sums cost nothing there. Many would sum it anew each.
    static, split = call.mode == "static", tiling.splits > 1
    sum_weight = static and tiling.block_m <= 64
    weight_sums = partial = None
    if static and not sum_weight:
        weight_sums = torch.empty(n, dtype=torch.int32, device=device)
        block, warps = row_block(k)
        _sum_weight_rows[(n,)](weight, weight_sums, k, BLOCK=block, num_warps=warps, **OPTIONS)
    if split:
        sum_type = torch.float32 if call.mode == "weight_only" else torch.int32
        partial = torch.empty(tiling.splits, m, n, dtype=sum_type, device=device)
    common = {"MODE": call.mode, "ACTIVATION": call.activation, "HAS_BIAS": call.bias is not None, **OPTIONS}
    _multiply[(tiling.tiles(m, n), tiling.splits)](
        rows.x, weight, None if split else y, partial, rows.x_scale, call.weight_scale, call.bias,
        call.input_zero_point, weight_sums,
        m, n, k, rows.inner_rows, rows.outer_stride, rows.row_stride, tiling.k_per_split(k),
        EVEN_K=k % tiling.block_k == 0, SPLIT=split, SUM_WEIGHT=sum_weight,
        BM=tiling.block_m, BN=tiling.block_n, BK=tiling.block_k, GROUP=tiling.group,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **common,
    )  # fmt: skip
    if split:
        _finish[(m, triton.cdiv(n, FINISH_COLUMNS))](
            partial, y, rows.x_scale, call.weight_scale, call.bias, m, n, tiling.splits,
            BN=FINISH_COLUMNS, num_warps=2, **common,
        )  # fmt: skip
