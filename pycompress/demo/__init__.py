"""`pycompress demo`: a real sentence encoder in fp32 and in int8, side by side, on real sentences.

encoder.py loads the model and embeds, sentences.py finds the text, measure.py measures, report.py shows.
"""

import copy
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

import pycompress
from pycompress import info
from pycompress.report import QuantizeReport

from . import measure, report, sentences
from .encoder import Encoder

SHAPES: tuple[measure.Shape, ...] = ((1, 16), (1, 128), (8, 128), (32, 64))
QUICK_SHAPES: tuple[measure.Shape, ...] = ((1, 16), (1, 128))


def run(
    out: Path,
    *,
    threads: int | None = None,
    limit: int | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> report.DemoResult:
    """Runs the demo, prints its table and writes demo.json and demo.png into `out`.

    limit: how many sentences; None takes all of them. quick: fewer rounds, small shapes, 64 sentences.
    Raises RuntimeError when the model or the sentences are not installed, ValueError on a bad number.
    """
    console = console or Console()
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    shapes, rounds = (QUICK_SHAPES, 3) if quick else (SHAPES, 15)
    limit = limit or (64 if quick else None)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        result = _measure(progress, limit, shapes, rounds)
    console.print(report.table(result))
    for note in result.notes:
        console.print(f"note: {note}", style="dim", highlight=False)
    report.write_json(result, out / "demo.json")
    report.chart(result, out / "demo.png")
    where = f"figures in {out / 'demo.json'}, chart in {out / 'demo.png'}"
    console.print(where, highlight=False, markup=False, soft_wrap=True)
    return result


def _measure(
    progress: Progress, limit: int | None, shapes: tuple[measure.Shape, ...], rounds: int
) -> report.DemoResult:
    task = progress.add_task("loading all-MiniLM-L6-v2", total=None)
    encoder = Encoder()
    texts = sentences.load(limit)
    progress.update(task, description="quantising")
    int8 = copy.deepcopy(encoder.model)
    swap = pycompress.quantize_(int8)
    notes = [swap.summary()]
    variants = {"fp32": encoder.model, **_torch_int8(encoder.model, notes), "pycompress int8": int8}
    progress.update(task, total=len(variants) + len(shapes) * rounds)

    results, expected = [], None
    for name, model in variants.items():
        progress.update(task, description=f"embedding {len(texts)} sentences: {name}")
        embeddings = encoder.embed(model, texts)
        expected = embeddings if expected is None else expected
        moved = measure.accuracy(expected, embeddings)
        size, file_size = measure.memory_bytes(model), measure.disk_bytes(model)
        results.append(report.VariantResult(name, size, file_size, moved))
        progress.advance(task)

    padding = {}
    for batch, length in shapes:
        shape = f"{batch}x{length}"
        progress.update(task, description=f"timing {batch} × {length}")
        inputs = encoder.tokenize(encoder.passages(texts, batch, length), length)
        padding[shape] = 1 - inputs["attention_mask"].double().mean().item()
        timed = measure.latency(variants, inputs, rounds, lambda: progress.advance(task))
        progress.update(task, completed=len(variants) + len(padding) * rounds)
        for v in results:
            v.latency[shape] = timed[v.name]
    return report.DemoResult(info.collect(), len(texts), padding, _swap_summary(swap), notes, results)


def _torch_int8(model: nn.Module, notes: list[str]) -> dict[str, nn.Module]:
    """Returns torch's own dynamic int8 of the model, with its defaults, where torch has an engine for it."""
    engine = torch.backends.quantized.engine
    if engine == "none":
        notes.append("torch int8 left out: this build of torch has no quantised engine")
        return {}
    notes.append(f"torch int8 is torch.ao.quantization.quantize_dynamic with its defaults, engine {engine}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, but it is what ships in torch
        int8 = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return {"torch int8": int8}


def _swap_summary(swap: QuantizeReport) -> dict[str, int]:
    return {
        "swapped": len(swap.swapped),
        "left": len(swap.left),
        "activations_folded": len(swap.fused),
        "bytes_before": swap.bytes_before,
        "bytes_after": swap.bytes_after,
    }
