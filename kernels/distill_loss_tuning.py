"""Distillation loss in Triton: which kernel a row's length gets, and its tile.

None of the choices is measured on a GPU: the bounds are what ptxas makes of the registers, for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Tile:
    """Of ``rows_in_tile``: rows a program, classes a tile (a power of 2)."""

    rows: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class Sweeps:
    """Of ``rows_in_sweeps``: a tile is stripes x threads x neighbours classes."""

    stripes: int
    threads: int
    neighbours: int

    @property
    def num_warps(self) -> int:
        return self.threads // 32


_SMALL_TILE = 1024  # elements, so that short rows fill a program
# 16 bytes a thread of the wider logits, a load: 4 or 8 elements. 8 of bf16 take 55 to 100 registers (short rows of many
# options: 120); of fp32 as many are where ptxas of some versions stops at 64 or 80 and spills 8 bytes for it.
_THREAD_BYTES = 16
LARGEST_TILE = 4096
# 16 elements a thread of 16 warps, all that a program may have of registers: reverse_kl and jsd spill, forward_kl fits.
# 32 warps would leave 64 registers a thread, which all of them reach.
LARGEST_FORWARD_TILE = 8192


def pick(vocab: int, itemsize: int, arch: int, divergence: str) -> Tile | Sweeps:
    """itemsize: bytes of the wider of both logits; arch: 80, 90, 100. One choice serves all three."""
    if vocab <= (LARGEST_FORWARD_TILE if divergence in ("forward_kl", "none") else LARGEST_TILE):
        block = max(16, triton.next_power_of_2(vocab))
        rows = max(1, _SMALL_TILE // block)
        warps = rows * block * itemsize // (32 * _THREAD_BYTES)
        return Tile(rows, block, min(warps, 16 if block > LARGEST_TILE else 32))
    # One stripe of 16 bytes a thread of each operand: with 8 warps of fp32 at up to 55 registers, or 4 warps of 16 bits
    # at up to 72, a processor has about 30 kB in flight: more than latency times bandwidth asks for, some 20 kB. With
    # more stripes, or more warps of 16 bits, ptxas stops at 64 or 80 registers in one divergence or another and spills.
    return Sweeps(1, 64 * itemsize, _THREAD_BYTES // itemsize)
