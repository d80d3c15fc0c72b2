"""compress(): what it takes, and whether the folder's run is gone on with, begun anew or refused."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pycompress.calibration import Batch
from pycompress.recipe import Recipe
from pycompress.workflow.batches import TrainBatches
from pycompress.workflow.driver import Run
from pycompress.workflow.errors import PreflightError
from pycompress.workflow.fingerprint import model_identity
from pycompress.workflow.interrupt import Interrupt
from pycompress.workflow.job import EvalFn, Job, LossFn
from pycompress.workflow.preflight import check_arguments
from pycompress.workflow.result import CompressResult
from pycompress.workflow.rng import keeping_all_rng
from pycompress.workflow.run_folder import RunFolder
from pycompress.workflow.run_state import RunState


def compress(
    model: nn.Module,
    recipe: Any,
    *,
    teacher: nn.Module | None = None,
    train_batches: TrainBatches | None = None,
    eval_fn: EvalFn | None = None,
    calibration: Iterable[Batch] | None = None,
    loss_fn: LossFn | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> CompressResult:
    """Do what a recipe says to a copy of `model`; evaluate, time and record it after every stage.

    model: any module, as quantize_ and prune_ take it; it is never changed.
    recipe: a Recipe, a list of stages, a dict, or the path of a YAML file; see pycompress.recipe.
    teacher: what stages that distil learn from; by default the model as it came.
    train_batches: a re-iterable of batches, or a function epoch -> iterable; see workflow/batches.py for what a batch
        may be. Stages that train need it.
    eval_fn: eval_fn(model) -> a number or {name: number}, called with the model in eval mode before all stages and
        after each.
    calibration: a re-iterable of model inputs, as `calibrate` takes them; by default those of the first training
        batches.
    loss_fn: loss_fn(output, batch) -> scalar tensor; by default the loss that the model returns, or cross-entropy.
    out: the folder of the run. Everything is saved there, and the same call goes on with a run that was interrupted,
        from its last stage or step, to the same bits; of a finished run it returns the result at once. Without a
        folder nothing is written, and an interrupted run is lost.
    resume: False starts anew in a folder that has a run.
    progress: show what is going on, on stderr.

    The result is the same for the same model, recipe, data, number of threads and machine. Ctrl-C saves a training
    stage behind the step that runs and raises KeyboardInterrupt. The generators of random numbers are afterwards what
    they were.

    Raises RecipeError, TypeError or PreflightError (a ValueError) before any work, CompressError, chained from the
    cause, where a stage fails: what was finished is then in the folder.
    """
    job = Job(Recipe.of(recipe), model, teacher, train_batches, eval_fn, calibration, loss_fn, progress)
    check_arguments(job)
    with keeping_all_rng(), Interrupt() as interrupt, _in_eval_mode(teacher):
        if out is None:
            return Run(job, None, _state_of(job), interrupt).go()
        with RunFolder(out) as folder:
            return _in_folder(job, folder, resume, interrupt)


@contextmanager
def _in_eval_mode(teacher: nn.Module | None) -> Iterator[None]:
    """A teacher's dropout is not what is to be learned."""
    if teacher is None:
        yield
        return
    flags = [(module, module.training) for module in teacher.modules()]
    try:
        teacher.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _state_of(job: Job) -> RunState:
    own_teacher = job.teacher is not None and any(stage.distillation is not None for stage in job.recipe.stages)
    return RunState(
        recipe=job.recipe.to_dict(),
        model=model_identity(job.model),
        teacher=model_identity(job.teacher) if own_teacher and job.teacher is not None else None,
        machine={},
    )


def _in_folder(job: Job, folder: RunFolder, resume: bool, interrupt: Interrupt) -> CompressResult:
    given = _state_of(job)
    if not resume:
        if not folder.run_json.exists():
            folder.read()  # which refuses a folder that holds something else
        return Run(job, folder, given, interrupt, anew=True).go()
    stored = folder.read()
    if stored is None or stored.restarting:
        return Run(job, folder, given, interrupt, anew=stored is not None).go()
    if (difference := stored.difference(given)) is not None:
        raise PreflightError(
            f"compress: out={str(folder.path)!r} holds another run: {difference}. Choose another folder, or pass "
            "resume=False (--restart) to start anew there; nothing was changed"
        )
    stored.recipe = given.recipe
    run = Run(job, folder, stored, interrupt)
    return run.result() if run.is_finished() else run.go()
