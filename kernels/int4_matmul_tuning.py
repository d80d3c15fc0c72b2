"""Which tiles the Triton kernel of the 4-bit linear layer takes, as data.

No threshold here was measured: each follows from sizes of the hardware, as its comment says.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .int8_matmul_tuning import MULTIPROCESSORS, Tiling, whole_splits

# By what is decoded, fewest tokens first; "float" where products are fp32. The weight is decoded in registers, where it
# is the left operand of the product: its rows are what an mma takes 16 of and a wgmma 64, so that few tokens waste
# nothing of either. 128 rows and 64 tokens are 32 sums a thread and as many weights in flight, twice for nf4: with more
# of either it spills.
TILINGS = {
    "int4": (Tiling(16, 64, 64, 4, 4), Tiling(64, 128, 64, 8, 3)),
    "nf4": (Tiling(16, 64, 64, 4, 4), Tiling(64, 128, 32, 8, 3)),
    # Through the ordinary units, unrolled over block_k: larger tiles spill.
    "float": (Tiling(16, 64, 32, 4, 3), Tiling(64, 64, 16, 8, 3)),
}
FINISH_COLUMNS = 256
# The least k that a dot takes: a group that such steps do not fill is scaled weight by weight instead.
LEAST_BLOCK_K = 16


def step_of(group_size: int, k: int) -> int:
    """The largest power of 2 that steps through K without leaving a group half way; more than any tile has if the
    whole row is one group.
    """
    return 1 << 30 if group_size >= k else group_size & -group_size


def kind_of(format: str, x_type: torch.dtype, step: int) -> str:
    """The key of TILINGS."""
    return "float" if x_type == torch.float32 or step < LEAST_BLOCK_K else format


def ladder(kind: str, step: int) -> list[Tiling]:
    """TILINGS of a kind in steps of at most ``step``, where it is large enough."""
    largest = step if step >= LEAST_BLOCK_K else 1 << 30
    return [replace(tiling, block_k=min(tiling.block_k, largest)) for tiling in TILINGS[kind]]


def pick(m: int, n: int, k: int, arch: int, kind: str, step: int) -> Tiling:
    """The tiling of an ``m x n x k`` product on compute capability ``arch``."""
    few, many = ladder(kind, step)
    tiling = few if m <= few.block_m else many
    # Twice as many programs as multiprocessors keep those busy that are done first. Each split writes and reads its
    # sums, 8 m bytes for a column, whose weights are k / 2 bytes: at most a quarter of them. And a split of fewer than
    # 4 steps ends before its pipeline is full.
    wanted = 2 * MULTIPROCESSORS.get(arch, 108) // max(tiling.tiles(m, n), 1)
    return whole_splits(tiling, min(wanted, k // (64 * max(m, 1)), k // (4 * tiling.block_k)), k)
