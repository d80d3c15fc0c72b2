"""What the benchmarks on a GPU share: a case and its providers, the check before timing, the floor, the rows.

The floor of a case is the least time that the device could take: the bytes that must move at the rate at which memory
was seen to move them, or the multiplications at the rate of torch's own product of that type, whichever takes longer.
Both rates are measured in the same process, between the calls. It is the same for all providers of a row's dtype.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pycompress import gpu
from pycompress.bench import gpu_summary
from pycompress.bench.gpu_meter import GpuPeaks, Meter, limits
from pycompress.bench.options import describe_all
from pycompress.bench.provider import BaseProvider, Machine, choose, failure
from pycompress.bench.rows import Row, read_csv, write_csv
from pycompress.bench.timing import Stats


@dataclass(frozen=True)
class Work:
    """What nobody can do without: 1e9 bytes, and 1e9 operations at the rate `kind` of GpuPeaks (None: counts bytes)."""

    gbytes: float
    gops: float = 0.0
    kind: str | None = None

    def floor(self, rates: dict[str, float]) -> tuple[float, str, float] | None:
        """(seconds, field of GpuPeaks or memory_gbps, its rate), of what takes longest; None without any rate."""
        works = [("memory_gbps", self.gbytes), *([(self.kind, self.gops)] if self.kind else [])]
        found = [(work / rates[kind], kind, rates[kind]) for kind, work in works if kind in rates]
        return max(found) if found else None


@dataclass(frozen=True)
class Bound:
    """A provider with its inputs. output: what is compared with the truths. work: of this provider's dtype."""

    run: Callable[[], object]
    output: Callable[[], Sequence[Tensor]]
    work: Work


@dataclass(frozen=True)
class GpuProvider(BaseProvider):
    """One way to compute the operation: build(case's data) makes the call.

    backend: of pycompress, "cuda" or "triton", or how a library runs it. covers: as Row.covers.
    """

    name: str
    backend: str
    build: Callable[[Any], Bound]
    dtype: str = "bf16"
    covers: str = "layer"
    requires: tuple[str, ...] = ("torch",)

    @property
    def isa(self) -> str:
        return ""  # a row has the device's

    def why_not(self, device: torch.device) -> str:
        """Why it cannot run at all; "" if it can."""
        if self.missing:
            return f"not installed: {self.missing}"
        missing = {"cuda": gpu.cuda_missing, "triton": gpu.triton_missing}.get(self.backend)
        ours = self.name.startswith("pycompress")
        reason = missing(torch.empty(0, device=device)) if ours and missing else None
        return f"not usable: {reason}" if reason else ""


@dataclass(frozen=True)
class GpuCase:
    """One case of one operation. make(device) -> (the providers' data, the truths to compare their outputs with).

    fields: of Row, which name the case. tolerance: on Row.error, by the provider's dtype. covers: as Row.covers, for
    all providers where it is not empty.
    """

    op: str
    fields: dict[str, Any]
    make: Callable[[torch.device], tuple[Any, Sequence[Tensor]]]
    providers: tuple[GpuProvider, ...]
    tolerance: dict[str, float]
    covers: str = ""


def relative_error(y: Tensor, y64: Tensor) -> float:
    return float((y.double() - y64).norm() / y64.norm())


def _bind(case: GpuCase, providers: Sequence[GpuProvider], device: torch.device) -> Iterator[tuple[Any, ...]]:
    """(provider, the call or None, its error or None, status) of each; what is wrong is not timed."""
    data, truths = case.make(device)
    for provider in providers:
        try:
            bound = provider.build(data)
            errors = [relative_error(y, y64) for y, y64 in zip(bound.output(), truths, strict=True)]
        except Exception as raised:  # whatever a foreign library raises is its result, and is reported as such
            yield provider, None, None, failure(raised)
            continue
        error = max(errors) if all(e == e for e in errors) else float("nan")
        right = error <= case.tolerance[provider.dtype]  # False for NaN
        yield provider, bound if right else None, error, "ok" if right else "wrong"


def _times(stats: Stats, work: Work) -> dict[str, Any]:
    return {
        "p20_us": stats.p20 * 1e6,
        "p50_us": stats.p50 * 1e6,
        "p80_us": stats.p80 * 1e6,
        "samples": stats.samples,
        "gop_s": work.gops / stats.p50 if work.kind else None,
        "gb_s": work.gbytes / stats.p50,
    }


def _of_floor(stats: Stats, work: Work, probes: list[GpuPeaks]) -> dict[str, Any]:
    floor = work.floor(limits(probes))
    return {} if floor is None else {"peak": floor[2], "peak_kind": floor[1], "fraction": floor[0] / stats.p50}


def run_case(
    machine: Machine, meter: Meter, case: GpuCase, providers: Sequence[GpuProvider], seconds: float
) -> list[Row]:
    """The rows of one case: each provider's time on the device, and the eager one; what is wrong has no time."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it gives up on a function after eight variants of it
    states = list(_bind(case, providers, meter.device))
    runners = {p.name: bound.run for p, bound, _, _ in states if bound is not None}
    timing = meter.in_turns(runners, seconds=seconds, seed=len(runners)) if runners else None
    rows = []
    for provider, bound, error, status in states:
        covers = case.covers or provider.covers
        fields = {"isa": meter.isa, "threads": 1, **case.fields, "error": error, "status": status}
        if bound is None or timing is None:
            rows.append(machine.row(case.op, provider, provider.dtype, covers, **fields))
            continue
        stats = timing.stats[provider.name]
        device = fields | _times(stats, bound.work) | _of_floor(stats, bound.work, timing.probes)
        rows.append(machine.row(case.op, provider, provider.dtype, covers, **device))
        if covers != "product":
            eager = fields | _times(meter.wall(bound.run), bound.work)
            rows.append(machine.row(case.op, provider, provider.dtype, gpu_summary.eager(covers), **eager))
    return rows


def run_all(meter: Meter, cases: Sequence[GpuCase], chosen: Sequence[GpuProvider], seconds: float) -> Iterator[Row]:
    """Runs every case. Providers that cannot run get one row each, which says why."""
    machine = Machine.of(meter.name, meter.cache_mib)
    able = []
    for p in chosen:
        why = p.why_not(meter.device)
        if why:
            yield machine.row(cases[0].op, p, p.dtype, p.covers, status=why)
        else:
            able.append(p)
    for case in cases:
        present = [p for p in able if p in case.providers]
        rows = run_case(machine, meter, case, present, seconds)
        print(gpu_summary.progress_line(rows), file=sys.stderr, flush=True)
        yield from rows


# ---- the command ----


def parser(name: str, description: str, seconds: float) -> argparse.ArgumentParser:
    """What every benchmark on a GPU takes."""
    found = argparse.ArgumentParser(prog=f"pycompress bench {name}", description=description)
    add = found.add_argument
    add("--device", default="cuda", metavar="DEVICE", help="cuda, cuda:1, ...; cpu only tries the program out")
    add("--quick", action="store_true", help="few cases, short timings")
    add("--providers", type=lambda text: text.split(","), default=[], help="names or their beginnings")
    add("--seconds", type=float, help=f"of timing per case and provider; default: {seconds:g}, quick a fifth of it")
    add("--out", type=Path, default=Path("bench-out"), help=f"folder for {name}-cuda.csv and .md")
    add("--from", dest="source", type=Path, metavar="CSV", help="measure nothing, report from this file")
    add("--list", action="store_true", help="list the providers and the versions installed")
    return found


def command(
    name: str,
    options: argparse.Namespace,
    parsed_by: argparse.ArgumentParser,
    cases: Sequence[GpuCase],
    seconds: float,
    meter: Meter | None = None,
) -> int:
    """Runs the cases, writes NAME-cuda.csv and NAME-cuda.md, and prints the table. Returns the exit status."""
    known = tuple(dict.fromkeys(p for case in cases for p in case.providers))
    try:
        chosen = choose(known, options.providers)
        source = read_csv(options.source) if options.source else []
    except (ValueError, OSError) as error:
        parsed_by.error(str(error))
    if options.list:
        describe_all(known, lambda p: f"{p.name:32} {p.dtype:12} {p.covers:16}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    rows = list(source)
    if not source:
        device = _device(options.device, parsed_by)
        each = options.seconds or (seconds / 5 if options.quick else seconds)
        try:
            rows.extend(run_all(meter or Meter.of(device), cases, chosen, each * max(1, len(chosen))))
        finally:
            write_csv(options.out / f"{name}-cuda.csv", rows)  # an interrupted run keeps what it measured
    text = gpu_summary.tables(rows)
    (options.out / f"{name}-cuda.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


def _device(name: str, parsed_by: argparse.ArgumentParser) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        parsed_by.error(f"--device {name}: expected cuda, cuda:1, ..., or cpu to try the program out")
    if device.type == "cuda" and not torch.cuda.is_available():
        parsed_by.error(f"--device {name}: torch {torch.__version__} sees no GPU; `pycompress info` tells more")
    if device.type not in ("cuda", "cpu"):
        parsed_by.error(f"--device {name}: expected cuda, cuda:1, ..., or cpu to try the program out")
    return device
