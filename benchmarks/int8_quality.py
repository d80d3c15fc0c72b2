"""What int8 and 4 bits cost a real model in quality, and what SmoothQuant and a mode for each layer give back.

MiniLM on real English sentences: every second one calibrates, smooths and chooses, the others are measured. Writes
int8_quality.md, int8_quality.json and int8_sensitivity.png into --out (default bench-out).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import pycompress
from pycompress import info
from pycompress.bench.figures import grid
from pycompress.demo import measure, sentences
from pycompress.demo.encoder import Batch, Encoder
from pycompress.demo.prune_encoder import copied, linear_names, state_bytes
from pycompress.sensitivity import SensitivityReport

MAX_BYTES = 0.30  # of the fp32 linear layers
TARGETS = {"plain": 0.999, "smoothed": 0.9995}  # mean cosine of the embeddings that `choose` has to reach
SHAPES = ((1, 16), (1, 128), (8, 128))
# Weights of 4 bits: (mode, group size, symmetric).
FOUR_BITS = (
    ("int4", 128, True),
    ("int4", 128, False),
    ("int4", 32, True),
    ("int4", 32, False),
    ("nf4", 128, True),
    ("nf4", 64, True),
    ("nf4", 32, True),
)


def embedding(output: object, batch: Batch) -> Tensor:
    """The mean of the real tokens' last hidden states: what the model is used for."""
    mask = batch["attention_mask"].unsqueeze(-1).float()
    hidden: Tensor = output.last_hidden_state  # type: ignore[attr-defined]
    return (hidden * mask).sum(1) / mask.sum(1)


def batches_of(encoder: Encoder, texts: list[str], size: int = 32) -> list[Batch]:
    texts = sorted(texts, key=len)  # alike in length: little padding
    return [encoder.tokenize(texts[i : i + size]) for i in range(0, len(texts), size)]


def variants(model: nn.Module, batches: list[Batch], alpha: float, picture: Path) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, model): fp32 first, then int8 in every way."""
    yield "fp32", model
    yield "dynamic", quantised(model, "dynamic")
    yield "weight_only", quantised(model, "weight_only")
    for method in ("minmax", "mse"):
        yield f"static, {method}", quantised(model, "static", batches, method)
    report = sensitivity_of(model, batches)
    report.plot(picture)
    yield "dynamic, layers chosen", chosen(model, report, TARGETS["plain"])

    smoothed = copied(model)
    print(pycompress.smooth_(smoothed, batches, alpha, where="anywhere").summary(), file=sys.stderr)
    yield "dynamic, smoothed", quantised(smoothed, "dynamic")
    yield "weight_only, smoothed", quantised(smoothed, "weight_only")
    yield "static, smoothed, mse", quantised(smoothed, "static", batches, "mse")
    yield "dynamic, smoothed, layers chosen", chosen(smoothed, sensitivity_of(smoothed, batches), TARGETS["smoothed"])


def four_bits(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, model) for every row of FOUR_BITS."""
    for mode, group_size, symmetric in FOUR_BITS:
        made = copied(model)
        pycompress.quantize_(made, mode, group_size=group_size, symmetric=symmetric)
        yield f"{mode}, groups of {group_size}{'' if symmetric else ', zero points'}", made


def quantised(model: nn.Module, mode: str, batches: list[Batch] | None = None, method: str = "minmax") -> nn.Module:
    made = copied(model)
    ranges = pycompress.calibrate(made, batches, method) if batches is not None else None
    pycompress.quantize_(made, mode, calibration=ranges)
    return made


def sensitivity_of(model: nn.Module, batches: list[Batch]) -> SensitivityReport:
    return pycompress.sensitivity(model, batches, output_fn=embedding)


def chosen(model: nn.Module, report: SensitivityReport, target: float) -> nn.Module:
    choice = report.choose(target, max_bytes=MAX_BYTES)
    print(choice.summary(), file=sys.stderr)
    made = copied(model)
    pycompress.quantize_(made, choice)
    return made


def measured(encoder: Encoder, texts: list[str], models: dict[str, nn.Module]) -> list[dict[str, object]]:
    """A row a model: how far its embeddings are from fp32's, and the bytes of its linear layers in a checkpoint."""
    layers = linear_names(encoder.model)
    whole = state_bytes(encoder.model, layers)
    expected = encoder.embed(encoder.model, texts)
    rows = []
    for name, model in models.items():
        moved = measure.accuracy(expected, encoder.embed(model, texts))
        rows.append(
            {
                "int8": name,
                "cosine": moved.mean,
                "worst": moved.worst,
                "neighbours": moved.neighbour_agreement,
                "bytes": state_bytes(model, layers) / whole,
                "milliseconds": {},
            }
        )
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    shapes = list(rows[0]["milliseconds"])  # type: ignore[call-overload]
    head = ["", "mean cosine", "worst", "same neighbour", "linear bytes", *(f"ms at {shape}" for shape in shapes)]
    body = [
        [
            str(row["int8"]),
            f"{row['cosine']:.4f}",
            f"{row['worst']:.4f}",
            f"{row['neighbours']:.1%}",
            f"{row['bytes']:.3f}",
            *(f"{row['milliseconds'][shape]:.1f}" for shape in shapes),  # type: ignore[index]
        ]
        for row in rows
    ]
    return grid(head, body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=400, help="half of them calibrate, half are measured")
    parser.add_argument("--alpha", type=float, default=0.5, help="SmoothQuant's")
    parser.add_argument("--rounds", type=int, default=15, help="of timing; 0 times nothing")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    encoder = Encoder()
    texts = sentences.load(options.sentences)
    batches = batches_of(encoder, texts[0::2])
    models = dict(variants(encoder.model, batches, options.alpha, options.out / "int8_sensitivity.png"))
    models |= dict(four_bits(encoder.model))
    rows = measured(encoder, texts[1::2], models)
    for batch, length in SHAPES if options.rounds else ():
        inputs = encoder.tokenize(encoder.passages(texts, batch, length), length)
        times = measure.latency(models, inputs, options.rounds, lambda: None)
        for row in rows:
            row["milliseconds"][f"{batch}x{length}"] = times[str(row["int8"])].milliseconds  # type: ignore[index]
    table = markdown(rows)
    print(table)
    content = {"machine": info.collect(), "sentences": len(texts), "alpha": options.alpha, "rows": rows}
    (options.out / "int8_quality.json").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    (options.out / "int8_quality.md").write_text(table + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
