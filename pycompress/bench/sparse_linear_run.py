"""Measures the cases of sparse_linear: the shared data, the checks before timing, and the rows.

A case is one shape, one sparsity and one M. Dense layers and every form of every pattern take turns within it, so each
speed-up is a ratio of calls made within the same second or two.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from pycompress import peaks
from pycompress.bench import sparse_linear_summary as summary
from pycompress.bench.provider import Machine, failure
from pycompress.bench.rows import Row
from pycompress.bench.sparse_linear_providers import (
    DTYPES,
    PEAKS,
    TOLERANCE,
    UNSTRUCTURED,
    Bound,
    Built,
    Layer,
    Provider,
    random_mask,
)
from pycompress.bench.timing import Runner, Stats, time_round_robin

Shape = tuple[int, int]  # K, N
OP = "sparse_linear"

# As in int8_matmul_run.py.
PEAK_SECONDS = 0.01
# A case of the sweep in which auto seems slower than this is timed once more, longer, and the second time counts:
# of a hundred ratios of medians some are low by chance.
DOUBTED, LONGER = 0.97, 4.0
# What the sweep draws, one after the other: int8 unstructured is slower than dense, and auto has to know it.
SWEPT = (("fp32", UNSTRUCTURED), ("bf16", UNSTRUCTURED), ("int8", "4x4"), ("fp32", "4x4"), ("int8", UNSTRUCTURED))


@dataclass(frozen=True)
class Cell:
    """Layers K x N of one sparsity for several M. forms: of the weight, as Provider.form; empty for all.

    covers: as Row.covers, "layer" or "sweep".
    """

    shape: Shape
    tokens: tuple[int, ...]
    sparsity: float
    patterns: tuple[str, ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    forms: tuple[str, ...] = ()
    covers: str = "layer"


@dataclass(frozen=True)
class Data:
    """One layer and its y64 = x @ (weight ⊙ mask).T + bias in float64, for the largest M."""

    layer: Layer
    y64: Tensor


Made = tuple[Tensor, dict[str, Data]]  # x (M, K), and a layer for each pattern


@dataclass(frozen=True)
class Call:
    """A provider with one pattern; pattern is empty where it makes no difference. data: the key in make_data's."""

    provider: Provider
    pattern: str
    data: str

    @property
    def name(self) -> str:
        return f"{self.provider.name} {self.pattern}".strip()


def make_data(cell: Cell) -> Made:
    """For the largest M of the cell."""
    k, n = cell.shape
    generator = torch.Generator().manual_seed(k * 1_000_003 + n)
    x = torch.randn(max(cell.tokens), k, generator=generator)
    weight = torch.randn(n, k, generator=generator).div_(k**0.5)
    bias = torch.randn(n, generator=generator)
    found = {}
    for pattern in cell.patterns:
        mask = random_mask(pattern, (n, k), cell.sparsity, generator)
        layer = Layer(weight * mask, mask, bias)
        found[pattern] = Data(layer, x.double() @ layer.weight.double().t() + bias.double())
    return x, found


def calls_of(cell: Cell, providers: Sequence[Provider]) -> list[Call]:
    found = []
    for p in providers:
        if p.dtype not in cell.dtypes or (cell.forms and p.form not in cell.forms):
            continue
        if not p.patterns:
            found.append(Call(p, "", cell.patterns[0]))
        found += [Call(p, pattern, pattern) for pattern in p.patterns if pattern in cell.patterns]
    return found


def sweep(count: int, seed: int = 0) -> list[Cell]:
    """`count` random layers, the same for the same seed: M from 1 to 512, as often small as large; K, N 256 to 3072."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        dtype, pattern = SWEPT[index % len(SWEPT)]
        m = round(math.exp(draw.uniform(0, math.log(512))))
        k, n = (draw.randint(256, 3072) for _ in range(2))
        if pattern != UNSTRUCTURED:
            k, n = k - k % 4, n - n % 4
        forms = ("dense", "bitmap", "index", "auto")
        found.append(Cell((k, n), (m,), round(draw.uniform(0.3, 0.98), 3), (pattern,), (dtype,), forms, "sweep"))
    return found


def relative_error(y: Tensor, y64: Tensor) -> float:
    return float((y.double() - y64).norm() / y64.norm())


# ---- timing ----


def _fields(
    call: Call, built: Built, cell: Cell, m: int, stats: Stats, probes: Sequence[peaks.Peaks]
) -> dict[str, object]:
    k, n = cell.shape
    kept = 1.0 if call.provider.form == "dense" else 1 - cell.sparsity
    gop_s = 2e-9 * m * n * k * kept / stats.p50
    gb_s, kind, rate = None, PEAKS[call.provider.dtype], gop_s
    if built.weight_bytes is not None:
        value_bytes = built.dtype.itemsize
        gb_s = 1e-9 * (built.weight_bytes + value_bytes * m * (n + k)) / stats.p50
    if m == 1 and gb_s is not None:
        kind, rate = "read_gbps", gb_s
    limits = [limit for probed in probes if (limit := getattr(probed, kind)) is not None]
    peak = median(limits) if limits and (m > 1 or gb_s is not None) else None
    return {
        "p20_us": stats.p20 * 1e6,
        "p50_us": stats.p50 * 1e6,
        "p80_us": stats.p80 * 1e6,
        "samples": stats.samples,
        "gop_s": gop_s,
        "gb_s": gb_s,
        "peak": peak,
        "peak_kind": kind if peak else "",
        "fraction": rate / peak if peak else None,
    }


def time_case(
    bound: dict[Call, Bound], built: dict[Call, Built], cell: Cell, m: int, threads: int, seconds: float
) -> dict[Call, dict[str, object]]:
    """Times the calls of one M in turns, with the peaks of the machine where wanted. Returns fields of rows."""
    runners = {call.name: Runner(b.run, "openmp") for call, b in bound.items()}
    if cell.covers != "sweep":
        probe = partial(peaks.measure, threads=threads, seconds=PEAK_SECONDS, read=m == 1)
        timing = time_round_robin(runners, seconds=seconds, probe=probe, seed=m)
        return {c: _fields(c, built[c], cell, m, timing.stats[c.name], timing.probes) for c in bound}
    auto = next((c for c in bound if c.provider.form == "auto"), None)
    ratio = None
    for budget in (seconds, LONGER * seconds):
        stats = time_round_robin(runners, seconds=budget, probe=lambda: None, seed=m).stats
        others = [stats[c.name].p50 for c in bound if c is not auto]
        ratio = min(others) / stats[auto.name].p50 if auto and others else None
        if ratio is None or ratio >= DOUBTED:
            break
    fields = {c: _fields(c, built[c], cell, m, stats[c.name], []) for c in bound}
    if auto is not None:
        fields[auto] |= {"peak_kind": "fastest", "fraction": ratio}
    return fields


# ---- rows ----


def _check(
    calls: Sequence[Call], built: dict[Call, Built], made: Made, m: int
) -> tuple[dict[Call, Bound], dict[Call, float], dict[Call, str]]:
    """Of those that were built: the ones that are right, everyone's error against float64, and the status."""
    x, data = made
    bound, errors, status = dict[Call, Bound](), dict[Call, float](), dict[Call, str]()
    for call in calls:
        if call not in built:
            continue
        try:
            ready = built[call].bind(x[:m])
            errors[call] = relative_error(ready.output(), data[call.data].y64[:m])
        except Exception as raised:  # whatever a foreign library raises is its result, and is reported as such
            status[call] = failure(raised)
            continue
        if errors[call] <= TOLERANCE[call.provider.dtype]:  # False for NaN
            bound[call] = ready
        status[call] = "ok" if call in bound else "wrong"
    return bound, errors, status


def run_cell(
    machine: Machine, calls: Sequence[Call], cell: Cell, threads: int, seconds: float, made: Made
) -> Iterator[list[Row]]:
    """Yields the rows of each M. A call that fails or is wrong gets a row that says so and no time."""
    k, n = cell.shape
    built: dict[Call, Built] = {}
    failed: dict[Call, str] = {}
    for call in calls:
        try:
            built[call] = call.provider.build(made[1][call.data].layer, threads)
        except Exception as raised:  # as above
            failed[call] = failure(raised)

    for m in cell.tokens:
        due = [call for call in calls if m <= call.provider.most]
        with torch.inference_mode():  # not around the building: modules are made where users make them
            bound, errors, status = _check(due, built, made, m)
            times = time_case(bound, built, cell, m, threads, seconds) if bound else {}
        yield [
            machine.row(
                OP,
                call.provider,
                call.provider.dtype,
                cell.covers,
                threads=threads,
                M=m,
                K=k,
                N=n,
                sparsity=cell.sparsity,
                options=call.pattern,
                error=errors.get(call),
                status=status[call] if call in built else failed[call],
                **times.get(call, {}),
            )
            for call in due
        ]


def calibrate(dtypes: Sequence[str], threads: int) -> None:
    """Measures this machine for format="auto", anew: what lies in the cache may be of a busier hour."""
    from pycompress.cost_model import calibrate_cost_model

    for dtype in dtypes:
        calibrate_cost_model(str(DTYPES[dtype]).removeprefix("torch."), threads=threads, force=True)


def run_all(
    providers: Sequence[Provider],
    cells: Sequence[Cell],
    threads: Sequence[int],
    seconds: Callable[[Cell], float],
    calibrated: bool,
) -> Iterator[Row]:
    """Runs every cell on every thread count, seconds(cell) for each M. Absent providers get one row each.

    calibrated: the cost model behind format="auto" measures this machine first.
    """
    machine = Machine.here()
    present = [p for p in providers if not p.missing]
    for p in providers:
        if p.missing:
            yield machine.row(OP, p, p.dtype, "layer", status=f"not installed: {p.missing}")
    automatic = sorted({p.dtype for p in present if p.form == "auto"} & {d for cell in cells for d in cell.dtypes})
    previous = torch.get_num_threads()
    try:
        for count in threads if calibrated and automatic else ():
            torch.set_num_threads(count)
            calibrate(automatic, count)
        for cell in cells:
            calls = calls_of(cell, present)
            if not calls:
                continue
            made = make_data(cell)
            for count in threads:
                torch.set_num_threads(count)
                for rows in run_cell(machine, calls, cell, count, seconds(cell), made):
                    print(summary.progress_line(rows), file=sys.stderr, flush=True)
                    yield from rows
    finally:
        torch.set_num_threads(previous)
