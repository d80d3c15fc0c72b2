"""Times calls on a GPU, in turns, and measures what the GPU can do at most between them.

A sample is the time between two events around one call, with the caches cold. Before the first event the GPU is kept
busy for as long as Python needs to launch the call, so that gaps between launches do not count: what is measured is the
work on the device. What a caller waits for who makes one call after the other is measured apart (`wall`).

Everything but `CudaClock` runs on any device, so that it can be tried without a GPU.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Protocol

import torch

from pycompress.bench.timing import Stats, Timing, summarise

Call = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 5, 50
BURST = 4  # calls of one runner in a round
WALL_CALLS = 20
# The GPU waits this many times as long as Python takes to launch a call; in clock cycles, at what GPUs reach at most.
_HEAD_START, _CYCLES_A_SECOND = 2.0, 2.0e9
PEAK_SIZE = 8192  # of the square products, and 2 bytes x its square x 8 = 1 GiB of the copy


@dataclass(frozen=True)
class GpuPeaks:
    """Best rates of this process: dense products of torch (cuBLAS), a copy (read and written bytes) and a sum.

    None where torch cannot compute it on this device.
    """

    int8_gops: float | None
    bf16_gflops: float | None
    copy_gbps: float | None
    read_gbps: float | None


class Clock(Protocol):
    """`time`: the seconds of each of so many calls on the device, caches cold. `wall`: of one of so many in a row."""

    def time(self, run: Call, times: int) -> list[float]: ...

    def wall(self, run: Call, times: int) -> float: ...


class CudaClock:
    """By CUDA events on the current stream of `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._cold = torch.empty(max(4 * l2, 64 << 20), dtype=torch.int8, device=device)

    def time(self, run: Call, times: int) -> list[float]:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        run()
        launching = time.perf_counter() - start
        cycles = int(_HEAD_START * launching * _CYCLES_A_SECOND)
        pairs = []
        for _ in range(times):
            torch.cuda.synchronize(self._device)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._cold.zero_()  # evicts what the call before has left in the L2 cache
            torch.cuda._sleep(cycles)
            first.record()
            run()
            last.record()
            pairs.append((first, last))
        torch.cuda.synchronize(self._device)
        return [1e-3 * first.elapsed_time(last) for first, last in pairs]

    def wall(self, run: Call, times: int) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(times):
            run()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / times


class HostClock:
    """By the processor's clock, for devices that compute before a call returns."""

    def time(self, run: Call, times: int) -> list[float]:
        return [self.wall(run, 1) for _ in range(times)]

    def wall(self, run: Call, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - start) / times


class Meter:
    """A device and how it is measured. peak_size: see PEAK_SIZE."""

    def __init__(self, device: torch.device, clock: Clock, peak_size: int = PEAK_SIZE) -> None:
        self.device, self.clock, self._peak_size = device, clock, peak_size
        self._loops: dict[str, tuple[Call, float]] | None = None

    @classmethod
    def of(cls, device: torch.device) -> "Meter":
        return cls(device, CudaClock(device)) if device.type == "cuda" else cls(device, HostClock(), peak_size=64)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)

    @property
    def isa(self) -> str:
        """As in sm_90; empty where it is no GPU."""
        if self.device.type != "cuda":
            return ""
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"sm_{major}{minor}"

    @property
    def cache_mib(self) -> float:
        """Of the L2 cache."""
        found = torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 0
        return found / 2**20

    # ---- peaks ----

    def peaks(self) -> GpuPeaks:
        """Each of the loops once; its best rate is that of a few calls in a row."""
        if self._loops is None:
            self._loops = self._make_loops()
        found: dict[str, float | None] = dict.fromkeys(("int8_gops", "bf16_gflops", "copy_gbps", "read_gbps"))
        for kind, (run, work) in self._loops.items():
            found[kind] = work / min(self.clock.time(run, 3))
        return GpuPeaks(**found)

    def _make_loops(self) -> dict[str, tuple[Call, float]]:
        """Kind -> the call, and 1e9 operations or bytes that it does."""
        n = self._peak_size
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        qa, qb = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=self.device) for _ in range(2))
        source = torch.zeros(4 * n * n, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        loops: dict[str, tuple[Call, float]] = {
            "int8_gops": (partial(torch._int_mm, qa, qb.t()), 2e-9 * n**3),
            "bf16_gflops": (partial(torch.mm, a, b.t()), 2e-9 * n**3),
            "copy_gbps": (partial(target.copy_, source), 2e-9 * source.nbytes),
            "read_gbps": (source.sum, 1e-9 * source.nbytes),
        }
        works = {}
        for kind, loop in loops.items():
            try:
                loop[0]()
            except (RuntimeError, NotImplementedError):  # torch has no such product for this device
                continue
            works[kind] = loop
        return works

    # ---- calls ----

    def in_turns(self, runners: Mapping[str, Call], *, seconds: float, seed: int = 0) -> Timing[GpuPeaks]:
        """Times all of them for about `seconds`, at least MIN_ROUNDS rounds of BURST calls; the peaks once a round."""
        for run in runners.values():
            self.clock.wall(run, 3)  # compiles what compiles at its first calls
        cost = sum(BURST * self.clock.wall(run, 1) for run in runners.values())
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(cost, 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in runners}
        probes, order = [], random.Random(seed)
        for _ in range(rounds):
            probes.append(self.peaks())
            for name in order.sample(list(runners), len(runners)):
                samples[name] += self.clock.time(runners[name], BURST)
        return Timing({name: summarise(found) for name, found in samples.items()}, probes)

    def wall(self, run: Call) -> Stats:
        """Of one call after the other, as eager code makes them."""
        self.clock.wall(run, WALL_CALLS)
        return summarise([self.clock.wall(run, WALL_CALLS) for _ in range(MIN_ROUNDS)])


def limits(probes: list[GpuPeaks]) -> dict[str, float]:
    """The median of each peak that was measured; memory_gbps is the better one of copying and reading."""
    found = {}
    for kind in ("int8_gops", "bf16_gflops"):
        rates = [rate for probe in probes if (rate := getattr(probe, kind)) is not None]
        if rates:
            found[kind] = median(rates)
    memory = [max(rates) for p in probes if (rates := [r for r in (p.copy_gbps, p.read_gbps) if r is not None])]
    return found | ({"memory_gbps": median(memory)} if memory else {})
