"""What the trainer's tests share: batches of a small classifier, a trainer of its parts, weights to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycompress.recipe.sections import Distillation, Train
from pycompress.workflow.batches import EpochBatches
from pycompress.workflow.objective import Objective
from pycompress.workflow.trainer import StepInfo, Trainer


def pairs(count: int = 5, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.randn(size, 12, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def trainer_of(
    model: nn.Module,
    train: Train,
    *,
    d: Distillation | None = None,
    teacher: nn.Module | None = None,
    loss_fn: Any = None,
    batches: Any = None,
    make_schedule: Any = None,
) -> Trainer:
    batches = pairs() if batches is None else batches
    objective = Objective.make(d, model, teacher, loss_fn, batches[0])
    return Trainer(model, train, objective, EpochBatches(batches, 0), make_schedule=make_schedule)


def go_on(info: StepInfo) -> bool:
    return True


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
