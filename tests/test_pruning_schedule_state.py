"""PruningSchedule: resuming from a saved state, and several processes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress.pruning.schedule import PruningSchedule
from tests.schedule_helpers import OPTIMIZERS, net, train, weights_of

# ---- state ----------------------------------------------------------------------------------------------------

TRAJECTORIES: dict[str, dict[str, Any]] = {
    "magnitude": {"end": 14, "every": 3},
    "movement": {"begin": 2, "end": 14, "every": 3, "method": "movement"},
    "taylor global": {"begin": 2, "end": 14, "every": 3, "method": "taylor", "scope": "global", "pattern": "4x1"},
    "random": {"end": 14, "method": "random", "pattern": "1x4"},
    "regrow": {"end": 14, "every": 2, "kind": "constant", "regrow": 0.4},
    "dense": {"end": 14, "gradient": "dense", "method": "movement", "begin": 1},
    "2:4": {"end": 14, "pattern": "2:4"},
}


@pytest.mark.parametrize("name", TRAJECTORIES)
@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
def test_resuming_goes_on_exactly(name: str, optimizer_name: str) -> None:
    options = dict(TRAJECTORIES[name])
    options.setdefault("sparsity", None if name == "2:4" else 0.8)

    def start(seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer, PruningSchedule]:
        model = net(seed)
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        return model, optimizer, PruningSchedule(model, optimizer, **options)

    def trace(step: int) -> None:
        masks = [layer.mask.clone() for layer in weights_of(model).values()]
        seen.append([p.detach().clone() for p in model.parameters()] + masks)

    seen: list[list[Tensor]] = []
    model, optimizer, schedule = start(0)
    train(model, optimizer, schedule, range(1, 8))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    train(model, optimizer, schedule, range(8, 20), trace)
    expected, seen = seen, []

    file.seek(0)
    states = torch.load(file, weights_only=True)
    model, optimizer, schedule = start(7)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    schedule.load_state_dict(states[2])
    assert schedule.step_count == 7
    train(model, optimizer, schedule, range(8, 20), trace)
    finished = schedule.state_dict()
    assert not finished["sums"]
    schedule.load_state_dict(finished)
    for a, b in zip(expected, seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert schedule.sparsity == pytest.approx(0.5 if name == "2:4" else 0.8, abs=0.01)


def test_state_takes_a_bit_a_weight() -> None:
    schedule = PruningSchedule(net(), sparsity=0.5, kind="one_shot")
    state = schedule.state_dict()
    assert {name: len(bits) for name, bits in state["masks"].items()} == {"0": 24, "2": 16}
    assert not state["sums"]
    assert not state["latent"]


def _truncated(state: dict[str, Any]) -> None:
    state["masks"]["0"] = state["masks"]["0"][:-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("step"), "none that state_dict"),
        (lambda s: s.update(version=99), "version 99"),
        (lambda s: s.update(step=-1), "step is -1"),
        (lambda s: s["masks"].pop("0"), r"masks are not of this schedule's layers \('0'\)"),
        (_truncated, r"mask bits of layer '0' are torch.uint8 \(23,\)"),
        (lambda s: s["sums"].clear(), "sums are not"),
        (lambda s: s["sums"].update({"2": torch.zeros(3)}), "sums of layer '2'"),
        (lambda s: s["latent"].update({"2": torch.zeros(3)}), "latent"),
    ],
)
def test_damaged_states_change_nothing(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = PruningSchedule(model, optimizer, sparsity=0.5, begin=1, end=5, method="movement")
    train(model, optimizer, schedule, range(1, 3))
    masks, state = [layer.mask.clone() for layer in weights_of(model).values()], schedule.state_dict()
    train(model, optimizer, schedule, range(3, 4))
    masks = [layer.mask.clone() for layer in weights_of(model).values()]
    damage(state)
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(state)
    assert schedule.step_count == 3
    assert all(torch.equal(a, b.mask) for a, b in zip(masks, weights_of(model).values(), strict=True))


def _ddp_worker(rank: int, file: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = PruningSchedule(
        model, optimizer, sparsity=0.7, begin=1, end=9, every=2, method="movement", regrow=0.4, initial_sparsity=0.2
    )
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, optimizer, schedule, range(100 * rank, 100 * rank + 12))  # each rank has other data
    masks = [layer.mask for layer in schedule.layers.values()]
    torch.save([[p.detach() for p in model.parameters()], masks], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_ranks_agree() -> None:
    """Masks follow gradients that are averaged, the dense ones of regrowth too."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_ddp_worker, (f"{folder}/store", folder), nprocs=2)
        (first, masks), (second, masks2) = (torch.load(f"{folder}/{rank}") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip([*first, *masks], [*second, *masks2], strict=True))
    assert [int((~mask).sum()) for mask in masks] == [round(0.7 * 192), round(0.7 * 128)]
