"""The pruning demo's result as JSON and as tables in the terminal; its chart is in prune_chart.py."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import measure
from .distill_digits import mean_std
from .prune_chart import chart_of
from .prune_digits import ALPHA, ARMS, CHOSEN, PRUNING_SHARE, SPARSITY, TEMPERATURE, FinalModel, PruneDigitsResult
from .prune_encoder import DENSE, EncoderResult, EncoderVariant

GOOD, FAIR = 0.99, 0.95  # mean cosine with the dense fp32 model's embeddings


@dataclass
class PruneDemoResult:
    machine: dict[str, Any]
    encoder: EncoderResult
    digits: PruneDigitsResult


def quality(variant: EncoderVariant) -> str:
    """In a word, by the mean cosine."""
    mean = variant.accuracy.mean
    return "good" if mean >= GOOD else "fair" if mean >= FAIR else "poor"


def write_json(result: PruneDemoResult, path: Path) -> None:
    encoder, digits = result.encoder, result.digits
    variants = {
        v.name: {
            "weights": v.weights,
            "pattern": v.pattern,
            "sparsity": v.sparsity,
            "disk_bytes": v.disk_bytes,
            "linear_bytes": v.linear_bytes,
            "sparse_layers": v.sparse_layers,
            "cosine_mean": v.accuracy.mean,
            "cosine_worst": v.accuracy.worst,
            "neighbour_agreement": v.accuracy.neighbour_agreement,
            "quality_without_retraining": quality(v),
            "latency_ms": {shape: t.milliseconds for shape, t in v.latency.items()},
            "speedup_over_dense": {shape: t.speedup for shape, t in v.latency.items()},
            "rounds": {shape: t.rounds for shape, t in v.latency.items()},
        }
        for v in encoder.variants
    }
    document = {
        "machine": result.machine,
        "encoder": {
            "model": "all-MiniLM-L6-v2",
            "sentences": encoder.sentences,
            "layers": encoder.layers,
            "padding": encoder.padding,
            "variants": variants,
        },
        "digits": asdict(digits) | {"sparsity": SPARSITY, "temperature": TEMPERATURE, "alpha": ALPHA},
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def show(result: PruneDemoResult, console: Console) -> None:
    """Prints the tables, each with how to read it, and what pruning did to the quality, whatever it was."""

    def say(line: str, style: str | None = "dim") -> None:
        console.print(line, style=style, highlight=False, markup=False)

    encoder, digits = result.encoder, result.digits
    console.print(_quality_table(encoder))
    say(
        f"pruned by magnitude, as it is; MB: the file, {_rest(encoder):.0f} of them embeddings; layers: bytes of the "
        f"{encoder.layers} linear ones in it, against dense fp32; mean and worst cosine with the dense fp32 embeddings "
        f"of {encoder.sentences} sentences of the Python manual, and how many of them keep their nearest sentence"
    )
    say(verdict(encoder), "bold")
    console.print()
    console.print(_latency_table(result))
    rounds = sorted({t.rounds for v in encoder.variants for t in v.latency.values()})
    counts = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    say(
        f"batch × tokens, median of {counts} interleaved rounds; × is over the dense model of the same weights, and of "
        "dense int8 over dense fp32"
    )
    for line in left_dense(encoder):
        say(line)
    console.print()
    console.print(_accuracy_table(digits))
    say(
        f"mean ± standard deviation over {digits.seeds} seeds; {digits.train_images} training images; the same "
        f"{digits.test_images} test images for all, and nothing was chosen by them"
    )
    say(
        f"gradual: {digits.steps} steps, the sparsity rising over the first {PRUNING_SHARE:.0%}; teacher: the dense "
        f"classifier, DistillationLoss(temperature={TEMPERATURE:g}, alpha={ALPHA:g})"
    )
    for line in digits_verdict(digits):
        say(line, "bold")
    console.print()
    console.print(_final_table(digits))
    say(f"pruned: gradual, {CHOSEN}; MB: the file; latency by images in a batch, interleaved; × is over dense fp32")


def verdict(encoder: EncoderResult) -> str:
    """What the table means for someone who would use these models."""
    pruned = [v for v in encoder.variants if not v.is_dense]
    poor = [v for v in pruned if quality(v) == "poor"]
    if not poor:
        return f"Without retraining no pruned model moved its embeddings far: every mean cosine is {FAIR} or more."
    worst = min(poor, key=lambda v: v.accuracy.mean)
    least: dict[str, float] = {}
    for v in poor:
        least[v.pattern] = min(v.sparsity, least.get(v.pattern, 1.0))
    where = " and ".join(f"from {sparsity:.0%} on with {pattern} zeros" for pattern, sparsity in least.items())
    return (
        f"Without retraining the quality is POOR (mean cosine under {FAIR}) {where}; at worst, {worst.name}: mean "
        f"cosine {worst.accuracy.mean:.2f}, {worst.accuracy.neighbour_agreement:.0%} of the sentences keep their "
        "nearest one. Sizes and times hold for retrained models too; these embeddings are not for use. Prune while "
        "training, as below."
    )


def left_dense(encoder: EncoderResult) -> list[str]:
    """A line that names the variants of which some layers stayed dense, where there are any."""
    left = [(encoder.layers - v.sparse_layers, v.name) for v in encoder.variants if not v.is_dense]
    named = ", ".join(f"{count} of {name}" for count, name in left if count)
    return [f"of {encoder.layers} layers left dense, as sparse was not faster when converted: {named}"] if named else []


def digits_verdict(digits: PruneDigitsResult) -> list[str]:
    """A line a pattern: what pruning at once cost, and what gradual pruning gave back, seed by seed."""
    lines = []
    for pattern, arms in digits.gradual.items():
        at_once = _differences(digits.one_shot[pattern][SPARSITY], digits.dense)
        gradual = _differences(arms[CHOSEN], digits.dense)
        taught = _differences(arms[CHOSEN], arms[ARMS[0]])
        lines.append(
            f"{SPARSITY:.0%} {pattern}: at once {at_once} points, gradually {gradual} points against dense; "
            f"of that the teacher {taught}"
        )
    return lines


def _differences(values: list[float], base: list[float]) -> str:
    mean, std = mean_std([a - b for a, b in zip(values, base, strict=True)])
    return f"{mean:+.1f} ± {std:.1f}"


def _grid(title: str) -> Table:
    """A table with a first column of names; those of variants leave room for four more figures in 80 characters."""
    grid = Table(title=title, title_style="bold")
    grid.add_column("", no_wrap=True)
    return grid


def _quality_table(encoder: EncoderResult) -> Table:
    grid = _grid("all-MiniLM-L6-v2, pruned without retraining")
    for heading in ("MB", "layers", "cosine", "worst", "nearest", "quality"):
        grid.add_column(heading, justify="right")
    whole = encoder.dense("fp32")
    for v in encoder.variants:
        grid.add_row(
            v.name,
            f"{v.disk_bytes / 1e6:.1f}",
            f"{v.linear_bytes / whole.linear_bytes:.0%}",
            f"{v.accuracy.mean:.3f}",
            f"{v.accuracy.worst:.3f}",
            f"{v.accuracy.neighbour_agreement:.0%}",
            quality(v),
            style="red" if quality(v) == "poor" else None,
            end_section=_ends_section(encoder, v),
        )
    return grid


def _rest(encoder: EncoderResult) -> float:
    """Megabytes of the file that pruning does not change."""
    whole = encoder.dense("fp32")
    return (whole.disk_bytes - whole.linear_bytes) / 1e6


def _ends_section(encoder: EncoderResult, variant: EncoderVariant) -> bool:
    last = [v for v in encoder.variants if v.sparsity == variant.sparsity][-1]
    return variant is last


def _latency_table(result: PruneDemoResult) -> Table:
    encoder = result.encoder
    threads = result.machine["threads"]["torch"]
    title = f"latency in ms · {result.machine['cpu']['name']}, {threads} thread{'s' * (threads > 1)}"
    grid = _grid(title)
    for shape in encoder.shapes:
        grid.add_column(shape.replace("x", " × "), justify="right")
    for v in encoder.variants:
        base = v.is_dense and v.weights == "fp32"
        cells = [_timed(v.latency[shape], base) for shape in encoder.shapes]
        grid.add_row(v.name, *cells, end_section=_ends_section(encoder, v))
    return grid


def _timed(latency: measure.Latency, base: bool) -> str:
    value = latency.milliseconds
    text = f"{value:.{3 if value < 1 else 1 if value < 100 else 0}f}"
    return text + (" " * 6 if base else f" {latency.speedup:4.2f}×")


def _accuracy_table(digits: PruneDigitsResult) -> Table:
    title = f"scikit-learn's digits · a classifier of {digits.parameters:,} parameters"
    grid = _grid(title)
    grid.add_column("zeros", justify="right")
    grid.add_column("test accuracy", justify="right")
    grid.add_row(DENSE, "0 %", accuracy_text(digits.dense), end_section=True)
    for pattern, arms in digits.gradual.items():
        for sparsity, values in digits.one_shot[pattern].items():
            share = f"{sparsity:.0%}".replace("%", " %")
            grid.add_row(f"{pattern}, at once", share, accuracy_text(values))
        for arm, values in arms.items():
            share = f"{100 * digits.reached[pattern]:.1f} %"
            style = "bold" if arm == CHOSEN else None
            last = arm == list(arms)[-1]
            grid.add_row(f"{pattern}, gradual: {arm}", share, accuracy_text(values), style=style, end_section=last)
    return grid


def accuracy_text(values: list[float]) -> str:
    mean, std = mean_std(values)
    return f"{mean:.1f} ± {std:.1f} %"


def _final_table(digits: PruneDigitsResult) -> Table:
    grid = _grid("the classifier as deployed")
    finals = list(digits.final.values())
    for heading in ("MB", "accuracy, %", *(f"ms at {batch}" for batch in finals[0].latency)):
        grid.add_column(heading, justify="right")
    for final in finals:
        grid.add_row(*_final_cells(final, finals[0]))
    return grid


def _final_cells(final: FinalModel, base: FinalModel) -> list[str]:
    times = [_timed(latency, final is base) for latency in final.latency.values()]
    return [final.name, f"{final.disk_bytes / 1e6:.2f}", accuracy_text(final.accuracy).removesuffix(" %"), *times]


def chart(result: PruneDemoResult, path: Path) -> None:
    """Writes the PNG; see prune_chart.py."""
    threads = result.machine["threads"]["torch"]
    where = f"{result.machine['cpu']['name']}, {threads} thread{'s' * (threads > 1)}"
    chart_of(result.encoder, result.digits, where, path)
