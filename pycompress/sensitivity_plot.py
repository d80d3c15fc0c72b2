"""The picture of a SensitivityReport: a bar a layer and mode, the most sensitive layer on top."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pycompress.sensitivity_report import SensitivityReport

_COLOURS = {"dynamic": "#2563eb", "static": "#7c3aed", "weight_only": "#e0a030", "int4": "#0d9488", "nf4": "#db2777"}


def plot(report: SensitivityReport, path: str | os.PathLike[str], most: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    layers = report.by_error[:most]
    errors = [layer.error(mode) for layer in layers for mode in report.modes]
    positive = [error for error in errors if 0 < error < math.inf] or [1e-12]
    low, high = min(positive) / 3, max(positive) * 2

    figure = Figure(figsize=(10, 1.6 + len(layers) * (0.12 + 0.14 * len(report.modes))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.84 / len(report.modes)
    for i, mode in enumerate(report.modes):
        at = [k + (i - (len(report.modes) - 1) / 2) * height for k in range(len(layers))]
        # A layer without any error, as one that the output does not depend on, has no place on a log axis: no bar.
        lengths = [min(max(layer.error(mode), low), high) - low for layer in layers]
        axes.barh(at, lengths, 0.94 * height, left=low, color=_COLOURS[mode], label=mode)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel("1 - mean cosine of the model's output, that layer alone in int8 (log scale)")
    rest = f", {len(layers)} of {len(report.layers)} layers" if len(layers) < len(report.layers) else ""
    axes.set_title(f"Sensitivity to int8{rest}", fontsize=12, loc="left")
    axes.legend(loc="lower right", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
