"""How the training loop of the workflow fails: with the model and the optimizer of the step before."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress.pruning.schedule import PruningSchedule
from pycompress.recipe.sections import Distillation, Hidden, Train
from pycompress.workflow.batches import EpochBatches
from pycompress.workflow.objective import Objective
from pycompress.workflow.trainer import StepInfo, Trainer, TrainingError
from tests.trainer_helpers import go_on, pairs, same, trainer_of, weights
from tests.workflow_models import net

pytestmark = pytest.mark.usefixtures("one_thread")


class Poisoned:
    """Batches that turn bad at one step."""

    def __init__(self, at: int, value: float) -> None:
        self.at, self.value = at, value

    def __call__(self, epoch: int) -> Iterator[Any]:
        for i, (x, y) in enumerate(pairs(10), 1):
            yield (x * self.value if i == self.at else x, y)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_step_before(accumulate: int, value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))
    train = Train(steps=5, accumulate=accumulate)
    batches = Poisoned(4 * accumulate, value)
    objective = Objective.make(None, model, None, None, pairs()[0])
    trainer = Trainer(model, train, objective, EpochBatches(batches, 0))
    before: list[Any] = []

    def keep(info: StepInfo) -> None:
        before[:] = [weights(model), copy.deepcopy(trainer._optimizer.state_dict()["state"])]

    with pytest.raises(TrainingError, match=r"the loss is nan at step 4 of 5 .*those of step 3\. Try a learning rate"):
        trainer.run(keep)
    assert same(weights(model), before[0])
    assert str(trainer._optimizer.state_dict()["state"]) == str(before[1])
    assert all(p.grad is None for p in model.parameters())
    assert trainer.step == 3
    trainer.state()


def test_a_loss_that_raises_leaves_the_step_before() -> None:
    model = nn.Sequential(nn.BatchNorm1d(12), net(0))
    calls = 0

    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyError("mine")
        return output.square().mean()

    trainer = trainer_of(model, Train(steps=9), loss_fn=loss_fn)
    before: list[Any] = []
    with pytest.raises(KeyError, match="mine"):
        trainer.run(lambda info: before.append(weights(model)))
    assert same(weights(model), before[-1])


def test_a_gradient_that_is_not_finite_is_seen_when_clipping() -> None:
    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * math.inf

    model = net(0)
    before = weights(model)
    options: dict[str, Any] = {"loss_fn": lambda output, batch: Explodes.apply(output).square().mean()}
    with pytest.raises(TrainingError, match="the norm of the gradient is"):
        trainer_of(model, Train(steps=2, clip_norm=1.0), **options).run(go_on)
    assert same(weights(model), before)
    trainer = trainer_of(model, Train(steps=1), **options)
    trainer.run(go_on)
    with pytest.raises(TrainingError, match=r"0\.weight holds NaN or Inf after step 1"):
        trainer.state()  # would have taken the place of a good checkpoint


def test_a_distillation_from_itself_is_called_constant() -> None:
    student = net(0)
    with pytest.raises(TrainingError, match=r"constantly 0: 3 steps .* still equals its teacher"):
        trainer_of(student, Train(steps=9), d=Distillation(alpha=0.0), teacher=net(0)).run(go_on)
    hidden = Distillation(loss="none", alpha=0.0, hidden=Hidden(layers={"0": "0"}))
    with pytest.raises(TrainingError, match="constantly 0"):
        trainer_of(student, Train(steps=9), d=hidden, teacher=net(0)).run(go_on)
    # With something else to learn, or something else that changes the student, it is 0 at first only.
    assert trainer_of(student, Train(steps=9), d=Distillation(), teacher=net(0)).run(go_on).finished
    student = net(0)
    pruning = trainer_of(
        student, Train(steps=9), d=Distillation(alpha=0.0), teacher=net(0),
        make_schedule=lambda made: PruningSchedule(student, made, sparsity=0.5, begin=5, end=8),
    )  # fmt: skip
    assert pruning.run(go_on).loss > 0


def test_a_loss_that_depends_on_nothing() -> None:
    with pytest.raises(TrainingError, match="depends on no parameter; does loss_fn or the model detach it"):
        trainer_of(net(), Train(steps=1), loss_fn=lambda output, batch: output.detach().mean()).run(go_on)


def test_empty_batches() -> None:
    objective = Objective.make(None, net(), None, None, pairs()[0])
    with pytest.raises(ValueError, match="train_batches is empty"):
        Trainer(objective.student, Train(epochs=1), objective, EpochBatches([], 0))
    with pytest.raises(ValueError, match="gave no batch in epoch 0"):
        Trainer(objective.student, Train(steps=1), objective, EpochBatches([], 0)).run(go_on)
