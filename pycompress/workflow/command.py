"""What `pycompress compress` does: a configuration, run with one seed or several."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from pycompress.recipe.problems import RecipeError
from pycompress.workflow.config import Task, load_task
from pycompress.workflow.seeds import SeedsReport


def prepare(path: Path, seed: int | None = None, threads: int | None = None) -> Task:
    """The task of a file, ready to be run; its model is not made yet. seed: instead of the recipe's."""
    if threads is not None:
        torch.set_num_threads(threads)
    return load_task(path, seed)


def describe(task: Task) -> str:
    return f"{', '.join(stage.name for stage in task.config.stages)}; seed {task.config.seed}"


def run(task: Task, out: Path | None = None, seeds: int | None = None, restart: bool = False) -> None:
    """Runs the task in `out`, or with several seeds in out/seed-<seed>, and prints what came out."""
    folder = out or Path(task.config.out or Path("runs") / task.path.stem)
    if seeds is None:
        run_seed(task, task.config.seed, folder, restart)
        return
    first = task.config.seed
    if first + seeds > 2**63:
        raise RecipeError([f"--seeds {seeds} from seed {first} on: seeds are below 2**63"])
    chosen = range(first, first + seeds)
    folders = [folder / f"seed-{seed}" for seed in chosen]
    for seed, one in zip(chosen, folders, strict=True):
        run_seed(task, seed, one, restart)
    show(SeedsReport.of(chosen, folders))


def run_seed(task: Task, seed: int, out: Path, restart: bool) -> None:
    from pycompress.workflow import compress

    arguments = task.arguments(seed)
    model = arguments.pop("model")
    recipe = task.recipe.model_copy(update={"seed": seed})
    result = compress(model, recipe, **arguments, out=out, resume=not restart)
    show(result)
    print(f"report: {result.report()}")


def show(table: object) -> None:
    """In colour and as wide as the terminal, or as plain text where there is none."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
    else:
        print(table)
