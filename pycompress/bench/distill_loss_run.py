"""Measures the cases of distill_loss: the shared data, the checks before timing, the floor, and the rows.

The floor is the least time that the machine could take, from rates measured between the bursts. Bytes: both logits
are read, and where a gradient is wanted it is written, at the rate at which memory is read. Exponentials: one of the
student and one of the teacher for each class, and one more where the hard term's is no power of the soft term's.
It takes the longer of the two.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pycompress import peaks
from pycompress.bench import distill_loss_summary as summary
from pycompress.bench import memory
from pycompress.bench.distill_loss_providers import (
    MAIN,
    PROVIDERS,
    LossFn,
    Options,
    Provider,
    composition,
    linear_composition,
)
from pycompress.bench.provider import Machine, failure
from pycompress.bench.rows import Row
from pycompress.bench.timing import Runner, time_round_robin

FORWARD, BOTH = "forward", "forward+backward"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Bounds on Row.error: of the gradients, which are rounded to the dtype, and sums of which float32 has many.
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 1e-3}
# fp16 gradients of a mean are too small for fp16: they are trained with a scaled loss, and measured so.
LOSS_SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 65536.0}
# As in int8_matmul_run.py. Rivals take a hundred times as long, so a burst gives us some calls against their one.
PEAK_SECONDS, BURST_SECONDS = 0.01, 0.03


@dataclass(frozen=True)
class Case:
    """tokens x vocab logits, or with `hidden` the hidden states of that width and the weights of both heads."""

    tokens: int
    vocab: int
    hidden: int | None = None
    options: Options = MAIN
    dtypes: tuple[str, ...] = ("fp32",)

    @property
    def op(self) -> str:
        return "distill_loss" if self.hidden is None else "linear_distill_loss"


@dataclass(frozen=True)
class Data:
    """Arguments of a loss; `leaves` are the places of those that want gradients, `scale` is that of the loss."""

    arguments: tuple[Tensor | None, ...]
    leaves: tuple[int, ...]
    scale: float

    def wanting_gradients(self) -> tuple[Tensor | None, ...]:
        return tuple(
            a.detach().requires_grad_() if a is not None and i in self.leaves else a
            for i, a in enumerate(self.arguments)
        )


@dataclass(frozen=True)
class Truth:
    """The loss and the gradients in float64, these times the scale of the loss."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def make_data(case: Case, dtype: str) -> Data:
    generator = torch.Generator().manual_seed(case.tokens * 1_000_003 + case.vocab)
    normal = partial(torch.randn, generator=generator)
    labels = torch.randint(case.vocab, (case.tokens,), generator=generator) if case.options.alpha > 0 else None
    if case.hidden is None:
        student = normal(case.tokens, case.vocab).mul_(2)
        teacher = normal(case.tokens, case.vocab).add_(student)
        logits = [x.to(DTYPES[dtype]) for x in (student, teacher)]
        return Data((*logits, labels), (0,), LOSS_SCALE[dtype])
    hidden = [normal(case.tokens, case.hidden).to(DTYPES[dtype]) for _ in range(2)]
    weights = [normal(case.vocab, case.hidden).mul_(2 / case.hidden**0.5).to(DTYPES[dtype]) for _ in range(2)]
    return Data((hidden[0], weights[0], hidden[1], weights[1], labels), (0, 1), LOSS_SCALE[dtype])


def truth(case: Case, data: Data) -> Truth:
    wide = [a.double() if a is not None and a.is_floating_point() else a for a in data.arguments]
    exact = Data(tuple(wide), data.leaves, data.scale)
    make = composition if case.hidden is None else linear_composition
    return Truth(*call_both(make(case.options), exact, exact.wanting_gradients()))


def call_both(loss: LossFn, data: Data, arguments: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and backward into fresh gradients, as a training step does after zero_grad."""
    leaves = [leaf for i in data.leaves if (leaf := arguments[i]) is not None]
    for leaf in leaves:
        leaf.grad = None
    value = loss(*arguments)
    (value if data.scale == 1 else value * data.scale).backward()
    return value.detach(), tuple(leaf.grad for leaf in leaves if leaf.grad is not None)


def relative_error(y: Tensor, y64: Tensor) -> float:
    return float((y.double() - y64).norm() / y64.norm())


def build(provider: Provider, case: Case) -> LossFn:
    make = provider.linear if case.hidden is not None else provider.loss
    assert make is not None
    return make(case.options)


@dataclass(frozen=True)
class Call:
    """One provider's call in one dtype: what is timed, and what of it is compared with the truth."""

    provider: Provider
    dtype: str
    loss: LossFn
    data: Data
    arguments: tuple[Tensor | None, ...]

    @property
    def name(self) -> str:
        return f"{self.provider.name} {self.dtype}"

    def run(self, direction: str) -> object:
        if direction == BOTH:
            return call_both(self.loss, self.data, self.arguments)
        return self.loss(*self.data.arguments)

    def error(self, direction: str, exact: Truth) -> float:
        if direction == FORWARD:
            return relative_error(self.loss(*self.data.arguments), exact.loss)
        value, gradients = call_both(self.loss, self.data, self.arguments)
        pairs = zip((value, *gradients), (exact.loss, *exact.gradients), strict=True)
        errors = [relative_error(found, wanted) for found, wanted in pairs]
        return max(errors) if all(e == e for e in errors) else float("nan")


# ---- the floor ----


def floor_work(case: Case, dtype: str, direction: str) -> dict[str, float]:
    """Field of Peaks -> 1e9 units of it that nobody can do without."""
    if case.hidden is not None:
        # Both logits forward; two gradients of the student's product backward. 2 for a multiply-accumulate.
        products = 4 if direction == BOTH else 2
        return {"fp32_gflops": 2e-9 * products * case.tokens * case.vocab * case.hidden}
    elements = case.tokens * case.vocab
    passes = 3 if direction == BOTH else 2
    apart = case.options.alpha > 0 and case.options.temperature not in (1, 2, 4)
    return {
        "read_gbps": 1e-9 * passes * elements * DTYPES[dtype].itemsize,
        "exp_g": 1e-9 * (3 if apart else 2) * elements,
    }


def of_floor(work: dict[str, float], probes: Sequence[peaks.Peaks], seconds: float) -> dict[str, Any]:
    """Row.peak, peak_kind and fraction: of the peak that takes longest."""
    rates: dict[str, float] = {}
    for kind in work:
        found = [rate for probe in probes if (rate := getattr(probe, kind, None))]
        if found:
            rates[kind] = median(found)
    if not rates:
        return {}
    kind = max(rates, key=lambda k: work[k] / rates[k])
    return {"peak": rates[kind], "peak_kind": kind, "fraction": work[kind] / rates[kind] / seconds}


def time_calls(
    calls: Sequence[Call], case: Case, direction: str, threads: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Times the calls in turns with the peaks of the machine. Returns Call.name -> fields of rows."""
    runners = {call.name: Runner(partial(call.run, direction), "openmp") for call in calls}
    probe = partial(peaks.measure, threads=threads, seconds=PEAK_SECONDS, read=case.hidden is None)
    timing = time_round_robin(
        runners, seconds=seconds, probe=probe, seed=case.vocab, burst_seconds=BURST_SECONDS
    )
    fields: dict[str, dict[str, Any]] = {}
    for call in calls:
        stats = timing.stats[call.name]
        work = floor_work(case, call.dtype, direction)
        operations = work.get("exp_g", work.get("fp32_gflops", 0.0))
        fields[call.name] = {
            "p20_us": stats.p20 * 1e6,
            "p50_us": stats.p50 * 1e6,
            "p80_us": stats.p80 * 1e6,
            "samples": stats.samples,
            "gop_s": operations / stats.p50,
            "gb_s": work["read_gbps"] / stats.p50 if "read_gbps" in work else None,
            **of_floor(work, timing.probes, stats.p50),
        }
    return fields


# ---- memory ----


def extra_mb(provider: str, dtype: str, threads: int, case: dict[str, Any]) -> float:
    """1e6 bytes that forward and backward of a case (as a dict) need besides their inputs; in this process."""
    torch.set_num_threads(threads)
    chosen = next(p for p in PROVIDERS if p.name == provider)
    wanted = Case(**case | {"options": Options(**case["options"])})
    # What the first call brings to stay is not the case's: code that is paged in, and for a compiler the compiling.
    small = wanted if chosen.compiles else Case(3, 17, wanted.hidden and 5, wanted.options)
    loss = build(chosen, wanted)
    for warm_up in (small, wanted):
        data = make_data(warm_up, dtype)
        arguments = data.wanting_gradients()
        needed = memory.peak_extra_bytes(partial(call_both, loss, data, arguments))
    return needed / 1e6


def measured_memory(call: Call, case: Case, threads: int) -> float | None:
    """In a process of its own; None where this system does not tell."""
    if not memory.can_measure():
        return None
    found: float = memory.in_subprocess(
        f"{__name__}:extra_mb", provider=call.provider.name, dtype=call.dtype, threads=threads, case=asdict(case)
    )
    return found


# ---- rows ----


def run_case(
    machine: Machine,
    providers: Sequence[Provider],
    case: Case,
    inputs: dict[str, tuple[Data, Truth]],
    threads: int,
    seconds: float,
    with_memory: bool,
) -> Iterator[list[Row]]:
    """Yields the rows of each direction. A provider that fails or is wrong gets a row that says so and no time.

    inputs: by dtype.
    """
    torch.compiler.reset()  # it gives up on a function after eight variants of it
    calls: list[Call] = []
    failed: dict[tuple[Provider, str], str] = {}
    for provider in providers:
        for dtype, (data, _) in inputs.items():
            try:
                calls.append(Call(provider, dtype, build(provider, case), data, data.wanting_gradients()))
            except Exception as raised:  # whatever a foreign library raises is its result, and is reported as such
                failed[provider, dtype] = failure(raised)

    for direction in (FORWARD, BOTH):
        status, errors, right = dict(failed), dict[str, float](), list[Call]()
        extra: dict[str, float | None] = {}
        for call in calls:
            key = call.provider, call.dtype
            try:
                errors[call.name] = call.error(direction, inputs[call.dtype][1])
                if with_memory and direction == BOTH:
                    extra[call.name] = measured_memory(call, case, threads)
            except Exception as raised:  # as above
                status[key] = failure(raised)
                continue
            status[key] = "ok" if errors[call.name] <= TOLERANCE[call.dtype] else "wrong"  # wrong for NaN
            right += [call] if status[key] == "ok" else []
        times = time_calls(right, case, direction, threads, seconds) if right else {}
        yield [
            machine.row(
                case.op,
                provider,
                dtype,
                direction,
                threads=threads,
                M=case.tokens,
                N=case.vocab,
                K=case.hidden,
                options=str(case.options),
                error=errors.get(name),
                status=status[provider, dtype],
                extra_mb=extra.get(name),
                **times.get(name, {}),
            )
            for provider in providers
            for dtype in inputs
            if (name := f"{provider.name} {dtype}")
        ]


def run_all(
    providers: Sequence[Provider],
    cases: Sequence[Case],
    threads: Sequence[int],
    seconds: float,
    with_memory: bool,
) -> Iterator[Row]:
    """Runs every case on every thread count, memory on the last. Absent providers get one row each."""
    machine = Machine.here()
    present = [p for p in providers if not p.missing]
    for p in providers:
        why = f"not installed: {p.missing}" if p.missing else f"no logits: {p.why_not}" if p.why_not else ""
        if why:
            yield machine.row("distill_loss", p, "fp32", BOTH, status=why)
    previous = torch.get_num_threads()
    try:
        for case in cases:
            able = [p for p in present if case.hidden is not None or p.loss is not None]
            made = {dtype: make_data(case, dtype) for dtype in case.dtypes}
            inputs = {dtype: (data, truth(case, data)) for dtype, data in made.items()}
            for count in threads:
                torch.set_num_threads(count)
                memory_too = with_memory and count == threads[-1] and case.options == MAIN
                for rows in run_case(machine, able, case, inputs, count, seconds, memory_too):
                    print(summary.progress_line(rows), file=sys.stderr, flush=True)
                    yield from rows
    finally:
        torch.set_num_threads(previous)
