"""The distillation demo's result as JSON, as tables in the terminal and as a chart."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .distill_digits import ALPHA, ARMS, CLASSES, PER_CLASS, TEMPERATURE, Arm, DigitsResult, gains, mean_std
from .distill_steps import StepTime
from .vocabulary import VocabularyResult, VocabularyRow

_GREY, _AMBER, _BLUE = "#8a8f98", "#e0a030", "#2563eb"


@dataclass
class DistillResult:
    machine: dict[str, Any]
    digits: DigitsResult
    steps: list[StepTime]
    vocabulary: VocabularyResult


def write_json(result: DistillResult, path: Path) -> None:
    digits = result.digits
    document = {
        "machine": result.machine,
        "digits": {
            **asdict(digits),
            "temperature": TEMPERATURE,
            "alpha": ALPHA,
            "labelled_images_of_few": PER_CLASS * CLASSES,
            "gains": dict(gains(digits)),
        },
        "steps": [asdict(step) | {"speedup": step.speedup} for step in result.steps],
        "vocabulary": asdict(result.vocabulary),
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def show(result: DistillResult, console: Console) -> None:
    """Prints both tables, each with how to read it, and what distillation did to the accuracy, whatever it was."""

    def say(line: str, style: str | None = "dim") -> None:
        console.print(line, style=style, highlight=False, markup=False)

    digits, words = result.digits, result.vocabulary
    console.print(_accuracy_table(digits))
    say(
        f"mean ± standard deviation over {digits.seeds} seeds, each with its own split and {digits.test_images} test "
        f"images; {digits.steps} steps; DistillationLoss(temperature={TEMPERATURE:g}, alpha={ALPHA:g}), alpha=0 "
        "without labels"
    )
    for pair, values in gains(digits):
        mean, std = mean_std(values)
        better = sum(v > 0 for v in values)
        say(f"{pair}: {mean:+.1f} ± {std:.1f} points, better in {better} of {len(values)} seeds", None)
    console.print()
    console.print(_cost_table(result))
    say("medians of interleaved calls; × is torch's time over pycompress's; torch is cross_entropy and kl_div")
    say("last two rows: hidden states in, with all-MiniLM-L6-v2's embedding matrix as the head")
    for note in words.notes:
        say(f"note: {note}")


def images_of(arm: Arm, digits: DigitsResult) -> int:
    return PER_CLASS * CLASSES if arm.few else digits.train_images


def _accuracy_table(digits: DigitsResult) -> Table:
    title = f"scikit-learn's digits · the student has {digits.student_parameters:,} parameters"
    grid = Table(title=title, title_style="bold")
    grid.add_column("")
    for heading in ("images", "labels", "test accuracy"):
        grid.add_column(heading, justify="right")

    def row(name: str, images: int, labels: int, values: list[float], style: str | None, last: bool) -> None:
        mean, std = mean_std(values)
        grid.add_row(
            name, f"{images:,}", f"{labels:,}", f"{mean:.1f} ± {std:.1f} %", style=style, end_section=last
        )  # fmt: skip

    parameters = f"{digits.teacher_parameters:,} parameters"
    row(f"teacher: convolutional, {parameters}", digits.train_images, digits.train_images, digits.teacher, None, True)
    for i, arm in enumerate(ARMS):
        images = images_of(arm, digits)
        last = i + 1 < len(ARMS) and ARMS[i + 1].few != arm.few
        style = "bold" if arm.teacher else None
        row(f"student: {arm.name}", images, images if arm.labels else 0, digits.students[arm.name], style, last)
    return grid


def _cost_table(result: DistillResult) -> Table:
    threads = result.machine["threads"]["torch"]
    title = f"Forward and backward, fp32 · {result.machine['cpu']['name']}, {threads} thread{'s' * (threads > 1)}"
    grid = Table(title=title, title_style="bold")
    grid.add_column("")
    for heading in ("torch", "pycompress", ""):
        grid.add_column(heading, justify="right", style="bold" if heading == "pycompress" else None)
    for step in result.steps:
        cells = (_milliseconds(step.torch_ms), _milliseconds(step.pycompress_ms), f"{step.speedup:.2f}×")
        grid.add_row(step.name, *cells, end_section=step is result.steps[-1])
    words = result.vocabulary
    first, ours = ends(words)
    label = f"{words.tokens:,} tokens × {words.hidden} → {words.vocabulary:,} words"
    ratio = f"{first.milliseconds / ours.milliseconds:.2f}×"
    grid.add_row(label, _milliseconds(first.milliseconds), _milliseconds(ours.milliseconds), ratio)
    share = f"{ours.peak_bytes / first.peak_bytes:.1%}" if ours.peak_bytes is not None and first.peak_bytes else ""
    grid.add_row("  peak extra memory", _megabytes(first.peak_bytes), _megabytes(ours.peak_bytes), share)
    return grid


def ends(words: VocabularyResult) -> tuple[VocabularyRow, VocabularyRow]:
    """torch's row and pycompress's."""
    return words.rows[0], words.rows[-1]


def _milliseconds(value: float) -> str:
    return f"{value:.3f} ms" if value < 1 else f"{value:.1f} ms"


def _megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:.1f} MB"


def chart(result: DistillResult, path: Path) -> None:
    """Writes a PNG of three panels: accuracy by seed, times of the loss, the vocabulary head's memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, time, memory = figure.subplots(1, 3, width_ratios=[1.5, 1.25, 0.7])
    threads = result.machine["threads"]["torch"]
    where = f"{result.machine['cpu']['name']}, {threads} thread{'s' * (threads > 1)}"
    figure.suptitle(f"Distillation: what it does to a small student, and what its loss costs · {where}", fontsize=13)
    _accuracy_panel(accuracy, result.digits)
    _time_panel(time, result)
    _memory_panel(memory, result.vocabulary)
    figure.savefig(path, dpi=120)


def _accuracy_panel(axes: Any, digits: DigitsResult) -> None:
    rows = [("teacher", digits.train_images, digits.train_images, digits.teacher, _GREY)]
    for arm in ARMS:
        images = images_of(arm, digits)
        colour = _BLUE if arm.teacher else _AMBER
        rows.append((arm.name, images, images if arm.labels else 0, digits.students[arm.name], colour))
    for i, (_, _, _, values, colour) in enumerate(rows):
        spread = [i + 0.26 * (k / max(len(values) - 1, 1) - 0.5) for k in range(len(values))]
        mean, std = mean_std(values)
        axes.errorbar(mean, i, xerr=std, fmt="|", markersize=22, markeredgewidth=2.5, color=colour, capsize=4)
        axes.plot(values, spread, "o", color=colour, alpha=0.55, markersize=5)
        axes.annotate(f"{mean:.1f}", (mean, i), (0, 15), textcoords="offset points", ha="center", fontsize=9)
    labels = [f"{name}\n{images:,} images, {labels:,} labels" for name, images, labels, *_ in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, % (dots: seeds; bar: mean ± standard deviation)")
    axes.set_title(f"Digits: a student of {digits.student_parameters:,} parameters", fontsize=11)
    for colour, label in ((_AMBER, "labels alone"), (_BLUE, "with the teacher")):
        axes.plot([], [], "o", color=colour, label=label)
    axes.legend(loc="lower left", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _time_panel(axes: Any, result: DistillResult) -> None:
    words = result.vocabulary
    first, ours = ends(words)
    rows = [(_short_name(step), step.torch_ms, step.pycompress_ms) for step in result.steps]
    rows.append((f"head and loss,\n{words.tokens:,} × {words.vocabulary:,}", first.milliseconds, ours.milliseconds))
    speedups = [theirs / ours for _, theirs, ours in rows]
    bars = axes.barh(range(len(rows)), speedups, 0.55, color=_BLUE)
    labels = [
        f"{ratio:.1f}×\n{_milliseconds(theirs)} → {_milliseconds(ours)}"
        for ratio, (_, theirs, ours) in zip(speedups, rows, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.45 * max(*speedups, 1))  # room for the labels
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torch")
    axes.set_title("A step, forward and backward (torch → pycompress)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _short_name(step: StepTime) -> str:
    size = f"{step.tokens} × {step.classes:,}"
    return f"training step,\n{size}" if step.whole else f"loss,\n{size}"


def _memory_panel(axes: Any, words: VocabularyResult) -> None:
    peaks = {row.name: row.peak_bytes for row in ends(words) if row.peak_bytes is not None}
    bars = axes.bar(list(peaks), [peak / 1e6 for peak in peaks.values()], 0.6, color=[_GREY, _BLUE][: len(peaks)])
    axes.bar_label(bars, [_megabytes(peak) for peak in peaks.values()], padding=2, fontsize=9)
    if words.floor_bytes is not None:
        label = f"the gradients alone: {_megabytes(words.floor_bytes)}"
        axes.axhline(words.floor_bytes / 1e6, color="black", linewidth=1, linestyle=":", label=label)
        axes.legend(loc="upper right", fontsize=8)
    axes.set_ylabel("peak extra memory, MB")
    axes.set_title(f"The head over {words.vocabulary:,} words", fontsize=11)
    axes.margins(y=0.2)
    axes.spines[["top", "right"]].set_visible(False)
