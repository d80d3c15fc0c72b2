"""A trainer that is stopped, saved, loaded by another and gone on with ends bit for bit as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pycompress.pruning.schedule import PruningSchedule
from pycompress.recipe.sections import Distillation, Hidden, Train
from pycompress.workflow.batches import EpochBatches, first_batch
from pycompress.workflow.objective import Objective
from pycompress.workflow.rng import seed_all
from pycompress.workflow.trainer import Trainer, TrainingError
from tests.workflow_models import net

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 24
Make = Callable[[], tuple[nn.Module, Trainer]]


class Jitter(TensorDataset):
    """Augments with torch's generator, from which dropout draws too."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape), y


def shuffled() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(50, 12, generator=generator), torch.randint(5, (50,), generator=generator)
    return DataLoader(Jitter(images, labels), batch_size=8, shuffle=True)


def dropping(seed: int = 0, width: int = 16) -> nn.Sequential:
    first, relu, last = net(seed, width=width)
    return nn.Sequential(first, nn.BatchNorm1d(width), relu, nn.Dropout(0.3), last)


def make(
    train: dict[str, Any], *, d: Distillation | None = None, prune: dict[str, Any] | None = None, width: int = 16
) -> Make:
    def made() -> tuple[nn.Module, Trainer]:
        model, teacher, data = dropping(), dropping(1, width), shuffled()
        objective = Objective.make(d, model, teacher if d else None, None, first_batch(data), seed=4)
        trainer = Trainer(
            model, Train(steps=STEPS, lr=0.02, **train), objective, EpochBatches(data, seed=7, stage=2),
            make_schedule=(lambda optimizer: PruningSchedule(model, optimizer, **prune)) if prune else None,
        )  # fmt: skip
        return model, trainer

    return made


PRUNE = {"sparsity": 0.8, "end": 18, "every": 3}
CASES: dict[str, Make] = {
    "adamw": make({"weight_decay": 0.1, "warmup": 4}),
    "sgd": make({"optimizer": "sgd", "momentum": 0.9, "schedule": "cosine"}),
    "all at once": make(
        {"accumulate": 2, "autocast": "bfloat16", "clip_norm": 0.5, "freeze": ("0",)},
        d=Distillation(alpha=0.4, hidden=Hidden(layers={"0": "0"})), prune={**PRUNE, "skip": "0"}, width=24,
    ),
    "regrow": make({"optimizer": "sgd", "clip_norm": 1.0}, prune={**PRUNE, "regrow": 0.4, "begin": 1}),
    "movement": make({"optimizer": "adam"}, prune={**PRUNE, "method": "movement", "begin": 1}),
    "random": make({}, d=Distillation(), prune={**PRUNE, "method": "random", "pattern": "4x1", "seed": 3}),
    "dense": make({}, prune={**PRUNE, "gradient": "dense"}),
}  # fmt: skip


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def through_a_file(path: Path, model: nn.Module, trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    tensors, meta = trainer.state()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors_of(model).items()}, path / "model")
    save_file(tensors, path / "trainer")
    return load_file(path / "model"), load_file(path / "trainer"), json.loads(json.dumps(meta, allow_nan=False))


def resume(made: Make, saved: tuple[dict[str, Tensor], dict[str, Tensor], Any]) -> tuple[nn.Module, Trainer]:
    model, trainer = made()
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(saved[0][name])
    trainer.load_state(saved[1], saved[2])
    return model, trainer


@pytest.mark.parametrize("case", CASES)
def test_bit_exact_from_any_step(case: str, tmp_path: Path) -> None:
    made = CASES[case]
    seed_all(1)
    whole, trainer = made()
    expected: list[tuple[Any, ...]] = []
    trainer.run(lambda info: expected.append((info.step, info.loss, info.floats(), info.lr, info.sparsity)))
    assert len(expected) == STEPS
    for stop in (1, 6, 7, 13, 19, STEPS - 1):
        seed_all(stop)  # what another process begins with
        model, trainer = made()
        summary = trainer.run(lambda info, stop=stop: info.step < stop)  # type: ignore[misc]
        assert (summary.finished, summary.steps) == (False, stop)
        saved = through_a_file(tmp_path, model, trainer)
        seed_all(100 + stop)
        model, trainer = resume(made, saved)
        found: list[tuple[Any, ...]] = []
        summary = trainer.run(
            lambda info, found=found: found.append((info.step, info.loss, info.floats(), info.lr, info.sparsity))  # type: ignore[misc]
        )
        assert summary.finished
        assert found == expected[stop:]
        for name, tensor in tensors_of(whole).items():
            assert torch.equal(tensor, tensors_of(model)[name]), (stop, name)


def test_a_checkpoint_of_a_resumed_run(tmp_path: Path) -> None:
    """Saved in on_step, at every step, each by a trainer of its own."""
    made = CASES["all at once"]
    whole, trainer = made()
    trainer.run(lambda info: None)
    model, trainer = made()
    for step in range(1, STEPS + 1):
        saved: list[Any] = []

        def keep(info: Any, model: nn.Module = model, trainer: Trainer = trainer, saved: list[Any] = saved) -> bool:
            saved.append(through_a_file(tmp_path, model, trainer))
            return False

        assert trainer.run(keep).steps == step
        model, trainer = resume(made, saved[0])
    assert trainer.run(lambda info: None).finished
    assert all(torch.equal(t, tensors_of(model)[name]) for name, t in tensors_of(whole).items())


def test_going_on_without_saving() -> None:
    made = CASES["all at once"]
    whole, trainer = made()
    trainer.run(lambda info: None)
    model, trainer = made()
    while not trainer.run(lambda info: info.step % 5 != 0).finished:
        pass
    assert all(torch.equal(t, tensors_of(model)[name]) for name, t in tensors_of(whole).items())


def test_writing_a_state_changes_nothing() -> None:
    made = CASES["regrow"]
    whole, trainer = made()
    trainer.run(lambda info: None)
    model, watched = made()
    watched.run(lambda info: watched.state() and None)
    assert all(torch.equal(t, tensors_of(model)[name]) for name, t in tensors_of(whole).items())


# ---- states that do not fit -----------------------------------------------------------------------------------


def damaged(saved: Any, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, meta = dict(saved[1]), dict(saved[2])
    for key, value in changes.items():
        if key in meta:
            meta[key] = value
        elif value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors, meta


def test_states_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    made = CASES["all at once"]
    model, trainer = made()
    trainer.run(lambda info: info.step < 5)
    saved = through_a_file(tmp_path, model, trainer)
    projection = next(name for name in saved[1] if name.startswith("objective."))
    mask = next(name for name in saved[1] if name.startswith("schedule.masks"))
    moment = "optimizer.exp_avg.4.weight"
    fresh, other = made()
    before = [p.clone() for p in (*fresh.parameters(), *other._objective.parameters())]
    for changes, said in (
        ({"version": 2}, "version 2; expected 1"),
        ({"optimizer": "SGD"}, "optimizer 'SGD'; expected 'AdamW'"),
        ({"total_steps": 9}, "total_steps 9; expected 24"),
        ({"schedule": None}, "only one of the state and this stage has a pruning schedule"),
        ({"step": -1}, "position is"),
        ({"rng": None}, "lacks the random number generators"),
        ({moment: saved[1][moment][1:]}, r"exp_avg\.4\.weight is torch.float32 \(4, 16\); expected"),
        ({moment: None}, "lacks a part of exp_avg, exp_avg_sq, step for '4.weight'"),
        ({"optimizer.exp_avg.9.weight": saved[1][moment]}, "has nothing for 'exp_avg.9.weight'"),
        ({"else": saved[1][moment]}, "there is a tensor 'else'"),
        ({projection: None}, "is in only one of the state and this stage"),
        ({projection: saved[1][projection].double()}, "is torch.float64"),
        ({mask: None}, "masks are not of this schedule's layers"),
        ({mask: saved[1][mask][1:]}, "mask bits of layer"),
        ({"schedule.odd.1": saved[1][mask]}, "the schedule has no 'odd.1'"),
    ):
        with pytest.raises(ValueError, match=said):
            other.load_state(*damaged(saved, **changes))  # type: ignore[arg-type]
        assert other.step == 0
        assert not other._optimizer.state
        after = [*fresh.parameters(), *other._objective.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    tensors, meta = damaged(saved)
    tensors["rng.torch"] = tensors["rng.torch"][1:]
    other.load_state(tensors, meta)
    with pytest.raises(ValueError, match="random number generators is damaged"):
        other.run(lambda info: None)


def test_other_data_is_noticed() -> None:
    model, trainer = CASES["adamw"]()
    trainer.run(lambda info: info.step < 6)
    tensors, meta = trainer.state()
    data = list(shuffled())[:2]
    objective = Objective.make(None, model, None, None, data[0])
    other = Trainer(model, Train(steps=STEPS, lr=0.02), objective, EpochBatches(data, seed=7))
    other.load_state(tensors, meta)
    with pytest.raises(ValueError, match="gave 2 batches in epoch 0, where 6 were given"):
        other.run(lambda info: None)


def test_after_a_failure_the_state_is_that_of_the_step_before(tmp_path: Path) -> None:
    """What is saved then goes on as if nothing had happened, once the cause is gone."""
    bad = {"now": False}

    def made(bad: dict[str, bool] = bad) -> tuple[nn.Module, Trainer]:
        model, data = dropping(), shuffled()

        def loss_fn(output: Tensor, batch: Any) -> Tensor:
            loss = nn.functional.cross_entropy(output, batch[1])
            return loss * torch.nan if bad["now"] else loss

        objective = Objective.make(None, model, None, loss_fn, first_batch(data))
        return model, Trainer(model, Train(steps=9), objective, EpochBatches(data, seed=7))

    whole, trainer = made()
    trainer.run(lambda info: None)
    model, trainer = made()
    saved: list[Any] = []

    def keep(info: Any) -> None:
        saved[:] = [through_a_file(tmp_path, model, trainer)]
        bad["now"] = info.step == 4

    with pytest.raises(TrainingError, match="at step 5 of 9"):
        trainer.run(keep)
    assert all(torch.equal(saved[0][0][name], tensor) for name, tensor in tensors_of(model).items())
    bad["now"] = False
    model, trainer = resume(made, saved[0])
    trainer.run(lambda info: None)
    assert all(torch.equal(t, tensors_of(model)[name]) for name, t in tensors_of(whole).items())
