"""The charts of the layers: error, sparsity and time of each, and the roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from pycompress.report import starred
from pycompress.run_report import words
from pycompress.run_report.charts import Chart
from pycompress.run_report.drawing import COLOURS, WIDTH, few_ticks, figure_of, log_scale, shorten, svg_of, thin_axes

MOST_BARS = 48  # layers by themselves; of more, those whose names differ by a number share a row
_ROW = 0.19  # inches
Layer = dict[str, Any]
Group = tuple[str, list[Layer]]


def layer_charts(content: dict[str, Any]) -> list[Chart]:
    """Three charts with the layers in rows, in the model's order, and one row for many alike where there are many."""
    layers = content["layers"]
    if not layers:
        return []
    groups, note = _grouped(layers)
    names = _names([name for name, _ in groups])
    unit, scale = _unit_of(layers)
    error = "relative L2 distance of the layer's output from the baseline's, on the sample; training moves it too"
    time = "median of a forward on the sample: grey before, blue after"
    found = [
        _rows("error", "Error", names, groups, {"after": lambda layer: layer["error"]}, error + note, words.error),
        _rows("sparsity", "Sparsity, %", names, groups, {"after": _share}, f"share of zeros in the weight{note}", _pct),
        _rows(
            "time", f"Time, {unit}", names, groups, {"before": _time("before", scale), "after": _time("after", scale)},
            time + note, lambda value: words.duration(None if value is None else value * scale),
        ),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def _grouped(layers: list[Layer]) -> tuple[list[Group], str]:
    if len(layers) <= MOST_BARS:
        return [(layer["name"], [layer]) for layer in layers], ""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(starred(layer["name"]), []).append(layer)
    found = list(groups.items())
    note = "; a row for layers alike: a dot each, and the median"
    if len(found) > MOST_BARS:
        worst = sorted(found, key=lambda g: -max((layer["error"] or 0.0 for layer in g[1]), default=0.0))[:MOST_BARS]
        names = {name for name, _ in worst}
        found = [group for group in found if group[0] in names]
        note += f"; of {len(groups)} rows the {MOST_BARS} with the largest error"
    return found, note


def _names(names: list[str]) -> list[str]:
    """Without what all begin with, cut to what fits beside the bars."""
    parts = [name.split(".")[:-1] for name in names]
    common = 0
    while all(len(p) > common and p[common] == parts[0][common] for p in parts):
        common += 1
    return [shorten(".".join(name.split(".")[common:]) or "(the model)") for name in names]


def _share(layer: Layer) -> float | None:
    side = layer["after"] or layer["before"]
    return None if side is None or side["sparsity"] is None else 100 * side["sparsity"]


def _time(key: str, scale: float) -> Callable[[Layer], float | None]:
    def of(layer: Layer) -> float | None:
        side = layer[key]
        return None if side is None or side["seconds"] is None else side["seconds"] / scale

    return of


def _unit_of(layers: list[Layer]) -> tuple[str, float]:
    """In which the slowest layer takes less than 10 000."""
    sides = (layer[key] for layer in layers for key in ("before", "after"))
    slowest = max((side["seconds"] for side in sides if side and side["seconds"]), default=0.0)
    return next(((unit, scale) for unit, scale in (("µs", 1e-6), ("ms", 1e-3)) if slowest < 1e4 * scale), ("s", 1.0))


def _pct(value: float | None) -> str:
    return words.MISSING if value is None else words.percent(value / 100)


def _rows(
    key: str,
    title: str,
    names: Sequence[str],
    groups: Sequence[Group],
    series: dict[str, Callable[[Layer], float | None]],
    caption: str,
    text: Callable[[float | None], str],
) -> Chart | None:
    found = {colour: [[value(layer) for layer in layers] for _, layers in groups] for colour, value in series.items()}
    if all(v is None for rows in found.values() for row in rows for v in row):
        return None
    at = list(range(len(groups)))
    thick = 0.72 / len(series)
    tips: dict[str, list[str]] = {}
    with figure_of(height=0.75 + _ROW * max(len(groups), 4)) as figure:
        axes = figure.subplots()
        for i, (colour, rows) in enumerate(found.items()):
            shift = (i - (len(series) - 1) / 2) * thick
            known = [[v for v in row if v is not None] for row in rows]
            heights = [statistics.median(row) if row else 0.0 for row in known]
            axes.barh([y + shift for y in at], heights, thick * 0.9, color=COLOURS[colour], linewidth=0)
            if any(len(row) > 1 for row in known):
                points = [(v, y + shift) for y, row in zip(at, known, strict=True) if len(row) > 1 for v in row]
                across, down = [a for a, _ in points], [b for _, b in points]
                dots = axes.scatter(across, down, s=7, color=COLOURS["ink"], alpha=0.45, linewidths=0)
                dots.set_gid(f"dots-{colour}")
                tips[f"dots-{colour}"] = [
                    f"{layer['name']}: {text(v)}"
                    for (_, layers), row in zip(groups, rows, strict=True) if sum(v is not None for v in row) > 1
                    for layer, v in zip(layers, row, strict=True) if v is not None
                ]  # fmt: skip
        _mark_unknown(axes, found)
        axes.set_yticks(at, names, fontsize=7.5)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        thin_axes(axes, "x")
        axes.set_xlim(left=0)
        few_ticks(axes.xaxis)
        if key == "sparsity":
            axes.set_xlim(0, 100)
        axes.set_title(title)
        label = f"{title} of {len(groups)} {'layers' if len(groups[0][1]) == 1 else 'groups of layers'}; see the table"
        return Chart(svg_of(figure, f"layer-{key}", label, tips), caption)


def _mark_unknown(axes: Any, found: dict[str, list[list[float | None]]]) -> None:
    """A dash where there is no value, which is not the same as 0."""
    for y, rows in enumerate(zip(*found.values(), strict=True)):
        if all(v is None for row in rows for v in row):
            axes.annotate(
                words.MISSING, (0, y), (3, 0), textcoords="offset points", va="center", color=COLOURS["muted"],
                fontsize=7.5,
            )  # fmt: skip


# ---- roofline -------------------------------------------------------------------------------------------------

_PEAKS = {"int8_gops": "int8", "bf16_gflops": "bf16", "fp32_gflops": "fp32"}


def roofline_chart(content: dict[str, Any]) -> Chart | None:
    """Speed over arithmetic intensity of every layer before and after, below what the machine can do at most."""
    peaks = content["peaks"]
    if peaks is None:
        return None
    sides = {key: _points(content["layers"], key) for key in ("before", "after")}
    if not any(sides.values()):
        return None
    tips = {}
    with figure_of(height=4.2, width=WIDTH * 1.3) as figure:
        axes = figure.subplots()
        log_scale(axes, "x")
        log_scale(axes, "y")
        for (key, points), marker in zip(sides.items(), "os", strict=True):
            if points:
                x, y, tips[f"roof-{key}"] = zip(*points, strict=True)
                marks = axes.scatter(
                    x, y, s=22, marker=marker, color=COLOURS[key], alpha=0.8, linewidths=0, label=key, zorder=3
                )
                marks.set_gid(f"roof-{key}")
        _roofs(axes, peaks)
        thin_axes(axes)
        axes.set_title("Roofline of the layers")
        axes.set_xlabel("arithmetic intensity: operations per byte of weight, input and output")
        axes.set_ylabel("GOP/s")
        figure.legend(loc="outside lower center", ncols=3)
        label = f"Roofline: {sum(map(len, sides.values()))} layers, before and after, and the machine's peaks"
        caption = "operations that are really done: a pruned weight of a sparse layer costs none"
        return Chart(svg_of(figure, "roofline", label, tips), caption)


def _points(layers: list[Layer], key: str) -> list[tuple[float, float, str]]:
    """Operations per byte, 1e9 operations a second, and what it is."""
    found = []
    for layer in layers:
        side = layer[key]
        if side is None or not all(side[name] for name in ("intensity", "seconds", "flops")):
            continue
        speed = side["flops"] / side["seconds"] / 1e9
        tip = f"{layer['name']} {key}: {side['precision']}, {words.three(speed)} GOP/s"
        found.append((side["intensity"], speed, f"{tip}, {words.three(side['intensity'])} operations per byte"))
    return found


def _roofs(axes: Any, peaks: dict[str, Any]) -> None:
    """A line for each peak, and the slope below which memory is the limit."""
    known = {label: peaks[kind] for kind, label in _PEAKS.items() if _is_positive(peaks.get(kind))}
    memory = peaks.get("read_gbps") if _is_positive(peaks.get("read_gbps")) else None
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    top = max([1.1 * high, *(1.8 * rate for rate in known.values())])
    if memory and known:  # all the corners of the roof are to be seen
        left, right = min(left, 0.5 * min(known.values()) / memory), max(right, 4 * max(known.values()) / memory)
    axes.set_xlim(left, right)
    axes.set_ylim(0.8 * low, top)
    line = {"color": COLOURS["muted"], "linewidth": 1.1, "zorder": 2}
    above = math.inf
    for label, rate in sorted(known.items(), key=lambda item: -item[1]):
        axes.plot((max(left, rate / memory if memory else left), right), (rate, rate), **line)
        close = math.log(above / rate) < 0.07 * math.log(top / (0.8 * low))
        axes.annotate(
            f"{label} {rate:.0f} GOP/s", (right, rate), (0, -3 if close else 3), textcoords="offset points", ha="right",
            va="top" if close else "bottom", fontsize=8, color=COLOURS["muted"],
        )  # fmt: skip
        above = rate
    if memory:
        end = min(right, max([*known.values(), top]) / memory)
        axes.plot((left, end), (left * memory, end * memory), "--", label=f"memory, {memory:.0f} GB/s", **line)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
