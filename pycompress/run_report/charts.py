"""The charts of a run: how it was trained, and what it gave up for what it gained. See `layer_charts.py` for layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from pycompress.run_report import words
from pycompress.run_report.drawing import (
    COLOURS,
    SERIES,
    few_ticks,
    figure_of,
    log_scale,
    place_labels,
    svg_of,
    thin_axes,
)


class Chart(NamedTuple):
    svg: str
    caption: str


# ---- training -------------------------------------------------------------------------------------------------


def training_charts(content: dict[str, Any]) -> list[Chart]:
    """Loss, its terms, learning rate and sparsity over the steps of all stages that trained, one after the other."""
    curves = content["curves"]
    if not curves:
        return []
    found = [_curve(curves, "loss", "Loss", "the loss that was minimised, mean of a few steps a point")]
    if any(len(curve["terms"]) > 1 for curve in curves):
        found.append(_terms(curves))
    found.append(_curve(curves, "lr", "Learning rate", "the optimizer's learning rate"))
    if any(value for curve in curves for value in curve["sparsity"] if value is not None):
        caption = "share of zeros in the layers that are pruned"
        found.append(_curve(curves, "sparsity", "Sparsity, %", caption, scale=100.0))
    return found


def _curve(curves: list[dict[str, Any]], key: str, title: str, caption: str, scale: float = 1.0) -> Chart:
    with figure_of() as figure:
        axes = figure.subplots()
        values = [v for curve in curves for v in curve[key] if v is not None]
        for curve, offset in zip(curves, _offsets(curves), strict=True):
            _line(axes, curve["step"], offset, curve[key], COLOURS["after"], scale)
        if key == "loss" and _wide(values):
            log_scale(axes, "y")
        else:
            axes.set_ylim(bottom=min(0, *values, 0))
            few_ticks(axes.yaxis)
        _finish_steps(axes, curves, title)
        stages = ", ".join(f"{curve['stage']} {curve['name']}" for curve in curves)
        ends = f", from {words.three(scale * values[0])} to {words.three(scale * values[-1])}" if values else ""
        return Chart(svg_of(figure, f"train-{key}", f"{title} over the steps of stages {stages}{ends}"), caption)


def _terms(curves: list[dict[str, Any]]) -> Chart:
    names = list(dict.fromkeys(name for curve in curves for name in curve["terms"]))
    shown = names[: len(SERIES)]
    with figure_of() as figure:
        axes = figure.subplots()
        for colour, name in zip(SERIES, shown, strict=False):
            label = name
            for curve, offset in zip(curves, _offsets(curves), strict=True):
                if name in curve["terms"]:
                    _line(axes, curve["step"], offset, curve["terms"][name], COLOURS[colour], label=label)
                    label = ""
        if _wide([v for c in curves for name in shown for v in c["terms"].get(name, ()) if v is not None]):
            log_scale(axes, "y")
        figure.legend(loc="outside lower center", ncols=3)
        _finish_steps(axes, curves, "Terms of the loss")
        left = f"; not shown: {', '.join(names[len(shown) :])}" if len(names) > len(shown) else ""
        return Chart(
            svg_of(figure, "train-terms", f"Terms of the loss over the steps: {', '.join(shown)}"),
            f"each term by itself, before its weight{left}",
        )


def _offsets(curves: list[dict[str, Any]]) -> list[int]:
    """The steps before each stage."""
    return [sum(c["steps"] for c in curves[:i]) for i in range(len(curves))]


def _line(
    axes: Any, steps: Sequence[int], offset: int, values: Sequence[float | None], colour: str, scale: float = 1.0,
    label: str = "",
) -> None:  # fmt: skip
    at = [step + offset for step in steps]
    heights = [math.nan if value is None else scale * value for value in values]
    marker = "o" if len(at) < 3 else ""  # a line through one point is none
    width = 1.6 if len(at) < 150 else 1.0
    axes.plot(at, heights, color=colour, linewidth=width, marker=marker, markersize=3, label=label or "_")


def _wide(values: list[float]) -> bool:
    """Whether only logarithms show them, a few outliers aside."""
    ordered = sorted(values)
    return bool(values) and ordered[0] > 0 and ordered[-1] > 30 * ordered[len(ordered) // 10]


def _finish_steps(axes: Any, curves: list[dict[str, Any]], title: str) -> None:
    thin_axes(axes, "y")
    axes.set_title(title, pad=18)  # the stages' names lie between
    axes.set_xlabel("step")
    total = sum(curve["steps"] for curve in curves)
    axes.set_xlim(0, max(total, 1))
    last = -math.inf
    for i, (curve, offset) in enumerate(zip(curves, _offsets(curves), strict=True)):
        if i:
            axes.axvline(offset, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (3, 3)))
        wide = curve["steps"] / max(total, 1)
        text = f"{curve['stage']} {curve['name']}" if wide > 0.017 * (3 + len(curve["name"])) else str(curve["stage"])
        if (offset / max(total, 1)) - last > 0.02:  # a stage of few steps has no room for its number
            axes.annotate(
                text, (offset, 1), (3, 1), xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize=7.5, color=COLOURS["muted"], va="bottom", annotation_clip=False,
            )  # fmt: skip
            last = offset / max(total, 1) + 0.022 * len(text)


# ---- trade-off ------------------------------------------------------------------------------------------------


def trade_off_charts(content: dict[str, Any]) -> list[Chart]:
    """Quality, size and latency of the model after each stage, two at a time."""
    records = content["stages"]
    if len(records) < 2:
        return []
    metric = next((name for record in records for name in record["metrics"]), None)
    batch = max((b for record in records for b in record["latency"]), key=int, default=None)
    sizes = [*(record["file_bytes"] / 1e6 for record in records[:-1]), content["disk_bytes"] / 1e6]
    qualities = [record["metrics"].get(metric) for record in records]
    times = [record["latency"].get(batch) for record in records]
    times = [None if t is None else 1e3 * t for t in times]
    size_label, time_label = "file, MB", f"latency at batch {batch}, ms"
    found = []
    if metric is not None:
        found.append(_trade_off("size", f"{metric} and size", records, sizes, qualities, size_label, metric))
    if metric is not None and batch is not None:
        found.append(_trade_off("time", f"{metric} and latency", records, times, qualities, time_label, metric))
    if batch is not None:
        found.append(_trade_off("both", "Latency and size", records, sizes, times, size_label, time_label))
    return [chart for chart in found if chart is not None]


def _trade_off(
    key: str, title: str, records: list[dict[str, Any]], x: Sequence[float | None], y: Sequence[float | None],
    x_label: str, y_label: str,
) -> Chart | None:  # fmt: skip
    known = [(a, b, str(r["index"])) for a, b, r in zip(x, y, records, strict=True) if a is not None and b is not None]
    if len(known) < 2:
        return None
    points = [(a, b) for a, b, _ in known]
    with figure_of() as figure:
        axes = figure.subplots()
        for (x0, y0), (x1, y1) in pairwise(points):
            arrow = {"arrowstyle": "-|>", "color": COLOURS["muted"], "linewidth": 0.9, "shrinkA": 5, "shrinkB": 5}
            if (x0, y0) != (x1, y1):
                axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
        colours = [COLOURS["before"], *[COLOURS["two"]] * (len(points) - 2), COLOURS["after"]]
        marks = axes.scatter([a for a, _ in points], [b for _, b in points], s=46, c=colours, zorder=3, linewidths=0)
        marks.set_gid("stages")
        thin_axes(axes)
        axes.margins(0.14)
        axes.set_xlim(left=0)
        few_ticks(axes.xaxis)
        few_ticks(axes.yaxis)
        axes.set_title(_cut(title, 46))
        axes.set_xlabel(_cut(x_label, 52))
        axes.set_ylabel(_cut(y_label, 30))
        moves = list(pairwise(points))
        place_labels(axes, points, [text for _, _, text in known], lines=moves, fontsize=9, fontweight="bold")
        names = {str(r["index"]): r["name"] for r in records}
        tips = [f"{i} {names[i]}: {x_label} {words.three(a)}, {y_label} {words.metric(b)}" for a, b, i in known]
        label = f"{title} after each stage: {'; '.join(tips)}"
        return Chart(svg_of(figure, f"trade-{key}", label, {"stages": tips}), "")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
