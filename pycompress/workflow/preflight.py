"""Everything that can be told to go wrong before any work, and is refused here: nothing is trained, nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pycompress.calibration import check_batches, evaluating, feed
from pycompress.model_file import file_bytes
from pycompress.pruning import prune_
from pycompress.recipe import LowRank, Prune, Stage
from pycompress.report import megabytes, model_bytes
from pycompress.selection import ModuleMap, check_patterns, check_root
from pycompress.workflow.batches import check_train_batches, first_batch
from pycompress.workflow.errors import PreflightError
from pycompress.workflow.evaluate import evaluate, not_finite
from pycompress.workflow.job import Job, label, why_samples
from pycompress.workflow.stages import make_schedule, turn_conv1d_

_SPARE = 1 << 20
_OPTIMIZER_COPIES = 4  # weights, two moments of Adam, and masks or projections at most as much again


def check_arguments(job: Job) -> None:
    """The kinds of what was given. Raises TypeError or ValueError."""
    if not isinstance(job.model, nn.Module):
        raise TypeError(f"compress: model is a {type(job.model).__name__}; expected a torch.nn.Module")
    check_root(job.model, "compress")
    if job.teacher is not None and not isinstance(job.teacher, nn.Module):
        raise TypeError(f"compress: teacher is a {type(job.teacher).__name__}; expected a torch.nn.Module, or None")
    for name in ("eval_fn", "loss_fn"):
        value = getattr(job, name)
        if value is not None and not callable(value):
            raise TypeError(f"compress: {name} is a {type(value).__name__}; expected a function, or None")
    if job.train_batches is not None:
        check_train_batches(job.train_batches)
    if job.calibration is not None:
        check_batches(job.calibration, "calibration")
        if isinstance(job.calibration, Iterator):
            raise TypeError(
                f"compress: calibration is a {type(job.calibration).__name__}, which can be gone through only once; "
                "pass a list or a DataLoader"
            )


def check_stages(job: Job, first: int = 1) -> None:
    """Tries what the stages from number `first` on need, on copies, without a step of training."""
    stages = list(enumerate(job.recipe.stages, 1))[first - 1 :]
    for index, stage in stages:
        with _refusing(label(index, stage)):
            _check_needs(stage, job)
    _check_names(job)
    _check_inputs(job)
    _check_training(stages, job)
    _check_pruning(stages, job)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Whatever is raised inside is a refusal that names the place."""
    try:
        yield
    except PreflightError:
        raise
    except Exception as error:
        text = described(error)
        place = "" if text.startswith(where) else f"{where}: "  # calibration: calibration is empty
        raise PreflightError(f"compress: {place}{text}. No work was done") from error


def described(error: BaseException) -> str:
    """An error's message, with its kind where that says more: KeyError('x') alone is only "'x'"."""
    text = str(error).strip().rstrip(".")
    if not text:
        return type(error).__name__
    return text if isinstance(error, (ValueError, TypeError, RuntimeError)) else f"{type(error).__name__}: {text}"


def _check_needs(stage: Stage, job: Job) -> None:
    if stage.training is not None and job.train_batches is None:
        raise ValueError(
            "it trains, and train_batches is None; pass a list of batches, a DataLoader or epoch -> batches"
        )
    if not stage.needs_samples:
        return
    why = why_samples(stage)
    if isinstance(stage, Prune) and stage.method != "wanda":
        if job.train_batches is None:
            raise ValueError(f"{why} needs gradients of the loss, and train_batches is None; pass batches with labels")
    elif job.inputs() is None:
        raise ValueError(f"{why} needs sample inputs; pass calibration (batches of model inputs) or train_batches")


def _check_names(job: Job) -> None:
    """Names in `skip` have to be there. Stages behind low_rank may name its factors, which are not there yet."""
    modules = ModuleMap(job.model)
    for index, stage in enumerate(job.recipe.stages, 1):
        skip: Iterable[str] = getattr(stage, "skip", ())
        with _refusing(label(index, stage)):
            check_patterns(modules, list(skip), "compress", "skip")
        if isinstance(stage, LowRank):
            return


def _check_inputs(job: Job) -> None:
    """A batch of inputs through the model."""
    name = "calibration" if job.calibration is not None else "train_batches"
    with _refusing(name):
        if job.inputs() is None:
            return
        if job.sample is None:
            raise ValueError(f"{name} is empty; expected at least one batch")
        model = job.fresh()
        with evaluating(model):
            feed(model, job.sample, name)


def _check_training(stages: list[tuple[int, Stage]], job: Job) -> None:
    """One batch through student, teacher and loss of every stage that trains; its trainer is made, and does nothing.

    The student is the model as it came; of what low_rank will have made of it `freeze` may name factors, and is then
    not looked at.
    """
    from pycompress.workflow.objective import Objective
    from pycompress.workflow.training import make_trainer

    factored = False
    for index, stage in stages:
        factored = factored or isinstance(stage, LowRank)
        if (train := stage.training) is None:
            continue
        with _refusing("train_batches"):
            batch = first_batch(job.train_batches)  # type: ignore[arg-type]
        with _refusing(label(index, stage)):
            student = job.fresh().train()  # dropout is what some losses cannot work with
            teacher = None if stage.distillation is None else job.guide
            objective = Objective.make(stage.distillation, student, teacher, job.loss_fn, batch)
            with torch.enable_grad():  # as in training: attention maps are looked at then
                loss, _ = objective(batch)
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the first batch's loss is {loss.item()}; check the batch, the model and loss_fn")
            schedule = None
            if isinstance(stage, Prune) and (not factored or _names_are_there(stage, student)):
                turn_conv1d_(stage, student)
                schedule = partial(make_schedule, stage, student, recipe=job.recipe)
            train = train.model_copy(update={"freeze": ()}) if factored else train
            make_trainer(job, index, student, train, objective, schedule)


def _check_pruning(stages: list[tuple[int, Stage]], job: Job) -> None:
    """Patterns and limits are tried with random scores, which need no batches, on a copy."""
    for index, stage in stages:
        if isinstance(stage, Prune) and stage.training is None and stage.method != "zeros":
            if not _names_are_there(stage, job.model):
                continue
            with _refusing(label(index, stage)):
                prune_(
                    job.fresh(),
                    stage.sparsity,
                    pattern=stage.pattern,
                    method="random",
                    scope=stage.scope,
                    min_sparsity=stage.min_sparsity,
                    max_sparsity=stage.max_sparsity,
                    skip=stage.skip,
                )


def _names_are_there(stage: Prune, model: nn.Module) -> bool:
    """Else `skip` names factors that low_rank has yet to make, and nothing can be told of the layers."""
    try:
        check_patterns(ModuleMap(model), list(stage.skip), "compress", "skip")
    except ValueError:
        return False
    return True


def check_evaluation(job: Job) -> dict[str, float]:
    """The metrics of the baseline."""
    with _refusing("eval_fn, on the model as it came"):
        metrics = evaluate(job.eval_fn, job.fresh(), job.recipe.seed)
        if (what := not_finite(metrics)) is not None:
            raise ValueError(f"eval_fn returned {what} for the model as it came; expected a finite number")
    return metrics


def check_savable(model: nn.Module) -> int:
    """The bytes of its file, not compact. Raises PreflightError for a model that cannot be saved."""
    with _refusing("saving the model"):
        return file_bytes(model)


def check_space(job: Job, free: int, path: Path, first: int = 1) -> None:
    """Whether all files of the run find room: a model a stage, two of the largest checkpoint, the final model."""
    stages = job.recipe.stages[first - 1 :]
    size = model_bytes(job.model)
    needed = size * (len(stages) + 1) + _SPARE
    if any(stage.training is not None for stage in stages):
        needed += 2 * _OPTIMIZER_COPIES * size
    if free < needed:
        raise PreflightError(
            f"compress: out={str(path)!r} has {megabytes(free)} MB free, and the files of this run may take "
            f"{megabytes(needed)} MB; make room, or choose another disk. No work was done"
        )
