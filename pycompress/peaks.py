"""What this machine can do, measured in this process: the peaks that benchmarks divide by."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from pycompress import (
    _C,
    _native,  # noqa: F401  (loads torch's OpenMP before the compiled module)
)

_FALLBACK_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Peaks:
    """Best rates of register-only multiply loops and of a read loop.

    ``int8_gops`` and the two ``*_gflops`` are 1e9 operations a second (a multiply-accumulate counts as 2),
    ``exp_g`` 1e9 float32 exponentials a second as softmax takes them, ``read_gbps`` 1e9 bytes a second from memory.
    ``bf16_gflops`` is None without a bf16 dot product.
    """

    isa: str
    threads: int
    int8_gops: float
    fp32_gflops: float
    bf16_gflops: float | None
    exp_g: float
    read_gbps: float | None


def last_level_cache_bytes() -> int:
    """Size of the largest cache of CPU 0 as Linux reports it; 64 MiB where it does not."""
    base = "/sys/devices/system/cpu/cpu0/cache"
    sizes = []
    for entry in os.listdir(base) if os.path.isdir(base) else []:
        path = os.path.join(base, entry, "size")
        if os.path.isfile(path):
            with open(path) as file:
                text = file.read().strip()
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=_FALLBACK_CACHE_BYTES)


def measure(threads: int | None = None, seconds: float = 0.2, *, read: bool = True) -> Peaks:
    """Measure the peaks on ``threads`` threads (default: ``torch.get_num_threads()``), ``seconds`` for each loop.

    With ``read`` a buffer of four times the last-level cache (128 MiB to 1 GiB) is allocated and walked.

    Raises:
        ValueError: ``threads`` below 1, or ``seconds`` outside (0, 60].
    """
    threads = torch.get_num_threads() if threads is None else threads
    size = min(max(4 * last_level_cache_bytes(), 128 << 20), 1 << 30)
    raw = _C.measure_peaks(threads=threads, seconds=seconds, buffer_bytes=size if read else 0)
    return Peaks(
        isa=raw["isa"],
        threads=threads,
        int8_gops=raw["int8_gops"],
        fp32_gflops=raw["fp32_gflops"],
        bf16_gflops=raw["bf16_gflops"] or None,
        exp_g=raw["exp_g"],
        read_gbps=raw["read_gbps"] or None,
    )
