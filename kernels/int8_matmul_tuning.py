"""Which tiles the Triton kernels of the int8 linear layer take, as data.

No threshold here was measured: each follows from sizes of the hardware, as its comment says. With
``PYCOMPRESS_AUTOTUNE=1`` the launcher measures instead, once for each shape (rows rounded up to a power of 2).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton

from pycompress.gpu import interpreting
from pycompress.ops.int8_matmul_reference import Call

# The int32 sums of so many terms are exact, the zero point's share included: kMaxChunkK of int8_matmul.h, rounded down
# to a multiple of every block_k. Triton's mma on sm_80 saturates, it would not even wrap.
MAX_CHUNK_K = 65280

# A100 has 108, H100 132, B200 148. Only so that a grid fills them: nothing depends on it being right.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}


@dataclass(frozen=True)
class Tiling:
    """A tile of y a program, k in steps of block_k; ``splits`` programs share the k of a tile.

    group: rows of tiles that neighbouring programs work on, see ``grouped_tile``.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    group: int = 8

    def k_per_split(self, k: int) -> int:
        """k of one split, a multiple of block_k."""
        steps = triton.cdiv(triton.cdiv(k, self.splits), self.block_k)
        return steps * self.block_k

    def tiles(self, m: int, n: int) -> int:
        return triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n)


# By what is multiplied, fewest rows first. 16 rows are the least that an mma takes; 64 the least of a wgmma; beyond
# that 128 x 128, whose sums are 64 registers a thread: 128 x 256 spills in the epilogue, on sm_90 with gelu, on sm_100
# always. block_k is 128 weights or 128 bytes of x, the width of a shared memory swizzle.
TILINGS = {
    "int8": (Tiling(16, 64, 128, 4, 5), Tiling(64, 64, 128, 4, 4), Tiling(128, 128, 128, 8, 3)),
    "half": (Tiling(16, 64, 128, 4, 4), Tiling(64, 64, 128, 4, 3), Tiling(128, 128, 64, 8, 3)),
    # fp32 products go through the ordinary units, unrolled over block_k: larger tiles spill.
    "float": (Tiling(16, 64, 32, 4, 4), Tiling(64, 64, 16, 8, 3)),
}
# What cannot be read 16 bytes at a time is loaded to registers element by element: so many of them, and nothing spills.
NARROW_BLOCK_K = 32
FINISH_COLUMNS = 256

# m, n, k, architecture, key of TILINGS, and whether loads are narrow: the arguments of pick.
Shape = tuple[int, int, int, int, str, bool]


def kind_of(call: Call) -> str:
    """The key of TILINGS: ``"int8"``, or in weight-only mode ``"half"`` or ``"float"``."""
    if call.mode != "weight_only":
        return "int8"
    return "float" if call.x.dtype == torch.float32 else "half"


def ladder(kind: str, narrow: bool) -> list[Tiling]:
    """TILINGS of a kind; narrow where something in them cannot be read 16 bytes at a time."""
    largest = NARROW_BLOCK_K if narrow else MAX_CHUNK_K
    return [replace(tiling, block_k=min(tiling.block_k, largest)) for tiling in TILINGS[kind]]


def pick(m: int, n: int, k: int, arch: int, kind: str, narrow: bool) -> Tiling:
    """The tiling of an ``m x n x k`` product on compute capability ``arch``."""
    few, middle, *large = ladder(kind, narrow)
    if m <= few.block_m:
        return _split(few, m, n, k, arch, kind)
    # Twice as many tiles as multiprocessors keep those busy that are done first; fewer would leave some idle.
    wanted = 2 * MULTIPROCESSORS.get(arch, 108)
    for tiling in large:
        if tiling.tiles(m, n) >= wanted and (kind != "int8" or k <= MAX_CHUNK_K):
            return tiling
    return _split(middle, m, n, k, arch, kind)


def _split(tiling: Tiling, m: int, n: int, k: int, arch: int, kind: str) -> Tiling:
    """The tiling with as many splits as fill the device."""
    wanted = 2 * MULTIPROCESSORS.get(arch, 108) // max(tiling.tiles(m, n), 1)
    # Each split writes and reads its sums, 8 m bytes for a column, whose weights are k bytes: at most a quarter of
    # them. And a split of fewer than 4 steps ends before its pipeline is full.
    wanted = min(wanted, k // (32 * max(m, 1)), k // (4 * tiling.block_k))
    if kind == "int8":
        wanted = max(wanted, triton.cdiv(k, MAX_CHUNK_K))
    return whole_splits(tiling, wanted, k)


def whole_splits(tiling: Tiling, wanted: int, k: int) -> Tiling:
    """About so many splits, none of them empty."""
    if min(wanted, k) <= 1:
        return replace(tiling, splits=1)
    shared = replace(tiling, splits=wanted)
    return replace(tiling, splits=triton.cdiv(k, shared.k_per_split(k)))


def row_block(k: int) -> tuple[int, int]:
    """(elements, warps) that a program takes at a time of a row: at most 16 elements a thread stay in registers."""
    block = min(max(triton.next_power_of_2(k), 128), 4096)
    return block, max(block // 512, 1)


# ---- measuring instead ----------------------------------------------------------------------------------------

_best: dict[Shape, Tiling] = {}


def autotuned(shape: Shape, launch: Callable[[Tiling], None]) -> Tiling | None:
    """The fastest tiling for ``shape``, or None where nothing is to be measured: without
    ``PYCOMPRESS_AUTOTUNE=1``, interpreted, or while a graph is captured.
    """
    if os.environ.get("PYCOMPRESS_AUTOTUNE") != "1" or interpreting():
        return None
    m, n, k, arch, kind, narrow = shape
    key = (triton.next_power_of_2(m), n, k, arch, kind, narrow)
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return None
        _best[key] = min(candidates(*shape), key=lambda tiling: triton.testing.do_bench(lambda: launch(tiling)))
    return _best[key]


def candidates(m: int, n: int, k: int, arch: int, kind: str, narrow: bool) -> list[Tiling]:
    """Tilings worth measuring: each that computes the product exactly, with the splits of pick, half and twice them."""
    chunks = triton.cdiv(k, MAX_CHUNK_K) if kind == "int8" else 1
    found = []
    for tiling in ladder(kind, narrow):
        few = tiling.block_m <= 64
        if few or chunks == 1:
            splits = _split(tiling, m, n, k, arch, kind).splits if few else 1
            counts = {max(count, chunks) for count in ((splits // 2, splits, 2 * splits) if few else (1,))}
            found += [whole_splits(tiling, count, k) for count in sorted(counts)]
    return found
