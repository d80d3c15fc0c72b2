"""Linear layer with a pruned weight in Triton: the block form, for many tokens.

    y[m,n] = act(sum over the kept blocks c of row n / BLOCK:  x[m, c BLOCK ..] . w_c[n % BLOCK, ..]  + bias[n])

The form is drawn in pycompress/ops/sparse_linear_forms.py: block_ptr (R + 1), block_col (count), the blocks whole.
A program owns one row of blocks and some tokens, and takes STEP / BLOCK blocks at a time, side by side:

    w [BLOCK, STEP] = | block j | block j+1 | .. |      x^T [STEP, TOKENS]: the rows of x^T where those columns are

The weight is the left operand: its rows are 16, 32 or 64, what mma.sync (16) and wgmma (64) want there. Zeros within a
block are multiplied, so a NaN in x reaches every output of the blocks that it meets, and stays in its row of y.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycompress.ops.sparse_linear_forms import BLOCKS, Header
from pycompress.ops.sparse_linear_reference import Call

from .common import OPTIONS, TYPE_NAMES, Shipped, float_dot, store_outputs
from .common import shipped as configuration

# |sum| <= 128 * 127 * K fits int32 up to this K; beyond it sums are int64.
INT32_K = 131072


@triton.jit
def _block_linear(
    x, words, values, w_scale, x_scale, bias, y,
    m, n, k, block_ptr, block_col, first_value, inner_rows, outer_stride, row_stride, col_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, INT8: tl.constexpr, BIG_K: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """words, values: the form as int32 and as its values; block_ptr, block_col, first_value: where the sections begin.

    x: float, its rows in two levels (ops/rows.py), or int8 with x_scale (M,).
    """
    tiles_m = tl.cdiv(m, TOKENS)  # tiles of tokens are neighbours in time: they share the blocks in L2
    row = tl.program_id(0) // tiles_m
    offs_m = tl.program_id(0) % tiles_m * TOKENS + tl.arange(0, TOKENS)
    in_m = offs_m < m
    row_of_x = (offs_m // inner_rows).to(tl.int64) * outer_stride + (offs_m % inner_rows).to(tl.int64) * row_stride
    begin, end = tl.load(words + block_ptr + row), tl.load(words + block_ptr + row + 1)
    inside = tl.arange(0, STEP) % BLOCK  # column in its block
    nth = tl.arange(0, STEP) // BLOCK  # block of this step
    in_block = tl.arange(0, BLOCK)[:, None] * BLOCK + inside[None, :]
    sum_type: tl.constexpr = tl.float32 if not INT8 else tl.int64 if BIG_K else tl.int32
    acc = tl.zeros((BLOCK, TOKENS), sum_type)
    for j in range(begin, end, STEP // BLOCK):
        in_list = j + nth < end
        offs_k = tl.load(words + block_col + j + nth, mask=in_list, other=0) * BLOCK + inside
        from_w = first_value + (j + nth).to(tl.int64) * (BLOCK * BLOCK)
        w = tl.load(values + from_w[None, :] + in_block, mask=in_list[None, :], other=0)
        in_x = (in_list & (offs_k < k))[:, None] & in_m[None, :]
        tokens = tl.load(x + row_of_x[None, :] + offs_k[:, None].to(tl.int64) * col_stride, mask=in_x, other=0)
        if INT8 and BIG_K:
            acc += tl.dot(w, tokens, out_dtype=tl.int32).to(tl.int64)
        elif INT8:
            acc = tl.dot(w, tokens, acc, out_dtype=tl.int32)
        elif w.dtype == tokens.dtype:
            acc = float_dot(w, tokens, acc)
        else:
            acc = float_dot(w.to(tl.float32), tokens.to(tl.float32), acc)
    offs_n = row * BLOCK + tl.arange(0, BLOCK)
    store_outputs(tl.trans(acc), offs_m, offs_n, y, x_scale, w_scale, bias, m, n, ACTIVATION, INT8, INT8, HAS_BIAS)


# ---- tuning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockTile:
    """A program: tokens, and columns of the weight in a step, of which the blocks of one row take BLOCK each."""

    tokens: int
    step: int
    warps: int
    stages: int


# By the bytes of an operand. A step of 128 bytes a row is a whole line of x; fp32 runs on the plain cores, where what
# is staged in shared memory, not the tensor core, sets the size. Tokens: 16 for the few that meet the block form, then
# as many as the threads hold sums for: 64 x 128 / 128 threads = 64 registers.
_STEP = {1: 128, 2: 64, 4: 32}
_TOKENS = {1: (16, 128), 2: (16, 128), 4: (16, 64)}
# Sums of a program in fp32: with 8 warps a thread has 8 of them, and its part of both operands. Twice as many spill.
_PLAIN_SUMS = 2048
# Sums of int8 from which on 4 warps spill where mma.sync holds both operands in registers (Triton 3.6 on sm_100).
_MANY_SUMS = 8192


def pick_block(m: int, block: int, dtype: torch.dtype) -> BlockTile:
    """For a call of m tokens whose operands are of this dtype. Not yet timed on hardware: the reasons are counts."""
    size = dtype.itemsize
    tokens = next((t for t in _TOKENS[size] if m <= t), _TOKENS[size][-1])
    if size == 4:
        return BlockTile(min(tokens, _PLAIN_SUMS // block), max(_STEP[size], block), 8, 3)
    warps = 8 if size == 1 and block * tokens >= _MANY_SUMS else 4
    return BlockTile(tokens, max(_STEP[size], block), warps, 3)


# ---- launch -----------------------------------------------------------------------------------------------------


def block_linear(
    call: Call, header: Header, x: Tensor, x_scale: Tensor | None, layout: tuple[int, ...], y: Tensor
) -> None:
    """Into y (M, N). layout: M, K and the rows of x in two levels."""
    m, k = layout[:2]
    assert call.index is not None
    values = call.index.view(header.dtype)
    operands = x.dtype if x.dtype == header.dtype else torch.float32
    tile = pick_block(m, header.block, operands)
    _block_linear[(header.rows * triton.cdiv(m, tile.tokens),)](
        x, call.index.view(torch.int32), values, call.weight_scale, x_scale, call.bias, y,
        m, header.n, k, header.start_a // 4, header.start_b // 4, header.start_values // values.element_size(),
        *layout[2:],
        ACTIVATION=call.activation, HAS_BIAS=call.bias is not None, INT8=x_scale is not None, BIG_K=k > INT32_K,
        BLOCK=header.block, STEP=tile.step, TOKENS=tile.tokens,
        num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip


# ---- what is shipped, for compilers without a GPU ---------------------------------------------------------------

_DOT = {80: r"mma\.sync", 90: r"wgmma|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}
_DOT_S8 = {80: r"mma\.sync.*s8", 90: r"wgmma.*s8|mma\.sync.*s8", 100: r"tcgen05\.mma.*i8|mma\.sync.*s8"}


def shipped_blocks() -> Iterator[Shipped]:
    """Every block with every number of tokens; float16, which differs from bfloat16 in a letter, once."""
    for block in BLOCKS:
        for dtype in (torch.bfloat16, torch.float32, torch.int8):
            for tokens in _TOKENS[dtype.itemsize]:
                yield _shipped(block, dtype, tokens)
    yield _shipped(64, torch.float16, 128)


def _shipped(block: int, dtype: torch.dtype, tokens: int) -> Shipped:
    tile, name, int8 = pick_block(tokens, block, dtype), TYPE_NAMES[dtype], dtype == torch.int8
    types = {
        "x": f"*{name}:16", "words": "*i32:16", "values": f"*{name}:16", "bias": "*fp32:16",
        "y": "*bf16:16" if int8 else f"*{name}:16", "m": "i32", "n": "i32:16", "k": "i32:16", "block_ptr": "i32:16",
        "block_col": "i32:16", "first_value": "i32:16", "inner_rows": "i32", "row_stride": "i32:16",
    }  # fmt: skip
    constants = {
        "outer_stride": 0, "col_stride": 1, "ACTIVATION": "gelu", "HAS_BIAS": True, "INT8": int8, "BIG_K": False,
        "BLOCK": block, "STEP": tile.step, "TOKENS": tile.tokens,
    }  # fmt: skip
    for scale in ("w_scale", "x_scale"):
        if int8:
            types[scale] = "*fp32:16"
        else:
            constants[scale] = None
    wants = _DOT_S8 if int8 else _DOT if dtype.itemsize == 2 else None
    return configuration(
        f"block_linear_{block}_{tile.tokens}_{name}", _block_linear, types, constants,
        num_warps=tile.warps, num_stages=tile.stages, wants=wants,
    )  # fmt: skip
