"""4-bit weight-only linear layer in Triton. The contract, edge cases included, is ``csrc/int4_matmul/int4_matmul.h``.

``y[m, n] = act(sum_k x[m, k] * w[n, k] + bias[n])``,
``w[n, k] = scale[n, g] * (q[n, k] - zero_point[n, g])`` or ``scale[n, g] * codebook[q[n, k]]``, ``g = k // group_size``

Up to two launches, on the current stream of x's device, without synchronisation:

=============  ======================================================  =============================================
kernel         makes                                                   when
=============  ======================================================  =============================================
``_multiply``  y; with split K fp32 sums ``(S, M, N)``                 always
``_finish``    y from those sums                                       split K
=============  ======================================================  =============================================

The weight is decoded in registers and is the left operand of the product, ``y^T = w x^T``. Whole numbers up to 15 are
exact in bf16 and fp16; the scale meets the fp32 sum of its group. NF4's values are not exact there: each is a sum of
two that are, multiplied one after the other, so that bf16 loses nothing of the weight. Groups that no step of 16 fills
are scaled weight by weight and multiplied in fp32.

x may have two levels of rows, as in ``int8_matmul.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycompress.gpu import capability
from pycompress.ops.int4_matmul_reference import Call
from pycompress.ops.int4_matmul_weight import NF4
from pycompress.ops.rows import row_layout

from .common import OPTIONS, Shipped, float_dot, grouped_tile, on_device_of, store_outputs
from .common import shipped as configuration
from .int4_matmul_tuning import FINISH_COLUMNS, LEAST_BLOCK_K, TILINGS, kind_of, ladder, pick, step_of
from .int8_matmul_tuning import Tiling

# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _load_nibbles(weight_tile, left, in_range, EVEN_K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """int32 (BN, BK) in 0..15 of the bytes (BN, BK / 2) at weight_tile, of which ``left`` weights are there."""
    pair = tl.load(weight_tile) if EVEN_K else tl.load(weight_tile, mask=in_range[None, :] < left, other=0)
    return tl.reshape(tl.join(pair & 15, pair >> 4), (BN, BK)).to(tl.int32)


@triton.jit(do_not_specialize=["M", "inner_rows"])
def _multiply(
    x, weight, weight_scale, zero_point, codebook, bias, y, partial,
    M, N, K, groups, group_size, row_bytes, inner_rows, outer_stride, row_stride, k_per_split,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, NF4: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
    BY_WEIGHT: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of y a program; with SPLIT over the k of program_id(1) alone, into ``partial``.

    BY_WEIGHT: a step of BK may cross groups. EVEN_K: K is a multiple of BK. k of x is contiguous.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n, k = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    pair = tl.arange(0, BK // 2)
    begin, end = 0, K
    if SPLIT:
        begin = tl.program_id(1) * k_per_split
        end = tl.minimum(begin + k_per_split, K)

    # Rows and columns beyond the last read the first: what they give is not stored.
    row, out = tl.where(m < M, m, 0), tl.where(n < N, n, 0).to(tl.int64)
    row_offset = (row // inner_rows).to(tl.int64) * outer_stride + (row % inner_rows).to(tl.int64) * row_stride
    x_tile = x + row_offset[None, :] + (begin + k)[:, None]
    weight_tile = weight + (out * row_bytes)[:, None] + (begin // 2 + pair)[None, :]
    sums = tl.zeros((BN, BM), tl.float32)
    for k0 in range(begin, end, BK):
        tokens = tl.load(x_tile) if EVEN_K else tl.load(x_tile, mask=(k < end - k0)[:, None], other=0)
        q = _load_nibbles(weight_tile, end - k0, 2 * pair, EVEN_K, BN, BK)
        if BY_WEIGHT:
            group = (k0 + k) // group_size
            at = (out * groups)[:, None] + tl.minimum(group, groups - 1)[None, :]
        else:
            at = (out * groups + k0 // group_size)[:, None]
        scale = tl.load(weight_scale + at)
        if NF4:
            value = tl.load(codebook + q)
        else:
            value = (q - (tl.load(zero_point + at).to(tl.int32) if HAS_ZERO_POINT else 8)).to(tl.float32)
        if BY_WEIGHT:
            sums = float_dot(value * scale, tokens.to(tl.float32), sums)
        else:
            near = value.to(tokens.dtype)
            part = float_dot(near, tokens, tl.zeros((BN, BM), tl.float32))
            if NF4 and tokens.dtype != tl.float32:
                part = float_dot((value - near.to(tl.float32)).to(tokens.dtype), tokens, part)
            sums += part * scale
        x_tile += BK
        weight_tile += BK // 2

    sums = tl.trans(sums)
    if SPLIT:
        to = partial + (tl.program_id(1).to(tl.int64) * M + m)[:, None] * N + n[None, :]
        tl.store(to, sums, mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        store_outputs(sums, m, n, y, None, None, bias, M, N, ACTIVATION, False, False, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "splits"])
def _finish(
    partial, y, bias, M, N, splits, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """BN columns of a row of y a program. Always in the order of k: a result does not depend on who was first."""
    m, n = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((1, BN), tl.float32)
    for split in range(splits):
        at = partial + (tl.full((1, 1), split, tl.int64) * M + m[:, None]) * N + n[None, :]
        sums += tl.load(at, mask=(n < N)[None, :], other=0)
    store_outputs(sums, m, n, y, None, None, bias, M, N, ACTIVATION, False, False, HAS_BIAS)


# ---- launcher -------------------------------------------------------------------------------------------------


@functools.cache
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def int4_linear(call: Call) -> Tensor:
    """The Triton backend: checked arguments and a plain weight, on one GPU (or interpreted on the CPU)."""
    n, k = call.out_features, call.in_features
    y = torch.empty((*call.x.shape[:-1], n), dtype=call.x.dtype, device=call.x.device)
    if y.numel() == 0:
        return y
    step = step_of(call.group_size, k)
    tiling = pick(y.numel() // n, n, k, capability(call.x), kind_of(call.format, call.x.dtype, step), step)
    with on_device_of(call.x):
        launch(call, tiling, y)
    return y


def launch(call: Call, tiling: Tiling, y: Tensor) -> None:
    """Computes y by this tiling, which must fit the group size: see :func:`ladder`."""
    # The tiles are loaded along k: where it is not contiguous, a copy costs less than loads of one element.
    x = call.x if call.x.stride(-1) == 1 else call.x.contiguous()
    x, (m, k, inner_rows, outer_stride, row_stride, _) = row_layout(x)
    weight, scale = call.weight.contiguous(), call.weight_scale
    assert scale is not None, "plain"
    n, split = call.out_features, tiling.splits > 1
    partial = torch.empty(tiling.splits, m, n, dtype=torch.float32, device=x.device) if split else None
    common = {"ACTIVATION": call.activation, "HAS_BIAS": call.bias is not None, **OPTIONS}
    nf4 = call.format == "nf4"
    _multiply[(tiling.tiles(m, n), tiling.splits)](
        x, weight, scale, call.weight_zero_point, _codebook(x.device) if nf4 else None, call.bias,
        None if split else y, partial,
        m, n, k, scale.shape[1], call.group_size, weight.shape[1], inner_rows, outer_stride, row_stride,
        tiling.k_per_split(k),
        NF4=nf4, HAS_ZERO_POINT=call.weight_zero_point is not None,
        BY_WEIGHT=step_of(call.group_size, k) < LEAST_BLOCK_K, EVEN_K=k % tiling.block_k == 0, SPLIT=split,
        BM=tiling.block_m, BN=tiling.block_n, BK=tiling.block_k, GROUP=tiling.group,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **common,
    )  # fmt: skip
    if split:
        _finish[(m, triton.cdiv(n, FINISH_COLUMNS))](
            partial, y, call.bias, m, n, tiling.splits, BN=FINISH_COLUMNS, num_warps=2, **common
        )


# ---- what is shipped, for compilers without a GPU ---------------------------------------------------------------


# What multiplies, by architecture; for few tokens too.
_INSTRUCTIONS = {80: r"mma\.sync\S*\.f32", 90: r"wgmma\.mma_async\S*\.f32", 100: r"tcgen05\.mma\S*kind::f16"}


def shipped() -> Iterator[Shipped]:
    """Every tiling with every type of x, with the most costly epilogue; and in one of them split, with a K that ends
    inside a step, and in the shortest groups; and those for groups that no step fills.
    """
    for kind in TILINGS:
        for few, tiling in zip((True, False), ladder(kind, 128), strict=True):
            formats = ("int4", "nf4") if kind == "float" else (kind,)
            for x_type in ("fp32",) if kind == "float" else ("bf16", "fp16"):
                for format in formats:
                    yield _shipped(kind, tiling, x_type, format, 128)
            yield _shipped(kind, tiling, x_type, format, 128, ragged=True)
            if few:
                yield _shipped(kind, tiling, x_type, format, 128, split=True)
        for tiling in ladder(kind, LEAST_BLOCK_K):
            yield _shipped(kind, tiling, x_type, formats[0], LEAST_BLOCK_K)
    for tiling in ladder("float", 1):
        for format in ("int4", "nf4"):
            yield _shipped("float", tiling, "bf16", format, 7)
    types = {"partial": "*fp32:16", "y": "*bf16:16", "bias": "*fp32:16", "M": "i32", "N": "i32:16", "splits": "i32"}
    constants = {"ACTIVATION": "gelu", "HAS_BIAS": True, "BN": FINISH_COLUMNS}
    yield configuration("finish", _finish, types, constants, num_warps=2)


def _shipped(
    kind: str, tiling: Tiling, x_type: str, format: str, group_size: int, split: bool = False, ragged: bool = False
) -> Shipped:  # fmt: skip
    nf4, zero_point = format == "nf4", format == "int4" and x_type != "fp16"
    by_weight = step_of(group_size, 1 << 20) < LEAST_BLOCK_K
    multiple = "" if ragged else ":16"
    types = {
        "x": f"*{x_type}:16", "weight": "*u8:16", "weight_scale": "*fp32:16", "bias": "*fp32:16",
        "M": "i32", "N": "i32:16", "K": "i32" + multiple, "groups": "i32",
        "group_size": "i32" + ("" if group_size % 16 else ":16"), "row_bytes": "i32" + multiple, "inner_rows": "i32",
        "outer_stride": "i32:16", "row_stride": "i32" + multiple,
    }  # fmt: skip
    types |= {"partial": "*fp32:16", "k_per_split": "i32:16"} if split else {"y": f"*{x_type}:16"}
    types |= {"codebook": "*fp32:16"} if nf4 else {}
    types |= {"zero_point": "*u8:16"} if zero_point else {}
    constants: dict[str, object] = {
        "ACTIVATION": "gelu", "HAS_BIAS": True, "NF4": nf4, "HAS_ZERO_POINT": zero_point, "BY_WEIGHT": by_weight,
        "EVEN_K": not ragged, "SPLIT": split, "BM": tiling.block_m, "BN": tiling.block_n, "BK": tiling.block_k,
        "GROUP": tiling.group,
    }  # fmt: skip
    for name in ("y", "partial", "codebook", "zero_point", "k_per_split"):
        if name not in types:
            constants[name] = 0 if name == "k_per_split" else None
    values = "nf4" if nf4 else "int4_zero_point" if zero_point else "int4"
    name = f"int4_matmul_{tiling.block_m}x{tiling.block_n}x{tiling.block_k}_{values}_{x_type}"
    name += f"_group{group_size}" * (group_size != 128) + "_split" * split + "_ragged_k" * ragged
    return configuration(
        name, _multiply, types, constants, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        wants=None if kind == "float" else _INSTRUCTIONS,
    )  # fmt: skip
