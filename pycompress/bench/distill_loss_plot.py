"""Plot of a result CSV of distill_loss: how fast everyone goes through the logits, and the floor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
from matplotlib import pyplot
from matplotlib.axes import Axes

from pycompress.bench.distill_loss_summary import (
    BOTH,
    COMPILE,
    EAGER,
    FORWARD,
    MAIN_OPTIONS,
    OURS,
    SHOWN,
    by_case,
    find,
)
from pycompress.bench.figures import n_threads, us
from pycompress.bench.rows import Row

_COLOURS = {OURS: "#d62728", COMPILE: "#1f77b4", EAGER: "#7f7f7f"}
_PASSES = {FORWARD: "both logits read", BOTH: "both logits read, the gradient written"}
_WIDTH = 0.27  # of a bar, where the groups are 1 apart
_ABOVE: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws a panel for each direction into `path`: the main loss on the most threads, fp32."""
    cases = {
        case: found
        for case, found in by_case(rows).items()
        if case.op == "distill_loss" and case.options == MAIN_OPTIONS
    }
    if not cases:
        raise ValueError(f"{path}: nothing to plot; the rows hold no measured {MAIN_OPTIONS}")
    threads = max(case.threads for case in cases)
    figure, axes = pyplot.subplots(1, 2, figsize=(14.4, 6), sharey=True)
    for axis, covers in zip(axes, _PASSES, strict=True):
        groups = {
            (case.vocab, case.tokens): found
            for case, found in cases.items()
            if case.threads == threads and case.covers == covers
        }
        _panel(axis, [groups[key] for key in sorted(groups)])
        axis.set_title(f"{covers}, {n_threads(threads)}")
        axis.set_ylabel(f"GB/s: {_PASSES[covers]}")
        axis.tick_params(labelleft=True)
    bars = [row.gb_s for found in cases.values() for row in found if row.gb_s and row.dtype == "fp32"]
    floors = [row.gb_s / row.fraction for found in cases.values() for row in found if row.gb_s and row.fraction]
    axes[0].set_ylim(min(bars) / 2, max(*bars, *floors) * 4)  # room for the legend
    axes[0].legend(loc="upper center", ncols=2, fontsize=9)
    first = next(row for found in cases.values() for row in found)
    title = f"distill_loss, fp32, {MAIN_OPTIONS}, on {first.device}, commit {first.commit}"
    figure.suptitle(f"{title}\nover a bar: how many times as long as pycompress it takes", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axis: Axes, groups: Sequence[Sequence[Row]]) -> None:
    """A group of bars for each shape; over a rival's bar, how many times as long it takes."""
    labels = []
    for place, rows in enumerate(groups):
        ours = find(rows, OURS)
        labels.append(f"{rows[0].M}×{rows[0].N}")
        for shift, (provider, colour) in enumerate(_COLOURS.items(), start=-1):
            row = find(rows, provider)
            if row is None or row.gb_s is None:
                continue
            left = place + shift * _WIDTH
            shown = SHOWN[provider] if place == 0 else "_"
            axis.bar(left, row.gb_s, _WIDTH * 0.94, color=colour, label=shown, zorder=2)
            if ours is not None and row is not ours:
                axis.annotate(f"{us(row) / us(ours):.1f}×", (left, row.gb_s), (0, 3), fontsize=8, **_ABOVE)
        if ours is not None and ours.gb_s and ours.fraction:
            floor = ours.gb_s / ours.fraction
            kind = "read bandwidth" if ours.peak_kind == "read_gbps" else "exponentials"
            shown = "the floor, measured meanwhile" if place == 0 else "_"
            axis.hlines(floor, place - 0.45, place + 0.45, color="black", linestyle="--", label=shown, zorder=3)
            axis.annotate(kind, (place, floor), (0, 4), fontsize=8, **_ABOVE)
    axis.set_yscale("log")
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlabel("tokens × classes")
    axis.grid(True, axis="y", which="major", alpha=0.3)
