"""The demo's result as JSON, as a table in the terminal and as a chart."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from .measure import Accuracy, Latency

_COLOURS = {"fp32": "#8a8f98", "torch int8": "#e0a030", "pycompress int8": "#2563eb"}


@dataclass
class VariantResult:
    name: str
    memory_bytes: int
    disk_bytes: int
    accuracy: Accuracy
    latency: dict[str, Latency] = field(default_factory=dict)  # keyed "8x128": batch x length


@dataclass
class DemoResult:
    machine: dict[str, Any]
    sentences: int
    padding: dict[str, float]  # keyed as latency: share of the batch's tokens that are padding
    swap: dict[str, int]
    notes: list[str]
    variants: list[VariantResult]

    @property
    def shapes(self) -> list[str]:
        return list(self.padding)


def write_json(result: DemoResult, path: Path) -> None:
    variants = {
        v.name: {
            "memory_bytes": v.memory_bytes,
            "disk_bytes": v.disk_bytes,
            "cosine_mean": v.accuracy.mean,
            "cosine_worst": v.accuracy.worst,
            "neighbour_agreement": v.accuracy.neighbour_agreement,
            "latency_ms": {shape: t.milliseconds for shape, t in v.latency.items()},
            "speedup_over_fp32": {shape: t.speedup for shape, t in v.latency.items()},
            "rounds": {shape: t.rounds for shape, t in v.latency.items()},
        }
        for v in result.variants
    }
    document = {
        "model": "all-MiniLM-L6-v2",
        "machine": result.machine,
        "sentences": result.sentences,
        "padding": result.padding,
        "swap": result.swap,
        "notes": result.notes,
        "variants": variants,
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def table(result: DemoResult) -> Table:
    grid = Table(title=_title(result), title_style="bold", caption_justify="left")
    grid.add_column("")
    for v in result.variants:
        grid.add_column(v.name, justify="right", style="bold" if v.name.startswith("pycompress") else None)
    base = result.variants[0]

    def row(label: str, cells: list[str], end_section: bool = False) -> None:
        grid.add_row(label, *cells, end_section=end_section)

    row("in memory", [f"{v.memory_bytes / 1e6:.1f} MB" for v in result.variants])
    row("on disk", [f"{v.disk_bytes / 1e6:.1f} MB" for v in result.variants], end_section=True)
    for shape in result.shapes:
        timed = [(v, v.latency[shape]) for v in result.variants]
        cells = [f"{t.milliseconds:.2f} ms" + ("" if v is base else f"  {t.speedup:4.2f}×") for v, t in timed]
        row(f"latency at {shape.replace('x', ' × ')}", cells, end_section=shape == result.shapes[-1])
    row("embedding cosine, mean", [f"{v.accuracy.mean:.4f}" for v in result.variants])
    row("embedding cosine, worst", [f"{v.accuracy.worst:.4f}" for v in result.variants])
    row("same nearest sentence", [f"{v.accuracy.neighbour_agreement:.1%}" for v in result.variants])
    rounds = sorted({t.rounds for t in base.latency.values()})
    counts = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    grid.caption = (
        f"latency: batch × tokens, median of {counts} interleaved rounds; × is over fp32.\n"
        f"accuracy: against fp32, over {result.sentences} sentences of the Python manual."
    )
    return grid


def chart(result: DemoResult, path: Path) -> None:
    """Writes a PNG of two panels: speed-up by shape, and the embedding cosine of every sentence, sorted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    speed, cosine = figure.subplots(1, 2)
    figure.suptitle(_title(result), fontsize=13)
    _speed_panel(speed, result)
    _cosine_panel(cosine, result)
    figure.savefig(path, dpi=120)


def _speed_panel(axes: Any, result: DemoResult) -> None:
    width = 0.8 / len(result.variants)
    for i, v in enumerate(result.variants):
        at = [s + (i - (len(result.variants) - 1) / 2) * width for s in range(len(result.shapes))]
        timed = [v.latency[shape] for shape in result.shapes]
        label = f"{v.name}, {v.memory_bytes / 1e6:.0f} MB"
        bars = axes.bar(at, [t.speedup for t in timed], width * 0.94, color=_COLOURS.get(v.name), label=label)
        axes.bar_label(bars, [_short_ms(t.milliseconds) for t in timed], padding=2, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(result.shapes)), [s.replace("x", " × ") for s in result.shapes])
    axes.set_xlabel("batch × tokens")
    axes.set_ylabel("speed-up over fp32")
    axes.set_title("Speed (labels: median latency in ms)", fontsize=11)
    axes.margins(y=0.18)
    axes.legend(loc="upper left", fontsize=9, ncols=len(result.variants), columnspacing=1, handlelength=1)
    axes.spines[["top", "right"]].set_visible(False)


def _cosine_panel(axes: Any, result: DemoResult) -> None:
    for v in result.variants[1:]:
        values = sorted(v.accuracy.cosine)
        share = [100 * (i + 1) / len(values) for i in range(len(values))]
        label = f"{v.name}: mean {v.accuracy.mean:.4f}, worst {v.accuracy.worst:.4f}"
        axes.plot(share, values, color=_COLOURS.get(v.name), linewidth=2, label=label)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 100)
    axes.set_ylim(top=1.004)
    axes.set_xlabel(f"% of {result.sentences} sentences, least alike first")
    axes.set_ylabel("cosine with the fp32 embedding")
    axes.set_title("Accuracy (higher is better)", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _title(result: DemoResult) -> str:
    threads = result.machine["threads"]["torch"]
    plural = "" if threads == 1 else "s"
    return f"all-MiniLM-L6-v2, fp32 against int8 · {result.machine['cpu']['name']}, {threads} thread{plural}"


def _short_ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:.0f}"
