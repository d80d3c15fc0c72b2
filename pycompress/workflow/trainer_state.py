"""What of a trainer is saved, under which names.

Tensors: "optimizer.<key>.<parameter>" (exp_avg, exp_avg_sq, step; momentum_buffer), "objective.<name>" (projections),
"schedule.<masks|sums|latent>.<layer>", "rng.<generator>". JSON: version, optimizer, step, total_steps, epoch, batch,
schedule (its version and step, or None), rng.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress.pruning.schedule import PruningSchedule
from pycompress.workflow.rng import rng_state

_VERSION = 1
_OP = "Trainer.load_state"
_ADAM = ("exp_avg", "exp_avg_sq", "step")
_KEYS = {"AdamW": _ADAM, "Adam": _ADAM, "SGD": ("momentum_buffer",)}
_OF_LAYERS = ("masks", "sums", "latent")
Rng = tuple[dict[str, Tensor], Any]


class State(NamedTuple):
    """The parts of a trainer that have one."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: PruningSchedule | None
    objective: nn.Module


class Position(NamedTuple):
    step: int
    total_steps: int
    epoch: int
    batch: int


def write_state(parts: State, position: Position) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """References to the tensors in use, and JSON."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parts.parameters.items():
        for key, value in parts.optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer.{key}.{name}"] = value.detach().contiguous()
    tensors.update((f"objective.{n}", p.detach()) for n, p in parts.objective.state_dict().items())
    schedule: dict[str, int] | None = None
    if parts.schedule is not None:
        saved = parts.schedule.state_dict()
        schedule = {"version": saved["version"], "step": saved["step"]}
        for kind in _OF_LAYERS:
            tensors.update((f"schedule.{kind}.{layer}", tensor) for layer, tensor in saved[kind].items())
    random, random_meta = rng_state()
    tensors.update((f"rng.{name}", tensor) for name, tensor in random.items())
    meta = {
        "version": _VERSION,
        "optimizer": type(parts.optimizer).__name__,
        **position._asdict(),
        "schedule": schedule,
        "rng": random_meta,
    }
    return tensors, meta


@torch.no_grad()
def read_state(
    parts: State, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], total_steps: int
) -> tuple[Position, Rng]:
    """Puts everything in its place but the position and the random numbers, which are returned."""
    position = _checked_position(meta, parts, total_steps)
    groups: dict[str, dict[str, Tensor]] = {"optimizer": {}, "objective": {}, "schedule": {}, "rng": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind not in groups:
            raise ValueError(f"{_OP}: there is a tensor {name!r}; expected {', '.join(groups)}")
        groups[kind][rest] = tensor
    optimizer = _checked_optimizer(parts, groups["optimizer"])
    own = parts.objective.state_dict()
    _check_same(own, groups["objective"], "objective")
    if parts.schedule is not None:
        parts.schedule.load_state_dict(_schedule_state(groups["schedule"], meta))
    for name, tensor in own.items():
        tensor.copy_(groups["objective"][name])
    parts.optimizer.state.clear()
    for parameter, values in optimizer.items():
        parts.optimizer.state[parameter] = values
    return position, (groups["rng"], meta["rng"])


def _checked_position(meta: Mapping[str, Any], parts: State, total_steps: int) -> Position:
    kind = type(parts.optimizer).__name__
    for key, expected in (("version", _VERSION), ("optimizer", kind), ("total_steps", total_steps)):
        if meta.get(key) != expected:
            raise ValueError(f"{_OP}: the state has {key} {meta.get(key)!r}; expected {expected!r}, as this stage's")
    if (meta.get("schedule") is None) != (parts.schedule is None):
        raise ValueError(f"{_OP}: only one of the state and this stage has a pruning schedule")
    numbers = [meta.get(key) for key in Position._fields]
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        raise ValueError(f"{_OP}: the state's position is {numbers}; expected numbers from 0 on")
    if not isinstance(meta.get("rng"), Mapping):
        raise ValueError(f"{_OP}: the state lacks the random number generators")
    return Position(*numbers)  # type: ignore[arg-type]


def _checked_optimizer(parts: State, tensors: Mapping[str, Tensor]) -> dict[nn.Parameter, dict[str, Tensor]]:
    """By parameter, on its device and in its memory layout."""
    keys = _KEYS[type(parts.optimizer).__name__]
    found: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, saved in tensors.items():
        key, _, of = name.partition(".")
        parameter = parts.parameters.get(of)
        if key not in keys or parameter is None:
            raise ValueError(f"{_OP}: the optimizer has nothing for {name!r}; is it the state of another model?")
        like = torch.zeros((), device=parameter.device) if key == "step" else torch.empty_like(parameter)
        if saved.shape != like.shape or saved.dtype != like.dtype:
            raise ValueError(
                f"{_OP}: the optimizer's {name} is {saved.dtype} {tuple(saved.shape)}; expected {like.dtype} "
                f"{tuple(like.shape)}"
            )
        found.setdefault(parameter, {})[key] = like.copy_(saved)
    for name, parameter in parts.parameters.items():
        if parameter in found and len(found[parameter]) != len(keys):
            raise ValueError(f"{_OP}: the optimizer lacks a part of {', '.join(keys)} for {name!r}")
    return found


def _check_same(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    if own.keys() != saved.keys():
        off = sorted(own.keys() ^ saved.keys())[0]
        raise ValueError(f"{_OP}: {what}.{off} is in only one of the state and this stage")
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            raise ValueError(
                f"{_OP}: {what}.{name} is {saved[name].dtype} {tuple(saved[name].shape)}; expected {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )


def _schedule_state(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {kind: {} for kind in _OF_LAYERS} | dict(meta["schedule"])
    for name, tensor in tensors.items():
        kind, _, layer = name.partition(".")
        if kind not in _OF_LAYERS:
            raise ValueError(f"{_OP}: the schedule has no {name!r}; expected {', '.join(_OF_LAYERS)}")
        state[kind][layer] = tensor
    return state


class LiveBuffers:
    """The buffers that a forward changes (batch norm's statistics), as they were before it.

    Which these are is seen at the first step, by their values (batch norm moves no version counter); a model without
    any costs nothing from then on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._live: list[Tensor] | None = None
        self._saved: list[Tensor] = []
        self._known = False  # whether _live are only those that change

    def save(self) -> None:
        """To be called before each step's forward."""
        if self._live or not self._known:
            self._save()

    @torch.no_grad()
    def _save(self) -> None:
        if self._live is None:
            self._live = [b for b in self._model.buffers() if b.dtype is not torch.bool and not b.is_inference()]
            self._saved = [b.clone() for b in self._live]
            return
        if not self._known:
            changed = [pair for pair in zip(self._live, self._saved, strict=True) if not torch.equal(*pair)]
            self._live, self._saved = [b for b, _ in changed], [s for _, s in changed]
            self._known = True
        for saved, buffer in zip(self._saved, self._live, strict=True):
            saved.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """After a forward that is not to count."""
        for saved, buffer in zip(self._saved, self._live or [], strict=True):
            buffer.copy_(saved)
