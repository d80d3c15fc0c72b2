"""What compress() was given, and what every stage needs of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from torch import nn

from pycompress.calibration import Batch
from pycompress.recipe import Prune, Recipe, Stage
from pycompress.workflow.batches import TrainBatches, first_inputs
from pycompress.workflow.errors import PreflightError
from pycompress.workflow.rng import keeping_all_rng, seed_all, seed_of

EvalFn = Callable[[nn.Module], Any]
LossFn = Callable[[Any, Any], Any]


@dataclass
class Job:
    """model: as it came; it is copied and never changed. teacher: the caller's, None for the model itself."""

    recipe: Recipe
    model: nn.Module
    teacher: nn.Module | None = None
    train_batches: TrainBatches | None = None
    eval_fn: EvalFn | None = None
    calibration: Iterable[Batch] | None = None
    loss_fn: LossFn | None = None
    progress: bool = True
    _copies: list[nn.Module] = field(default_factory=list, repr=False)

    def fresh(self) -> nn.Module:
        """A copy of the model as it came, in eval mode and without gradients."""
        try:
            model = copy.deepcopy(self.model)
        except Exception as error:
            raise PreflightError(
                f"compress: the model cannot be copied ({error}), and compress() works on a copy; pass a model that "
                "copy.deepcopy takes (parameters that are results of a computation are none)"
            ) from error
        for parameter in model.parameters():
            parameter.grad = None
        return model.eval()

    @cached_property
    def guide(self) -> nn.Module:
        """The teacher: the caller's, or a frozen copy of the model."""
        return self.teacher if self.teacher is not None else self.fresh().requires_grad_(False)

    @cached_property
    def baseline(self) -> nn.Module:
        """The model as it came, to compare with; its copy as a teacher is the same."""
        return self.fresh() if self.teacher is not None else self.guide

    @cached_property
    def _first_inputs(self) -> list[Batch]:
        assert self.train_batches is not None
        with keeping_all_rng():
            seed_all(seed_of(self.recipe.seed, "first inputs"))
            return first_inputs(self.train_batches)

    def inputs(self) -> Iterable[Batch] | None:
        """The calibration batches: model inputs; where none were given, those of the first training batches."""
        if self.calibration is not None:
            return self.calibration
        return None if self.train_batches is None else self._first_inputs

    @cached_property
    def sample(self) -> Batch | None:
        """One batch of model inputs; None where there are no batches at all."""
        batches = self.inputs()
        if batches is None:
            return None
        with keeping_all_rng():
            seed_all(seed_of(self.recipe.seed, "sample"))
            return next(iter(islice(iter(batches), 1)), None)


def why_samples(stage: Stage) -> str:
    """Which of a stage's options looks at model inputs, of one that `needs_samples`."""
    for name in ("smooth", "sensitivity"):
        if getattr(stage, name, None) is not None:
            return name
    return f"method={stage.method!r}" if isinstance(stage, Prune) else "mode='static'"


def label(index: int, stage: Stage | str) -> str:
    """How messages call a stage."""
    name = stage if isinstance(stage, str) else stage.name
    return f"stage {index} ({name})"
