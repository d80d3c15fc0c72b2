"""A training stage of a run: goes on from its checkpoint, saves one now and then, and stops for Ctrl-C."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pycompress.recipe import Train
from pycompress.recipe.sections import Distillation
from pycompress.workflow.batches import EpochBatches, first_batch
from pycompress.workflow.checkpoint import load_checkpoint, restore_model, save_checkpoint
from pycompress.workflow.history import History
from pycompress.workflow.interrupt import Interrupt
from pycompress.workflow.job import Job
from pycompress.workflow.objective import Objective
from pycompress.workflow.optimiser import total_steps
from pycompress.workflow.progress import StageProgress
from pycompress.workflow.rng import seed_of
from pycompress.workflow.stages import MakeSchedule
from pycompress.workflow.trainer import StepInfo, Trainer

_LINES = 400  # of history a stage, about
_SAVE_SHARE = 50  # a checkpoint is followed by so many times the time it took


class Stopped(Exception):
    """Training stopped for Ctrl-C behind a whole step, which is saved where there is a folder."""


class CheckpointError(ValueError):
    """The step checkpoint is damaged or of another run; the stage has to begin anew."""


@dataclass
class Session:
    """One training stage. checkpoint: its file, None without a folder. identity: of the run, see run_state.py.

    step: the last one that is done and, with a checkpoint, saved. earlier: seconds of other processes.
    """

    job: Job
    index: int
    name: str
    identity: str
    history: History
    interrupt: Interrupt
    checkpoint: Path | None
    step: int = 0
    earlier: float = 0.0

    def __call__(
        self,
        model: nn.Module,
        train: Train,
        distillation: Distillation | None,
        make_schedule: MakeSchedule | None = None,
    ) -> int:
        """Train `model` in place to the end of the stage; returns its steps.

        Raises Stopped for Ctrl-C, CheckpointError where the model is to be made anew.
        """
        job = self.job
        assert job.train_batches is not None
        teacher = None if distillation is None else job.guide
        seed = seed_of(job.recipe.seed, self.index, "objective")
        batch = first_batch(job.train_batches)
        objective = Objective.make(distillation, model, teacher, job.loss_fn, batch, seed=seed)
        trainer = make_trainer(job, self.index, model, train, objective, make_schedule)
        self._go_on(model, trainer)
        title = f"{self.index}/{len(job.recipe.stages)} {self.name}"
        with (
            StageProgress(title, trainer.total_steps, shown=job.progress) as progress,
            self.interrupt.deferring(),
        ):
            saver = _Saver(self, model, trainer, progress)
            try:
                summary = trainer.run(saver.on_step)
            except Exception:
                if not self.interrupt.requested:
                    raise
                raise Stopped from None  # workers of a DataLoader died of the same Ctrl-C; the last checkpoint holds
        self.history.flush()
        if not summary.finished:
            raise Stopped
        self.step = trainer.total_steps
        return self.step

    def _go_on(self, model: nn.Module, trainer: Trainer) -> None:
        """Put model and trainer where the checkpoint was written, if there is one."""
        if self.checkpoint is None or not self.checkpoint.exists():
            self.history.rewind(self.index, 0)
            return
        try:
            of_model, of_trainer, meta = load_checkpoint(self.checkpoint)
            if meta.get("identity") != self.identity:
                raise ValueError(f"{self.checkpoint} is of another run")
            if meta.get("stage") != self.index:  # an earlier stage is done again, as its file was damaged
                self.history.rewind(self.index, 0)
                return
            self.step, self.earlier = int(meta["step"]), float(meta["seconds"])
            trainer.load_state(of_trainer, meta["trainer"])
            restore_model(model, of_model)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(str(error)) from error
        self.history.rewind(self.index, self.step)

    def save(self, model: nn.Module, trainer: Trainer, step: int, seconds: float) -> None:
        assert self.checkpoint is not None
        self.history.flush()
        tensors, state = trainer.state()
        meta = {"identity": self.identity, "stage": self.index, "step": step, "seconds": seconds, "trainer": state}
        save_checkpoint(self.checkpoint, model, tensors, meta)


def make_trainer(
    job: Job, index: int, model: nn.Module, train: Train, objective: Objective, make_schedule: MakeSchedule | None
) -> Trainer:
    """The trainer of stage `index`, before its first step."""
    assert job.train_batches is not None
    batches = EpochBatches(job.train_batches, job.recipe.seed, index)
    if make_schedule is None:
        return Trainer(model, train, objective, batches)
    steps = train.steps or total_steps(train, batches.length())
    return Trainer(model, train, objective, batches, make_schedule=partial(make_schedule, total=steps))


class _Saver:
    """What happens after every step."""

    def __init__(self, session: Session, model: nn.Module, trainer: Trainer, progress: StageProgress) -> None:
        self._session, self._model, self._trainer, self._progress = session, model, trainer, progress
        self._before, self._start = session.earlier, time.monotonic()
        self._every = session.job.recipe.checkpoint_seconds
        self._saved, self._wait = self._start, self._every
        self._every_line = max(1, trainer.total_steps // _LINES)

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def on_step(self, info: StepInfo) -> bool:
        session = self._session
        if info.step % self._every_line == 0 or info.step == info.total:
            session.history.add(self._line(info))
        self._progress.update(info)
        session.step = info.step
        if info.step == info.total:
            return True  # the stage is done, and its model is about to be saved
        if session.checkpoint is not None and (session.interrupt.requested or self._is_time()):
            began = time.monotonic()
            session.save(self._model, self._trainer, info.step, self.seconds())
            self._saved = time.monotonic()
            if self._every:  # else the recipe wants one a step
                self._wait = max(self._every, _SAVE_SHARE * (self._saved - began))
        return not session.interrupt.requested

    def _is_time(self) -> bool:
        return time.monotonic() - self._saved >= self._wait

    def _line(self, info: StepInfo) -> dict[str, Any]:
        line: dict[str, Any] = {
            "stage": self._session.index,
            "name": self._session.name,
            "step": info.step,
            "loss": info.loss,
            "terms": info.floats(),
            "lr": info.lr,
            "seconds": round(self.seconds(), 4),
        }
        if info.sparsity is not None:
            line["sparsity"] = info.sparsity
        return line
