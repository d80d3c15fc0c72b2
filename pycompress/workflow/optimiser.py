"""What a stage trains, with which optimizer, and the learning rate of each step.

Steps count from 1 to `total`. With warm-up over w steps the learning rate is lr * s / w at step s <= w, so that step w
is the first with the whole of it. From there (without warm-up: from step 1) it falls towards final_lr * lr, which a
step after the last would have: with the usual 0 the last step still trains.

    linear    lr * (1 + (final_lr - 1) * p)                          p from 0, at step max(w, 1), to 1, at `total` + 1
    cosine    lr * (final_lr + (1 - final_lr) * (1 + cos(pi p)) / 2)
    constant  lr
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycompress.pruning.schedule import PruningSchedule
from pycompress.recipe.sections import Train
from pycompress.selection import closest, covers

_OP = "train"
Parameters = dict[str, nn.Parameter]


# ---- what is trained ------------------------------------------------------------------------------------------


def frozen_names(model: nn.Module, freeze: Iterable[str]) -> set[str]:
    """The names of the parameters that `freeze`, qualified names of modules or glob patterns, keeps as they are.

    A parameter that two modules share is frozen with either. Raises ValueError for a pattern that matches no module or
    parameter.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    known = [*modules, *(name for names in aliases.values() for name in names)]
    for pattern in freeze:
        if not any(covers(pattern, name) for name in known):
            close = closest(pattern, known)
            hint = f"; the closest names are {', '.join(map(repr, close))}" if close else ""
            raise ValueError(f"{_OP}: freeze={pattern!r} matches no module of the model{hint}")
    return {
        names[0] for names in aliases.values() if any(covers(pattern, name) for pattern in freeze for name in names)
    }


@contextmanager
def frozen(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """These parameters get no gradient, and are afterwards as they were."""
    parameters = dict(model.named_parameters())
    changed = [parameters[name] for name in names if parameters[name].requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def trained_parameters(model: nn.Module, objective: nn.Module, frozen: set[str]) -> Parameters:
    """By name, each once; those of the objective (learned projections) as "objective.<name>".

    Raises ValueError where nothing is left to train.
    """
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in frozen}
    if not found:
        why = "freeze covers them all" if frozen else "all have requires_grad=False, or it has none"
        raise ValueError(f"{_OP}: the model has no parameter to train: {why}")
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise ValueError(f"{_OP}: parameter {name!r} is {parameter.dtype}, which no optimizer trains; freeze it")
    found.update((f"objective.{n}", p) for n, p in objective.named_parameters())
    return found


# ---- optimizer ------------------------------------------------------------------------------------------------


def make_optimizer(train: Train, parameters: Parameters) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD as `train` says; weight decay for parameters of two dimensions and more only.

    torch's fused kernels: AdamW steps 10 million parameters in 7 ms with them, in 40 ms without (one core of a Zen 4).
    """
    weights = [p for p in parameters.values() if p.dim() >= 2]
    others = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((weights, train.weight_decay), (others, 0.0))
        if chosen
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, train.lr, momentum=train.momentum, fused=fused)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, train.lr, betas=train.betas, fused=fused)


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each step; see the top of the file."""

    lr: float
    schedule: str
    warmup: int
    final_lr: float
    total: int

    @classmethod
    def make(cls, train: Train, total: int) -> LearningRate:
        """Raises ValueError for a warm-up that leaves no step."""
        warmup = train.warmup if isinstance(train.warmup, int) else round(train.warmup * total)
        if isinstance(train.warmup, int) and warmup >= total > 1:  # with `steps`, the recipe has seen to it
            raise ValueError(f"{_OP}: warmup={warmup} leaves none of {total} steps; give fewer, or a share as 0.1")
        return cls(train.lr, train.schedule, warmup, train.final_lr, total)

    def at(self, step: int) -> float:
        """Of step 1 to `total`."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        start = max(self.warmup, 1)
        if self.schedule == "constant" or step <= start:
            return self.lr
        progress = (step - start) / (self.total + 1 - start)
        if self.schedule == "linear":
            return self.lr * (1 + (self.final_lr - 1) * progress)
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def total_steps(train: Train, batches_an_epoch: int) -> int:
    """Steps of a stage that is counted in epochs: each takes `accumulate` batches, also across the end of an epoch."""
    assert train.epochs is not None
    batches = round(train.epochs * batches_an_epoch, 6)  # 0.1 * 30 is a little more than 3
    return max(1, math.ceil(batches / train.accumulate))


# ---- gradients ------------------------------------------------------------------------------------------------


def clip_norm_(parameters: list[nn.Parameter], limit: float, schedule: PruningSchedule | None) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`, and return the norm before, 0-dim.

    Before a PruningSchedule regrows, the backward computes the gradient of pruned weights too, which the optimizer's
    step is not to follow: they count nothing in the norm, or each such step would be shorter than its neighbours.
    """
    dense = _pruned_gradients(schedule)
    if not dense:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    given = [(p.grad, dense.get(id(p))) for p in parameters if p.grad is not None]
    gradients = [gradient if mask is None else gradient * mask for gradient, mask in given]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _pruned_gradients(schedule: PruningSchedule | None) -> Mapping[int, Tensor]:
    """The masks, by the weight's id, of layers whose gradient is dense for this step only."""
    if schedule is None or not schedule.regrow:
        return {}
    return {id(layer.weight): layer.mask for layer in schedule.layers.values() if layer.gradient == "dense"}
