"""Roofline plot of a result CSV: speed over arithmetic intensity, and the limits measured meanwhile."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
from matplotlib import pyplot
from matplotlib.axes import Axes

from pycompress.bench.rows import Row, timed

_ROOFS = {
    "int8_gops": ("int8 peak", "#202020"),
    "bf16_gflops": ("bf16 peak", "#606060"),
    "fp32_gflops": ("fp32 peak", "#909090"),
}
_COLOURS = ("#d62728", "#7f7f7f", "#8c564b", "#1f77b4", "#9467bd", "#2ca02c", "#ff7f0e", "#17becf")
_MARKERS = "os^Dv<>P"


def plot(rows: Sequence[Row], path: Path, series: Mapping[str, str], *, title: str) -> None:
    """Draws one panel per thread count into `path`.

    series: label -> beginning of the provider names behind it; of several, the fastest in each case is drawn.
    """
    done = [r for r in timed(rows) if r.forced_isa == ""] or timed(rows)
    counts = sorted({r.threads for r in done if r.threads})
    if not counts:
        raise ValueError(f"{path}: nothing to plot; the rows hold no measured layer")
    figure, axes = pyplot.subplots(1, len(counts), figsize=(7.2 * len(counts), 6), sharey=True, squeeze=False)
    for axis, threads in zip(axes[0], counts, strict=True):
        _panel(axis, [r for r in done if r.threads == threads], series)
        axis.set_title(_panel_title(threads, _peak(done, "read_gbps", threads)))
        axis.set_xlabel("arithmetic intensity: operations per byte of weight, x and y")
    axes[0][0].set_ylabel("GOP/s (2·M·N·K per second of the median call)")
    axes[0][-1].legend(loc="lower right", fontsize=9, framealpha=0.9)
    figure.suptitle(f"{title} on {done[0].device}, commit {done[0].commit}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel_title(threads: int, bandwidth: float | None) -> str:
    memory = f"; dashed: memory, {bandwidth:.0f} GB/s (a weight in cache is above it)" if bandwidth else ""
    return f"{threads} thread{'s' * (threads > 1)}{memory}"


def _panel(axis: Axes, rows: Sequence[Row], series: Mapping[str, str]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    for (label, prefix), colour, marker in zip(series.items(), _COLOURS, _MARKERS, strict=False):
        best: dict[tuple[int, int, int, int], Row] = {}
        for row in rows:
            if row.provider.startswith(prefix) and (row.case not in best or _gop_s(row) > _gop_s(best[row.case])):
                best[row.case] = row
        points = [(_gop_s(r) / r.gb_s, _gop_s(r)) for r in best.values() if r.gb_s]
        if points:
            ours = label == next(iter(series))
            x, y = zip(*points, strict=True)
            style = {"s": 60, "zorder": 4, "edgecolors": "black"} if ours else {"s": 26, "alpha": 0.75, "zorder": 3}
            axis.scatter(x, y, label=label, color=colour, marker=marker, linewidths=0.6 if ours else 0, **style)
    _roofs(axis, rows)
    axis.grid(True, which="major", alpha=0.3)


def _gop_s(row: Row) -> float:
    assert row.gop_s is not None
    return row.gop_s


def _roofs(axis: Axes, rows: Sequence[Row]) -> None:
    left, right = axis.get_xlim()
    for kind, (label, colour) in _ROOFS.items():
        if (peak := _peak(rows, kind)) is not None:
            axis.axhline(peak, color=colour, linewidth=1.2, zorder=2)
            axis.annotate(
                f"{label} {peak:.0f}",
                (left, peak),
                (4, 3),
                textcoords="offset points",
                fontsize=9,
                color=colour,
            )
    if (bandwidth := _peak(rows, "read_gbps")) is not None:
        highest = max((p for kind in _ROOFS if (p := _peak(rows, kind))), default=right * bandwidth)
        ends = (left, min(right, highest / bandwidth))
        axis.plot(ends, [x * bandwidth for x in ends], "--", color="#202020", linewidth=1.2, zorder=2)
    axis.set_xlim(left, right)


def _peak(rows: Sequence[Row], kind: str, threads: int | None = None) -> float | None:
    found = [r.peak for r in rows if r.peak_kind == kind and r.peak and threads in (None, r.threads)]
    return median(found) if found else None
