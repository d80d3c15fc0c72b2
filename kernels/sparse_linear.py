"""Linear layer with a pruned weight in Triton: the bitmap form, for few tokens, and what chooses between the kernels.

    y[m,n] = act(sum_k x[m,k] w[n,k] + bias[n])                      float values; products and sums in fp32
    y[m,n] = act(sum_k qx[m,k] qw[n,k] w_scale[n] x_scale[m] + bias[n])      int8: exact sums, x quantised per token

The contract, edge cases included, is csrc/sparse_linear/sparse_linear.h. bits (N, ceil(K / 8)) and values (nnz,) are
read once for up to ``tokens`` rows of x and expanded in registers:

    word   0 1 1 0 1 0 0 1 ..   32 columns, one for each lane of a warp: bit 0 at the left
    below  0 0 1 2 2 3 3 3 ..   ones to the left, counted in the word
    place  row_start + ones in the words before + below: of the value of each column whose bit is set

Blocks, for many tokens: sparse_linear_block.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycompress import gpu
from pycompress.ops.rows import row_layout
from pycompress.ops.sparse_linear_forms import BLOCK, form_header
from pycompress.ops.sparse_linear_reference import BITMAP, INDEX, Call

from .common import OPTIONS, TYPE_NAMES, Shipped, float_dot, on_device_of, store_outputs
from .common import shipped as configuration
from .int8_matmul import quantize_rows
from .sparse_linear_block import INT32_K, block_linear, shipped_blocks


@triton.jit
def ones_in(word):
    """How many bits are set: the compiler knows this sum as one instruction."""
    twos = word - ((word >> 1) & 0x55555555)
    fours = (twos & 0x33333333) + ((twos >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _load_words(place, left, EVEN_K: tl.constexpr):
    """uint32: 32 columns of the bitmap from these bytes on, of which so many are left in the row; zeros past it."""
    if EVEN_K:  # rows are whole words
        return tl.load(place.to(tl.pointer_type(tl.uint32)), mask=left > 0, other=0)
    word = tl.zeros_like(left).to(tl.uint32)
    for byte in tl.static_range(4):
        word |= tl.load(place + byte, mask=left > byte, other=0).to(tl.uint32) << (8 * byte)
    return word


# With a column stride known to be 1 the compiler would give each thread neighbouring columns of x, and move everything
# else through shared memory to where they are.
@triton.jit(do_not_specialize=["col_stride"])
def _bitmap_linear(
    x, bits, values, row_start, w_scale, x_scale, bias, y,
    m, n, k, nnz, inner_rows, outer_stride, row_stride, col_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, INT8: tl.constexpr, BIG_K: tl.constexpr, EVEN_K: tl.constexpr,
    DOT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS tokens. x: float, its rows in two levels (ops/rows.py), or int8 with x_scale (M,).

    EVEN_K: K is a multiple of 32. DOT: on tensor cores; TOKENS and ROWS are then 16 at least.
    """
    # Neighbours in time have the same tokens. One dimension: a grid's second one ends at 65535.
    tiles_n = tl.cdiv(n, ROWS)
    first_n = tl.program_id(0) % tiles_n * ROWS
    offs_m = tl.program_id(0) // tiles_n * TOKENS + tl.arange(0, TOKENS)
    in_m = offs_m < m
    row_of_x = (offs_m // inner_rows).to(tl.int64) * outer_stride + (offs_m % inner_rows).to(tl.int64) * row_stride
    row_bytes = (k + 7) // 8
    # [WORDS, ROWS, 32]: words in registers, rows by warps, columns by lanes, so that nothing passes between threads.
    offs_n = (first_n + tl.arange(0, ROWS))[None, :, None]
    in_n = offs_n < n
    nth, lane = tl.arange(0, WORDS)[:, None, None], tl.arange(0, 32)[None, None, :]
    from_bits = bits + offs_n.to(tl.int64) * row_bytes + 0 * lane
    from_x = x + row_of_x[:, None, None, None] + ((nth * 32 + lane).to(tl.int64) * col_stride)[None, :, :, :]
    below = (tl.full((1, 1, 32), 1, tl.uint32) << lane.to(tl.uint32)) - 1
    first = tl.load(row_start + offs_n + 0 * lane, mask=in_n, other=0)
    sum_type: tl.constexpr = tl.float32 if not INT8 else tl.int64 if BIG_K and DOT else tl.int32
    acc = tl.zeros((ROWS, TOKENS) if DOT else (TOKENS, WORDS, ROWS, 32), sum_type)
    for w0 in range(0, (k + 31) // 32, WORDS):
        left = tl.where(in_n, row_bytes - 4 * w0, 0) - 4 * nth + 0 * lane
        word = _load_words(from_bits + 4 * nth, left, EVEN_K)
        from_bits += 4 * WORDS
        ones = ones_in(word)
        upto = tl.cumsum(ones, 0)
        all_ones = tl.sum(ones, 0, keep_dims=True)
        # Inside the values even where row_start is of another weight.
        word = tl.where((first >= 0) & (first + all_ones <= nnz), word, 0)
        kept = ((word >> lane.to(tl.uint32)) & 1) != 0
        kept = kept if EVEN_K else kept & ((w0 + nth) * 32 + lane < k)
        w = tl.load((values + first) + (upto - ones + ones_in(word & below)), mask=kept, other=0)
        first += all_ones
        if DOT:
            weight = tl.reshape(tl.permute(w, (1, 0, 2)), (ROWS, WORDS * 32))
            cols = w0 * 32 + tl.arange(0, WORDS * 32)
            in_x = in_m[None, :] & (cols < k)[:, None]
            tokens = tl.load(x + row_of_x[None, :] + cols[:, None].to(tl.int64) * col_stride, mask=in_x, other=0)
            if INT8:
                acc += tl.dot(weight, tokens, out_dtype=tl.int32).to(sum_type)
            elif weight.dtype == tokens.dtype:
                acc = float_dot(weight, tokens, acc)
            else:
                acc = float_dot(weight.to(tl.float32), tokens.to(tl.float32), acc)
        else:
            # Only what meets a weight is loaded: NaN and Inf elsewhere reach no output.
            tokens = tl.load(from_x, mask=kept[None, :, :, :] & in_m[:, None, None, None], other=0)
            from_x += col_stride.to(tl.int64) * (32 * WORDS)
            acc += w[None, :, :, :].to(sum_type) * tokens.to(sum_type)
    if DOT:
        total = tl.trans(acc)
    else:
        each = acc.to(tl.int64) if BIG_K and INT8 else acc
        total = tl.sum(tl.sum(each, 1), 2)
    offs_n = first_n + tl.arange(0, ROWS)
    store_outputs(total, offs_m, offs_n, y, x_scale, w_scale, bias, m, n, ACTIVATION, INT8, INT8, HAS_BIAS)


# ---- tuning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BitmapTile:
    """A program: rows of the weight, tokens that meet them, words of bitmap (32 columns each) in a step."""

    tokens: int
    rows: int
    words: int
    warps: int
    dot: bool


# A warp owns a row. Four rows a program give every multiprocessor of a large GPU some from N = 528 on. One token: four
# words a step, 128 columns in flight a warp, take 64 registers, and 32 warps a multiprocessor have them; eight take 96,
# where ptxas of some versions stops and spills. Four tokens, the most whose sums, eight a thread, stay in registers,
# take twice as many columns a step.
ONE = BitmapTile(1, 4, 4, 4, dot=False)
FEW = BitmapTile(4, 4, 8, 4, dot=False)
# Sixteen are the least that a tensor core takes of either side.
MANY = BitmapTile(16, 16, 4, 4, dot=True)
BITMAP_TILES = (ONE, FEW, MANY)


def pick_bitmap(m: int) -> BitmapTile:
    """For a call of m tokens. Not yet timed on hardware: the reasons are counts."""
    return next((tile for tile in BITMAP_TILES if m <= tile.tokens), MANY)


# ---- launches ---------------------------------------------------------------------------------------------------


def missing(call: Call) -> str | None:
    """Why these kernels cannot take the call, or None."""
    reason = gpu.triton_missing(call.x)
    if reason is None and call.format() == INDEX and call.index is not None and form_header(call.index).kind != BLOCK:
        return "its index form keeps two of every four weights, which the CUDA kernels multiply"
    return reason


def sparse_linear(call: Call) -> Tensor:
    """A checked call with row_start, and with index where that is the form it takes."""
    x, x_scale = call.x, None
    y = torch.empty((*x.shape[:-1], call.bitmap.shape[0]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    with on_device_of(x):
        if call.values.dtype == torch.int8:
            x, x_scale = quantize_rows(x)
        x, layout = row_layout(x)
        if call.format() == BITMAP:
            _bitmap(call, x, x_scale, layout, y)
        else:
            assert call.index is not None, "made before"
            block_linear(call, form_header(call.index), x, x_scale, layout, y)
    return y


def _bitmap(call: Call, x: Tensor, x_scale: Tensor | None, layout: tuple[int, ...], y: Tensor) -> None:
    m, k = layout[:2]
    n, values = call.bitmap.shape[0], call.values
    tile = pick_bitmap(m)
    assert call.row_start is not None, "made before"
    _bitmap_linear[(triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.tokens),)](
        x, call.bitmap, values, call.row_start, call.weight_scale, x_scale, call.bias, y,
        m, n, k, values.numel(), *layout[2:],
        ACTIVATION=call.activation, HAS_BIAS=call.bias is not None, INT8=x_scale is not None, BIG_K=k > INT32_K,
        EVEN_K=_whole_words(k, call.bitmap), DOT=tile.dot, TOKENS=tile.tokens, ROWS=tile.rows, WORDS=tile.words,
        num_warps=tile.warps, **OPTIONS,
    )  # fmt: skip


def _whole_words(k: int, bitmap: Tensor) -> bool:
    return k % 32 == 0 and bitmap.data_ptr() % 4 == 0


# ---- what is shipped, for compilers without a GPU ---------------------------------------------------------------


def shipped() -> Iterator[Shipped]:
    """Every tile with values of each size, and where K is not in whole words; then the blocks."""
    for tile in BITMAP_TILES:
        for dtype in (torch.bfloat16, torch.float32, torch.int8):
            yield _shipped_bitmap(tile, dtype, even=True)
        yield _shipped_bitmap(tile, torch.bfloat16, even=False)
    yield from shipped_blocks()


def _shipped_bitmap(tile: BitmapTile, dtype: torch.dtype, even: bool) -> Shipped:
    name, int8 = TYPE_NAMES[dtype], dtype == torch.int8
    types = {
        "x": f"*{name}:16", "bits": "*u8:16", "values": f"*{name}:16", "row_start": "*i64:16",
        "bias": "*fp32:16", "y": "*bf16:16" if int8 else f"*{name}:16", "m": "i32",
        "n": "i32:16", "k": "i32:16" if even else "i32", "nnz": "i32", "inner_rows": "i32", "col_stride": "i32",
        "row_stride": "i32:16" if even else "i32",
    }  # fmt: skip
    constants = {
        "outer_stride": 0, "ACTIVATION": "gelu", "HAS_BIAS": True, "INT8": int8, "BIG_K": False,
        "EVEN_K": even, "DOT": tile.dot, "TOKENS": tile.tokens,
        "ROWS": tile.rows, "WORDS": tile.words,
    }  # fmt: skip
    for scale in ("w_scale", "x_scale"):
        if int8:
            types[scale] = "*fp32:16"
        else:
            constants[scale] = None
    name = f"bitmap_linear_{tile.tokens}x{tile.rows}_{name}{'' if even else '_ragged'}"
    return configuration(name, _bitmap_linear, types, constants, num_warps=tile.warps, num_stages=3)
