"""Measures the cases of int8_matmul and int4_matmul: the shared data, the checks before timing, and the rows."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from pycompress import ops, peaks
from pycompress.bench import int8_matmul_summary as summary
from pycompress.bench.int8_matmul_providers import TOLERANCE, Bind, Bound, Layer, Provider
from pycompress.bench.provider import Machine, failure
from pycompress.bench.rows import Row
from pycompress.bench.timing import Runner, time_round_robin

Shape = tuple[int, int]  # K, N
Case = tuple[int, int, int, int]  # threads, M, K, N

# Long enough for a loop of each kind, short enough to meet the same weather as the bursts around it.
PEAK_SECONDS = 0.01

@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a linear layer.

    op: of its rows. element_bytes: by dtype of a provider, of one element of (the weight, x and y). tolerance: bounds
    on Row.error, by the same. progress: the line that is printed for a measured case. integer: whose integers are those
    that sums_are_exact compares.
    """

    op: str
    element_bytes: Mapping[str, tuple[float, float]]
    tolerance: Mapping[str, float]
    progress: Callable[[Sequence[Row]], str]
    integer: tuple[str, ...] = ()


INT8 = Benchmark(
    "int8_matmul",
    {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 4), "int8-weight": (1, 4)},
    TOLERANCE,
    summary.progress_line,
    ("pycompress-dynamic", "pycompress-static"),
)


@dataclass(frozen=True)
class Data:
    """One layer, its inputs x (M, K) for the largest M, and y64 = x @ weight.T + bias in float64."""

    layer: Layer
    x: Tensor
    y64: Tensor


def make_data(shape: Shape, tokens: int) -> Data:
    k, n = shape
    generator = torch.Generator().manual_seed(k * 1_000_003 + n)
    x = torch.randn(tokens, k, generator=generator)
    weight = torch.randn(n, k, generator=generator).div_(k**0.5)
    bias = torch.randn(n, generator=generator)
    low, high = x.aminmax()
    layer = Layer(weight, bias, (low.item(), high.item()))
    return Data(layer, x, x.double() @ weight.double().t() + bias.double())


def relative_error(y: Tensor, y64: Tensor) -> float:
    return float((y.double() - y64).norm() / y64.norm())


def sums_are_exact(weight: Tensor) -> bool:
    """Whether int8_linear gives the integers that float64 does, where nothing before the sum is rounded.

    x holds whole numbers and a 127 in each row, so its scale is 1. Rows of only ±127 meet weights of only
    ±127, which is what saturates an int16 on the way.
    """
    q, _ = ops.quantize_weight(weight[:65])
    q[0], q[-1] = 127, -127
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (9, q.shape[1]), generator=generator).float()
    x[0], x[1] = 127, -127
    x[:, 0] = 127
    y = ops.int8_linear(x, ops.pack_weight(q), torch.ones(q.shape[0]), backend="native")
    return torch.equal(y, (x.double() @ q.double().t()).float())


def time_case(
    benchmark: Benchmark, bound: dict[Provider, Bound], case: Case, seconds: float
) -> dict[Provider, dict[str, object]]:
    """Times the providers of one case in turns with the peaks of the machine. Returns fields of rows."""
    threads, m, k, n = case
    runners = {p.name: Runner(b.run, p.pool) for p, b in bound.items()}
    probe = partial(peaks.measure, threads=threads, seconds=PEAK_SECONDS, read=m == 1)
    timing = time_round_robin(runners, seconds=seconds, probe=probe, seed=m)
    found: dict[Provider, dict[str, object]] = {}
    for provider in bound:
        stats = timing.stats[provider.name]
        weight_bytes, value_bytes = benchmark.element_bytes[provider.dtype]
        gop_s = 2e-9 * m * n * k / stats.p50
        gb_s = 1e-9 * (weight_bytes * n * k + value_bytes * m * (n + k)) / stats.p50
        kind = "read_gbps" if m == 1 else provider.peak
        limits = [limit for probed in timing.probes if (limit := getattr(probed, kind)) is not None]
        peak = median(limits) if limits else None
        found[provider] = {
            "p20_us": stats.p20 * 1e6,
            "p50_us": stats.p50 * 1e6,
            "p80_us": stats.p80 * 1e6,
            "samples": stats.samples,
            "gop_s": gop_s,
            "gb_s": gb_s,
            "peak": peak,
            "peak_kind": kind,
            "fraction": (gb_s if m == 1 else gop_s) / peak if peak else None,
        }
    return found


def run_layer(
    benchmark: Benchmark,
    machine: Machine,
    providers: Sequence[Provider],
    data: Data,
    threads: int,
    tokens: Sequence[int],
    seconds: float,
) -> Iterator[list[Row]]:
    """Yields the rows of each M. A provider that fails or is wrong gets a row that says so and no time."""
    n, k = data.layer.weight.shape
    binds: dict[Provider, Bind] = {}
    failed: dict[Provider, str] = {}
    for provider in providers:
        try:
            binds[provider] = provider.build(data.layer, threads)
        except Exception as raised:  # whatever a foreign runtime raises is its result, and is reported as such
            failed[provider] = failure(raised)
    exact = ("yes" if sums_are_exact(data.layer.weight) else "no") if benchmark.integer else ""

    for m in tokens:
        status, errors, bound = dict(failed), dict[Provider, float](), dict[Provider, Bound]()
        for provider, bind in binds.items():
            try:
                call = bind(data.x[:m])
                errors[provider] = relative_error(call.output(), data.y64[:m])
            except Exception as raised:  # as above
                status[provider] = failure(raised)
                continue
            if errors[provider] <= benchmark.tolerance[provider.dtype]:  # False for NaN
                bound[provider] = call
            status[provider] = "ok" if provider in bound else "wrong"
        times = time_case(benchmark, bound, (threads, m, k, n), seconds) if bound else {}
        yield [
            machine.row(
                benchmark.op,
                provider,
                provider.dtype,
                provider.covers,
                threads=threads,
                M=m,
                K=k,
                N=n,
                error=errors.get(provider),
                exact_sums=exact if provider.name in benchmark.integer else "",
                status=status[provider],
                **times.get(provider, {}),
            )
            for provider in providers
        ]


def run_all(
    providers: Sequence[Provider],
    cases: Sequence[tuple[Shape, Sequence[int]]],
    threads: Sequence[int],
    seconds: float,
    benchmark: Benchmark = INT8,
) -> Iterator[Row]:
    """Runs every (shape, tokens) of `cases` on every thread count. Absent providers get one row each."""
    machine = Machine.here()
    present = [p for p in providers if not p.missing]
    for p in providers:
        if p.missing:
            yield machine.row(benchmark.op, p, p.dtype, p.covers, status=f"not installed: {p.missing}")
    previous = torch.get_num_threads()
    try:
        for shape, tokens in cases:
            data = make_data(shape, max(tokens))
            for count in threads:
                torch.set_num_threads(count)
                for of_case in run_layer(benchmark, machine, present, data, count, tokens, seconds):
                    print(benchmark.progress(of_case), file=sys.stderr, flush=True)
                    yield from of_case
    finally:
        torch.set_num_threads(previous)
