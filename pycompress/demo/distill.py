"""`pycompress demo distill`: a student taught by a teacher on real digits, and the loss at the size of a vocabulary.

distill_digits.py trains, distill_steps.py times the loss, vocabulary.py runs MiniLM's 30 522-word embedding matrix as
the head, distill_report.py shows.
"""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pycompress import info

from . import distill_digits, distill_report, distill_steps, vocabulary
from .distill_digits import one_thread

SEEDS, STEPS = 5, 600
QUICK_SEEDS, QUICK_STEPS = 2, 100


def run(
    out: Path,
    *,
    seeds: int | None = None,
    threads: int | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> distill_report.DistillResult:
    """Runs the demo, prints its tables and writes distill.json and distill.png into `out`.

    seeds: how many times the digits are split and trained on, 5 by default, 2 with quick. threads: for torch and the
    kernels. quick: 100 training steps instead of 600 and short timings.
    Raises RuntimeError when the model is not installed, ValueError on a bad number.
    """
    console = console or Console()
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    seeds = seeds or (QUICK_SEEDS if quick else SEEDS)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        result = _measure(progress, seeds, quick)
    distill_report.show(result, console)
    distill_report.write_json(result, out / "distill.json")
    distill_report.chart(result, out / "distill.png")
    where = f"figures in {out / 'distill.json'}, chart in {out / 'distill.png'}"
    console.print(where, highlight=False, markup=False, soft_wrap=True)
    return result


def _measure(progress: Progress, seeds: int, quick: bool) -> distill_report.DistillResult:
    steps = QUICK_STEPS if quick else STEPS
    task = progress.add_task("loading the digits", total=seeds * steps * (1 + len(distill_digits.ARMS)))

    def say(what: str) -> None:
        progress.update(task, description=what)

    with one_thread():
        digits = distill_digits.train(seeds, steps, say, lambda: progress.advance(task))
    progress.update(task, description="loss steps", completed=0, total=3)
    times = distill_steps.measure(quick, say, lambda: progress.advance(task))
    progress.update(task, visible=False)
    words = vocabulary.run(progress, quick)
    return distill_report.DistillResult(info.collect(), digits, times, words)
