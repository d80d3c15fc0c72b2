"""`pycompress demo prune`: a sentence encoder pruned and converted as it is, and a classifier pruned while it trains.

prune_encoder.py prunes MiniLM without retraining: sizes, times, and embeddings that show what retraining is for.
prune_digits.py prunes a classifier of real digits to 90 %, at once and gradually, and prune_report.py shows both.
"""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from pycompress import info

from . import prune_digits, prune_encoder, prune_report


def run(
    out: Path,
    *,
    seeds: int | None = None,
    threads: int | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> prune_report.PruneDemoResult:
    """Runs the demo, prints its tables and writes prune.json and prune.png into `out`.

    seeds: how many classifiers are trained, 4 by default, 2 with quick. threads: for torch and the kernels.
    quick: fewer sparsities, shapes, sentences and training steps.
    Raises RuntimeError when the model or the sentences are not installed, ValueError on a bad number.
    """
    console = console or Console()
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        _calibrate(progress)
        encoder = prune_encoder.run(progress, prune_encoder.QUICK if quick else prune_encoder.WHOLE)
        digits = prune_digits.run(progress, seeds, prune_digits.QUICK if quick else prune_digits.WHOLE)
    result = prune_report.PruneDemoResult(info.collect(), encoder, digits)
    prune_report.show(result, console)
    prune_report.write_json(result, out / "prune.json")
    prune_report.chart(result, out / "prune.png")
    where = f"figures in {out / 'prune.json'}, chart in {out / 'prune.png'}"
    console.print(where, highlight=False, markup=False, soft_wrap=True)
    return result


def _calibrate(progress: Progress) -> None:
    """Measures what sparse and dense layers cost on this machine, where that was not done before."""
    from pycompress.cost_model import calibrate_cost_model

    for dtype in prune_encoder.WEIGHTS.values():
        task = progress.add_task(f"measuring this machine: {dtype}", total=None)

        def show(done: int, of: int, task: TaskID = task) -> None:
            progress.update(task, completed=done, total=of)

        calibrate_cost_model(dtype, progress=show)
        progress.update(task, visible=False)
