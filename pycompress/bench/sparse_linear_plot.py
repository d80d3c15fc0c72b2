"""Plot of a result CSV of sparse_linear: speed-up over the dense layer against sparsity, a panel for each dtype."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # writes files; needs no display
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from pycompress.bench.figures import n_threads
from pycompress.bench.rows import Row, timed
from pycompress.bench.sparse_linear_curves import DENSE, Point, Series, curves

_COLOURS = {"unstructured": "#d62728", "4x4": "#1f77b4", "4x1": "#2ca02c", "1x4": "#ff7f0e", "2:4": "#9467bd"}
_SHOWN = {"fp32": "dense: nn.Linear, fp32", "bf16": "dense: nn.Linear, bf16", "int8": "dense: our own Int8Linear"}
_STYLES: dict[str, dict[str, Any]] = {
    "index": {"linestyle": "-", "marker": "o", "markersize": 5},
    "bitmap": {"linestyle": "--", "marker": "s", "markersize": 5},
    "csr": {"linestyle": ":", "marker": "x", "markersize": 7, "color": "#606060"},
    "bsr": {"linestyle": ":", "marker": "+", "markersize": 9, "color": "#909090"},
}
# Lies under the form that it chose.
_AUTO: dict[str, Any] = {"linestyle": "-", "linewidth": 5, "alpha": 0.25, "zorder": 1}
_FEW = 8  # tokens up to which the bitmap is what is made for them


def can_plot(rows: Sequence[Row]) -> bool:
    return bool(curves(rows, _most_threads(rows)))


def _most_threads(rows: Sequence[Row]) -> int:
    return max((r.threads for r in timed(rows) if r.threads), default=0)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws one token and the most tokens, each with a panel for every dtype, on the most threads."""
    threads = _most_threads(rows)
    found = curves(rows, threads)
    if not found:
        raise ValueError(f"{path}: nothing to plot; the rows hold no measured sparse layer beside a dense one")
    measured = sorted({series.m for series in found})
    tokens = measured[:1] + measured[-1:] if len(measured) > 1 else measured
    dtypes = [dtype for dtype in DENSE if any(series.dtype == dtype for series in found)]
    size = (5.6 * len(dtypes) + 0.6, 4.6 * len(tokens) + 1.2)
    figure, axes = pyplot.subplots(len(tokens), len(dtypes), figsize=size, sharex=True, sharey="row", squeeze=False)
    for line, m in zip(axes, tokens, strict=True):
        for axis, dtype in zip(line, dtypes, strict=True):
            of_panel = {s: points for s, points in found.items() if (s.m, s.dtype) == (m, dtype)}
            if of_panel:
                _panel(axis, of_panel, m)
            axis.set_title(f"{dtype}, M = {m}; {_SHOWN[dtype]}", fontsize=10)
            axis.set_xlabel("sparsity: zeros in the weight")
        line[0].set_ylabel("times as fast as dense")
    first = timed(rows)[0]
    title = f"sparse_linear on {first.device}, {n_threads(threads)}, commit {first.commit}"
    figure.suptitle(f"{title}\ngeometric mean of the layers; below the black line dense is faster", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axis: Axes, found: dict[Series, list[Point]], m: int) -> None:
    ours = "bitmap" if m <= _FEW and any(series.form == "bitmap" for series in found) else "index"
    drawn = {series.pattern for series in found if series.form == ours}
    for series, points in found.items():
        x, y = zip(*points, strict=True)
        colour = _COLOURS.get(series.pattern, "#17becf")
        if series.form == "auto" and len(points) > 1:
            label = "_" if series.pattern in drawn else f"{series.pattern}, auto"
            axis.plot(x, y, color=colour, label=label, **_AUTO)
        elif series.form in (ours, "csr", "bsr"):
            who = series.form if series.form == ours else f"torch {series.form.upper()}"
            style: dict[str, Any] = {"color": colour, "linewidth": 1.6} | _STYLES[series.form]
            axis.plot(x, y, label=f"{series.pattern}, {who}", **style)
    if any(series.form == "auto" and series.pattern in drawn and len(points) > 1 for series, points in found.items()):
        axis.plot([], [], color="#404040", label="auto, in the form's colour", **_AUTO)
    axis.axhline(1, color="black", linewidth=1.2, zorder=2)
    _ideal(axis, found)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelbottom=True, labelleft=True)
    axis.grid(True, alpha=0.3)
    axis.legend(loc="lower right", fontsize=8, framealpha=0.9)


def _ideal(axis: Axes, found: dict[Series, list[Point]]) -> None:
    """The sparsities at equal factors of the weights kept, and the line of a time proportional to them."""
    axis.set_xscale("function", functions=(_by_kept, lambda x: 1 - 2.0**-x))
    ticks = sorted({sparsity for points in found.values() for sparsity, _ in points})
    axis.set_xticks(ticks, [f"{sparsity:.0%}" for sparsity in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    ends = [ticks[0], ticks[-1]]
    axis.plot(
        ends, [1 / (1 - s) for s in ends], color="#b0b0b0", linewidth=1, zorder=0, label="1 / (1 - sparsity)"
    )


def _by_kept(sparsity: Any) -> Any:
    """Of an array: halvings of the weights kept; matplotlib asks for values outside what is drawn, too."""
    return -np.log2(np.clip(1 - sparsity, 1e-6, None))
