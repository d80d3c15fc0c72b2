"""The pruning demo's chart: accuracy and latency against sparsity, trained on and not, and the deployed classifiers."""

from pathlib import Path
from typing import Any

from .distill_digits import mean_std
from .prune_digits import CHOSEN, PruneDigitsResult
from .prune_encoder import DENSE, PATTERNS, WEIGHTS, EncoderResult

_COLOURS = {DENSE: "#8a8f98", PATTERNS[0]: "#e0a030", PATTERNS[1]: "#2563eb"}
_LINES = {"fp32": "--", "int8": "-"}
_MARKERS = {"fp32": "o", "int8": "s"}


def chart_of(encoder: EncoderResult, digits: PruneDigitsResult, where: str, path: Path) -> None:
    """Writes a PNG of four panels: the digits' accuracy and the encoder's latency and cosine against sparsity, and
    the deployed classifiers' latency."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    (accuracy, final), (time, cosine) = figure.subplots(2, 2)
    figure.suptitle(f"Pruning: what it does to the quality, and what it saves · {where}", fontsize=13)
    _accuracy_panel(accuracy, digits)
    _final_panel(final, digits)
    _time_panel(time, encoder)
    _cosine_panel(cosine, encoder)
    figure.savefig(path, dpi=120)


def _accuracy_panel(axes: Any, digits: PruneDigitsResult) -> None:
    mean, _ = mean_std(digits.dense)
    axes.axhline(mean, color=_COLOURS[DENSE], linewidth=1.5, label=f"dense: {mean:.1f} %")
    for i, (pattern, by_sparsity) in enumerate(digits.one_shot.items()):
        colour = _COLOURS[pattern]
        points = {100 * sparsity: mean_std(values) for sparsity, values in by_sparsity.items()}
        means, spreads = [p[0] for p in points.values()], [p[1] for p in points.values()]
        axes.errorbar(
            list(points), means, yerr=spreads, fmt="o--", color=colour, capsize=3, markersize=4,
            label=f"{pattern}, at once, not retrained",
        )  # fmt: skip
        mean, spread = mean_std(digits.gradual[pattern][CHOSEN])
        at = 100 * digits.reached[pattern] + 0.7 * (i - 0.5)  # side by side
        label = f"{pattern}, gradually, with the teacher: {mean:.1f} %"
        axes.errorbar(at, mean, yerr=spread, fmt="D", color=colour, capsize=3, markersize=8, label=label)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Digits: accuracy (mean ± standard deviation of {digits.seeds} seeds)", fontsize=11)
    axes.set_ylim(0, 104)
    _finish(axes, "lower left")


def _final_panel(axes: Any, digits: PruneDigitsResult) -> None:
    finals = list(digits.final.values())
    batches = list(finals[0].latency)
    height = 0.8 / len(batches)
    shades = ("#93b4f5", "#2563eb")
    for i, batch in enumerate(batches):
        at = [k + (i - (len(batches) - 1) / 2) * height for k in range(len(finals))]
        values = [final.latency[batch].speedup for final in finals]
        plural = "s" * (batch > 1)
        bars = axes.barh(at, values, height * 0.92, color=shades[i % 2], label=f"{batch} image{plural}")
        labels = [_ms(final.latency[batch].milliseconds) for final in finals]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    names = [
        f"{final.name}\n{final.disk_bytes / 1e6:.2f} MB, {mean_std(final.accuracy)[0]:.1f} % right" for final in finals
    ]
    axes.set_yticks(range(len(finals)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.2 * max(t.speedup for final in finals for t in final.latency.values()))
    axes.set_xlabel("times as fast as dense fp32 (labels: median latency)")
    axes.set_title("Digits: the classifiers as deployed", fontsize=11)
    axes.legend(loc="upper right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _ms(milliseconds: float) -> str:
    return f"{1e3 * milliseconds:.0f} µs" if milliseconds < 1 else f"{milliseconds:.1f} ms"


def _time_panel(axes: Any, encoder: EncoderResult) -> None:
    shape = "8x128" if "8x128" in encoder.shapes else encoder.shapes[-1]
    for weights in WEIGHTS:
        dense = encoder.dense(weights).latency[shape].milliseconds
        label = f"{DENSE} {weights}: {dense:.1f} ms"
        axes.axhline(dense, color=_COLOURS[DENSE], linewidth=1.5, linestyle=_LINES[weights], label=label)
        for pattern in PATTERNS:
            found = encoder.of(weights, pattern)
            times = [v.latency[shape].milliseconds for v in found]
            axes.plot(
                [100 * v.sparsity for v in found], times, _LINES[weights], marker=_MARKERS[weights],
                color=_COLOURS[pattern], label=f"{pattern} {weights}",
            )  # fmt: skip
    axes.set_ylim(0, 1.35 * max(v.latency[shape].milliseconds for v in encoder.variants))  # room for the legend
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("median latency, ms")
    axes.set_title(f"MiniLM: latency at {shape.replace('x', ' × ')}", fontsize=11)
    _finish(axes, "upper center", columns=2)


def _cosine_panel(axes: Any, encoder: EncoderResult) -> None:
    for weights in WEIGHTS:
        for pattern in PATTERNS:
            found = encoder.of(weights, pattern)
            at = [100 * v.sparsity for v in found]
            line = {"color": _COLOURS[pattern], "linestyle": _LINES[weights]}
            axes.plot(
                at, [v.accuracy.mean for v in found], marker=_MARKERS[weights], label=f"{pattern} {weights}, mean",
                **line,
            )  # fmt: skip
            if weights == "int8":
                worst = [v.accuracy.worst for v in found]
                axes.plot(at, worst, marker="v", linewidth=0.8, alpha=0.6, label=f"{pattern} {weights}, worst", **line)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("cosine with the dense fp32 embedding")
    axes.set_title("MiniLM, NOT retrained: what is left of the embeddings", fontsize=11)
    _finish(axes, "best")


def _finish(axes: Any, legend: str, columns: int = 1) -> None:
    axes.grid(alpha=0.3)
    axes.legend(loc=legend, fontsize=9, ncols=columns)
    axes.spines[["top", "right"]].set_visible(False)
