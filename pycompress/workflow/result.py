"""What compress() returns: the model, what is known of it after every stage, and a table of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from pycompress.report import megabytes
from pycompress.text_table import TextTable
from pycompress.workflow.records import WARNING, StageRecord

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CompressResult(TextTable):
    """The result of compress(). `print(result)` shows a table; rich shows the same one in colour.

    model: the compressed model, in eval mode; with `out` the very one that is in RUN/model.safetensors.
    records: one for each stage, the baseline first. history: losses, every few steps of training, as dicts with stage,
        name, step, loss, terms, lr and seconds. out: the folder of the run, or None.
    file_bytes: of the model's smallest file. layers: a row for each linear layer, latency: against the baseline, by
        batch size; both as run.json has them. notes: what was mended on the way.
    """

    model: nn.Module
    records: list[StageRecord]
    out: Path | None = None
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    file_bytes: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list, repr=False)
    latency: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)

    header: ClassVar[tuple[str, ...]] = (
        "stage", "metrics", "parameters", "sparsity", "memory MB", "file MB", "ms at batch", "seconds", "note",
    )  # fmt: skip
    right: ClassVar[frozenset[str]] = frozenset(("parameters", "sparsity", "memory MB", "file MB", "seconds"))

    @property
    def metrics(self) -> dict[str, float]:
        """Of the compressed model."""
        return self.records[-1].metrics

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, a row a stage."""
        return [
            (
                f"{record.index} {record.name}",
                numbers(record.metrics),
                f"{record.parameters:,}",
                f"{record.sparsity:.4g}",
                megabytes(record.memory_bytes),
                megabytes(record.file_bytes),
                ", ".join(f"{size}: {seconds * 1e3:.3g}" for size, seconds in record.latency.items()),
                f"{record.seconds:.1f}" if record.index else "",
                record.warning,
            )
            for record in self.records
        ]

    def summary(self) -> str:
        """One line: metrics, file and latency, before and after."""
        first, last = self.records[0], self.records[-1]
        parts = [f"{name} {_number(first.metrics.get(name))} -> {_number(v)}" for name, v in last.metrics.items()]
        if self.file_bytes:
            before, after = first.file_bytes, self.file_bytes
            ratio = f" ({before / after:.1f}x smaller)" if after < before else ""
            parts.append(f"file {megabytes(before)} -> {megabytes(after)} MB{ratio}")
        for size, seconds in last.latency.items():
            if seconds and size in first.latency:
                parts.append(f"{_speed_up(self.latency.get(size), first.latency[size] / seconds):.2f}x at batch {size}")
        if self.out is not None:
            parts.append(f"in {self.out}")
        return f"compress: {', '.join(parts)}"

    def __rich__(self) -> Table:
        """Fits 80 columns: a line for each metric and batch size, no frame, the notes below."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        notes = "\n".join(
            f"{record.index} {record.name}: {record.warning}" for record in self.records if record.warning
        )
        table = Table(
            title=Text(self.summary()), title_justify="left", caption=Text(notes) if notes else None,
            caption_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False,
        )  # fmt: skip
        for name in self.header[:-1]:
            title, wraps = "\n".join(name.rsplit(" ", 1)), name == "metrics"
            justify: Any = "right" if name in self.right else "left"
            table.add_column(title, justify=justify, no_wrap=not wraps, overflow="fold")
        for row in self.rows():
            table.add_row(*(Text(cell.replace(", ", "\n")) for cell in row[:-1]))
        return table

    def report(self, path: str | Path | None = None) -> Path:
        """Write report.html and report.json, into the run's folder or into `path`; returns the page.

        Raises ValueError for a run without a folder.
        """
        if self.out is None:
            raise ValueError("CompressResult.report: the run has no folder; pass out=... to compress()")
        from pycompress.run_report import write_report

        return write_report(self.out, path)


def line_of(record: StageRecord, stages: int) -> str:
    """A record for a reader who watches: "2/4 prune: accuracy 0.97, 90 % sparse, file 0.12 MB, 4.1 s"."""
    parts = [numbers(record.metrics)] if record.metrics else []
    if record.sparsity:
        parts.append(f"{100 * record.sparsity:.3g} % sparse")
    parts.append(f"file {megabytes(record.file_bytes)} MB")
    if record.index:
        parts.append(f"{record.seconds:.1f} s")
    if record.warning:
        parts.append(f"{WARNING}{record.warning}")
    return f"{record.index}/{stages} {record.name}: {', '.join(parts)}"


def numbers(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in metrics.items())


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _speed_up(latency: Any, quotient: float) -> float:
    """The median of the ratios of the same round, which a slow moment of the machine does not touch."""
    if isinstance(latency, dict) and isinstance(latency.get("speedup"), dict):
        return float(latency["speedup"].get("p50", quotient))
    return quotient
