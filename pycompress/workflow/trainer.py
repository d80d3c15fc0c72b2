"""The training loop of a stage: steps that can be interrupted between any two, and gone on with bit for bit.

A step takes `accumulate` batches, weighted so that their losses add up to that of all their tokens at once, then

    backward, clip by norm, optimizer, PruningSchedule, zero_grad

in this order: the schedule sees the gradients, and what it prunes has no momentum left. Everything that the next step
depends on is the model, what `state` returns, and the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.pruning.patterns import is_finite
from pycompress.pruning.schedule import PruningSchedule
from pycompress.recipe.sections import Train
from pycompress.workflow.batches import EpochBatches
from pycompress.workflow.objective import Objective, Terms
from pycompress.workflow.optimiser import (
    LearningRate,
    clip_norm_,
    frozen,
    frozen_names,
    make_optimizer,
    total_steps,
    trained_parameters,
)
from pycompress.workflow.rng import set_rng_state
from pycompress.workflow.trainer_state import LiveBuffers, Position, State, read_state, write_state

_WATCHED = 3  # steps without any gradient, after which a distillation is called constant


class TrainingError(RuntimeError):
    """Training cannot go on; the model and the optimizer are what they were after the step before."""


@dataclass(frozen=True)
class TrainSummary:
    """finished: whether all steps are done. steps: done in all, before a resume too; loss and terms: of the last."""

    finished: bool
    steps: int
    loss: float
    terms: dict[str, float]
    seconds: float


class StepInfo:
    """A step that was done. `terms` are 0-dim tensors: reading one on a GPU waits for it, so not at every step."""

    __slots__ = ("_trainer", "loss", "lr", "step", "terms", "total")

    def __init__(self, trainer: Trainer, step: int, loss: float, terms: Terms, lr: float) -> None:
        self._trainer, self.total = trainer, trainer.total_steps
        self.step, self.loss, self.terms, self.lr = step, loss, terms, lr

    @property
    def sparsity(self) -> float | None:
        """Of the layers that a PruningSchedule prunes; None without one."""
        return self._trainer.sparsity

    @property
    def seconds_left(self) -> float:
        """At the pace of this run so far."""
        return self._trainer.seconds_left

    def floats(self) -> dict[str, float]:
        """The terms as numbers."""
        return {name: float(term) for name, term in self.terms.items()}


class Trainer:
    """Trains `model` in place by `objective`, whose student it is.

    make_schedule: given the optimizer, makes the PruningSchedule; a Conv1D must be a MaskedLinear by then.

    Raises ValueError for a `freeze` that matches nothing, nothing to train, a warm-up longer than the stage, and for
    batches that are empty; the model is then as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        objective: Objective,
        batches: EpochBatches,
        *,
        make_schedule: Callable[[torch.optim.Optimizer], PruningSchedule] | None = None,
    ) -> None:
        self._model, self._train, self._objective, self._batches = model, train, objective, batches
        self._frozen = frozen_names(model, train.freeze)
        self._parameters = trained_parameters(model, objective, self._frozen)
        self._trained = list(self._parameters.values())
        self.total_steps = self.steps_of(train, batches)
        self._rate = LearningRate.make(train, self.total_steps)
        self._optimizer = make_optimizer(train, self._parameters)
        self._schedule: PruningSchedule | None = None
        if make_schedule is not None:
            with frozen(model, self._frozen):
                self._schedule = make_schedule(self._optimizer)
        device = self._trained[0].device.type
        self._autocast: Any = torch.autocast(device, torch.bfloat16) if train.autocast else nullcontext()
        self._buffers = LiveBuffers(model)
        self._resumed_rng: tuple[dict[str, Tensor], Any] | None = None
        self._last: StepInfo | None = None
        self._sparsity: float | None = None
        self._without_gradient: int | None = 0  # None: there was one
        self.step = 0
        self._first, self._started = 0, time.perf_counter()

    @staticmethod
    def steps_of(train: Train, batches: EpochBatches) -> int:
        """The steps of a stage; for one that says epochs its batches are counted."""
        return train.steps or total_steps(train, batches.length())

    @property
    def schedule(self) -> PruningSchedule | None:
        return self._schedule

    @property
    def sparsity(self) -> float | None:
        if self._sparsity is None and self._schedule is not None:
            self._sparsity = self._schedule.sparsity
        return self._sparsity

    @property
    def seconds_left(self) -> float:
        done = self.step - self._first
        return (time.perf_counter() - self._started) / done * (self.total_steps - self.step) if done else math.inf

    # ---- running ----------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[StepInfo], bool | None]) -> TrainSummary:
        """Train until all steps are done, or on_step, called after each of them, returns False.

        The model is in train mode and the teacher in eval mode meanwhile. Raises TrainingError for a loss that is not
        finite and for a distillation without any gradient; what on_step, batches and loss_fn raise is passed on.
        """
        self._started, self._first = time.perf_counter(), self.step
        with self._prepared():
            if self._resumed_rng is not None:
                self._batches.open()
                set_rng_state(*self._resumed_rng)
                self._resumed_rng = None
            while self.step < self.total_steps:
                info = self._advance()
                if on_step(info) is False:
                    break
        loss, terms = (math.nan, {}) if self._last is None else (self._last.loss, self._last.floats())
        seconds = time.perf_counter() - self._started
        return TrainSummary(self.step >= self.total_steps, self.step, loss, terms, seconds)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_mode(self._model, True))
            if self._objective.teacher is not None:
                stack.enter_context(_mode(self._objective.teacher, False))
            stack.enter_context(frozen(self._model, self._frozen))
            stack.enter_context(self._objective.listening())
            stack.enter_context(torch.enable_grad())
            yield

    def _advance(self) -> StepInfo:
        """One step."""
        lr = self._rate.at(self.step + 1)
        batches, schedule = self._next_batches(), self._schedule
        self._buffers.save()
        try:
            loss, terms = self._backward(batches, lr)
            if self._train.clip_norm is not None:
                self._clip(self._train.clip_norm, lr)
            if self._without_gradient is not None and self._objective.distils and schedule is None:
                self._watch_gradient(loss)
        except BaseException:
            self._buffers.restore()
            self._optimizer.zero_grad()
            raise
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        if schedule is not None and schedule.step():
            self._sparsity = None
        self._optimizer.zero_grad()
        self.step += 1
        self._last = StepInfo(self, self.step, loss, terms, lr)
        return self._last

    def _next_batches(self) -> list[Any]:
        return [self._batches.next() for _ in range(self._train.accumulate)]

    def _backward(self, batches: list[Any], lr: float) -> tuple[float, Terms]:
        """The gradients; the loss of the step and its terms."""
        if len(batches) == 1:
            return self._backward_one(batches[0], None, lr)
        total, sums = 0.0, Terms()
        for batch, share in zip(batches, self._objective.share_out(batches), strict=True):
            loss, terms = self._backward_one(batch, share, lr)
            total += loss
            for name, term in terms.items():
                sums[name] = sums[name] + term if name in sums else term
        return total, sums

    def _backward_one(self, batch: Any, share: Any, lr: float) -> tuple[float, Terms]:
        with self._autocast:
            loss, terms = self._objective(batch, share)
        value = loss.item()
        if not math.isfinite(value):
            self._refuse(f"the loss is {value}{_culprits(terms)}", lr)
        if loss.requires_grad:
            loss.backward()
        elif share is None:
            raise TrainingError(
                f"train: the loss of step {self.step + 1} depends on no parameter; does loss_fn or the model detach it?"
            )
        return value, terms

    def _clip(self, limit: float, lr: float) -> None:
        norm = clip_norm_(self._trained, limit, self._schedule)
        if not math.isfinite(value := norm.item()):
            self._refuse(f"the norm of the gradient is {value}", lr)

    def _refuse(self, what: str, lr: float) -> None:
        remedies = [f"a learning rate below {self._train.lr:g}"]
        if not self._train.warmup:
            remedies.append("warmup")
        if self._train.clip_norm is None:
            remedies.append("clip_norm")
        raise TrainingError(
            f"train: {what} at step {self.step + 1} of {self.total_steps} (learning rate {lr:.3g}); the model and the "
            f"optimizer are those of step {self.step}. Try {', '.join(remedies)}, and check the batch for NaN and Inf"
        )

    def _watch_gradient(self, loss: float) -> None:
        """Counts the first steps without any gradient: a student that equals its teacher learns nothing from it."""
        if loss != 0 or any(p.grad is not None and bool(p.grad.any()) for p in self._trained):
            self._without_gradient = None
            return
        self._without_gradient = (self._without_gradient or 0) + 1
        if self._without_gradient >= _WATCHED:
            raise TrainingError(
                f"train: the distillation loss is constantly 0: {_WATCHED} steps gave loss 0 and no gradient. The "
                "student still equals its teacher, as a copy of it that nothing has changed; compress it first, give "
                "another teacher, or set alpha above 0 with labels"
            )

    # ---- state ------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What, with the model, the next step depends on: tensors in use, to be written at once, and JSON.

        To be called between steps: in on_step, or outside of run. Raises TrainingError where the weights are not
        finite, so that they do not take the place of a good checkpoint.
        """
        for name, parameter in self._parameters.items():
            if not is_finite(parameter.detach()):
                raise TrainingError(
                    f"train: {name} holds NaN or Inf after step {self.step} of {self.total_steps}; try a learning rate "
                    f"below {self._train.lr:g}, or clip_norm"
                )
        return write_state(self._parts(), self._position())

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go on from a saved state; load the model's own tensors before.

        Raises ValueError for a state of another stage or a damaged one; nothing is changed then.
        """
        position, rng = read_state(self._parts(), tensors, meta, self.total_steps)
        self.step = self._first = position.step
        self._batches.go_to(position.epoch, position.batch)
        self._resumed_rng, self._sparsity = rng, None

    def _parts(self) -> State:
        return State(self._parameters, self._optimizer, self._schedule, self._objective)

    def _position(self) -> Position:
        return Position(self.step, self.total_steps, self._batches.epoch, self._batches.batch)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """In train or eval mode; each module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _culprits(terms: Terms) -> str:
    """Which terms are not finite, where there are several."""
    names = [name for name, term in terms.items() if not math.isfinite(float(term))]
    return f" (its term {' and '.join(names)})" if names and len(terms) > 1 else ""
