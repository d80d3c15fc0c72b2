"""One recipe run with several seeds: what came out, as mean ± standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pycompress.run_report.read import Run, read_run
from pycompress.text_table import TextTable
from pycompress.workflow.records import StageRecord


@dataclass(frozen=True)
class Row:
    """A quantity before and after, a value a seed, and the change: before / after with `ratio`, else after - before."""

    name: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    change: tuple[float, ...]
    ratio: bool


class SeedsReport(TextTable):
    """Every metric, the file's size and the latency by batch size, over the finished runs of several seeds.

    The file is the final one, in its smallest form, against the float one; latency ratios are medians of ratios in the
    same round. The standard deviation is the sample's, of one seed 0.
    """

    header: ClassVar[tuple[str, ...]] = ("", "before", "after", "change")
    right: ClassVar[frozenset[str]] = frozenset({"before", "after", "change"})

    def __init__(self, seeds: Sequence[int], runs: Sequence[Run]) -> None:
        self.seeds = tuple(seeds)
        first = [run.records[0] for run in runs]
        last = [run.records[-1] for run in runs]
        self.quantities = [_metric(name, first, last) for name in last[0].metrics if _has(name, first + last)]
        if all(run.model_bytes for run in runs):
            self.quantities.append(_bytes(runs))
        for size in runs[-1].latency:
            if all(size in run.latency for run in runs):
                self.quantities.append(_latency(size, runs))

    @classmethod
    def of(cls, seeds: Sequence[int], folders: Sequence[Path]) -> SeedsReport:
        return cls(seeds, [read_run(folder) for folder in folders])

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                _spread(row.before),
                _spread(row.after),
                ("×" if row.ratio else "") + _spread(row.change, not row.ratio),
            )
            for row in self.quantities
        ]

    def summary(self) -> str:
        shown = ", ".join(map(str, self.seeds))
        return f"mean ± standard deviation of {len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}: {shown}"


def _has(name: str, records: Sequence[StageRecord]) -> bool:
    return all(math.isfinite(record.metrics.get(name, math.nan)) for record in records)


def _metric(name: str, first: Sequence[StageRecord], last: Sequence[StageRecord]) -> Row:
    before = tuple(record.metrics[name] for record in first)
    after = tuple(record.metrics[name] for record in last)
    return Row(name, before, after, tuple(b - a for a, b in zip(before, after, strict=True)), ratio=False)


def _bytes(runs: Sequence[Run]) -> Row:
    before = tuple(run.records[0].file_bytes / 1e6 for run in runs)
    after = tuple((run.model_bytes or 0) / 1e6 for run in runs)
    return Row("file, MB", before, after, tuple(a / b for a, b in zip(before, after, strict=True)), ratio=True)


def _latency(size: str, runs: Sequence[Run]) -> Row:
    times = [run.latency[size] for run in runs]
    before, after, speedup = (tuple(float(one[key]["p50"]) for one in times) for key in ("before", "after", "speedup"))
    before, after = (tuple(1e3 * seconds for seconds in values) for values in (before, after))
    return Row(f"latency of a batch of {size}, ms", before, after, speedup, ratio=True)


def _spread(values: Sequence[float], sign: bool = False) -> str:
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    largest = max(abs(mean), deviation)
    digits = min(max(0, 3 - math.floor(math.log10(largest))), 6) if largest else 0  # four figures of the larger one
    return f"{mean:{'+' if sign else ''}.{digits}f} ± {deviation:.{digits}f}"
