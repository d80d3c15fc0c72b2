"""The training loop of the workflow: what a step is, and what is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pycompress.nn import DistillationLoss
from pycompress.pruning.schedule import PruningSchedule
from pycompress.recipe.sections import Distillation, Hidden, Train
from pycompress.workflow.optimiser import LearningRate, clip_norm_, frozen_names, total_steps
from pycompress.workflow.trainer import StepInfo
from tests.trainer_helpers import go_on, pairs, same, trainer_of, weights
from tests.workflow_models import Encoder, net, token_batch

pytestmark = pytest.mark.usefixtures("one_thread")



# ---- a step is a hand-written one -----------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, betas=(0.8, 0.95)),
    "adam": lambda groups: torch.optim.Adam(groups, 0.01, betas=(0.8, 0.95)),
    "sgd": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.7),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_hand_written_loop_gives_the_same_weights(optimizer: Any) -> None:
    """Distillation, decay groups, clipping, the learning rate and a pruning schedule, in their order."""
    options: dict[str, Any] = {"betas": (0.8, 0.95)} if optimizer != "sgd" else {"momentum": 0.7}
    train = Train(steps=12, optimizer=optimizer, lr=0.01, weight_decay=0.1, clip_norm=0.5, warmup=3, **options)
    prune = {"sparsity": 0.6, "begin": 2, "end": 9, "every": 2}
    teacher, student = net(1), net(0)
    trainer = trainer_of(
        student, train, d=Distillation(alpha=0.3, tau=3.0), teacher=teacher,
        make_schedule=lambda made: PruningSchedule(student, made, **prune),
    )  # fmt: skip
    losses = []
    summary = trainer.run(lambda info: losses.append((info.loss, info.lr)))
    assert summary.finished
    assert summary.steps == 12
    assert summary.loss == losses[-1][0]

    hand = net(0)
    groups = [[p for p in hand.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    made = OPTIMIZERS[optimizer](
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    )
    schedule = PruningSchedule(hand, made, **prune)
    loss_fn = DistillationLoss(3.0, 0.3)
    for step in range(1, 13):
        x, y = pairs()[(step - 1) % 5]
        with torch.no_grad():
            told = teacher(x)
        loss = loss_fn(hand(x), told, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
        for group in made.param_groups:
            group["lr"] = 0.01 * step / 3 if step < 3 else 0.01 * (13 - step) / 10
        made.step()
        schedule.step()
        made.zero_grad()
        assert losses[step - 1] == (pytest.approx(loss.item(), rel=1e-5), pytest.approx(made.param_groups[0]["lr"]))
    for a, b in zip(student.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert trainer.sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("d", [None, Distillation(alpha=0.4, hidden=Hidden())])
def test_accumulation_equals_the_big_batch(d: Distillation | None) -> None:
    """Batches of different lengths, with different numbers of labels."""
    big = token_batch(10, 6)
    small = [{key: x[a:b] for key, x in big.items()} for a, b in ((0, 1), (1, 4), (4, 10))]
    results = []
    for accumulate, batches in ((1, [big]), (3, small)):
        model = Encoder()
        train = Train(steps=2, optimizer="sgd", lr=0.5, accumulate=accumulate, clip_norm=0.7)
        losses: list[float] = []
        trainer = trainer_of(model, train, d=d, teacher=Encoder(seed=1), batches=batches)
        trainer.run(lambda info, losses=losses: losses.append(info.loss))  # type: ignore[misc]
        results.append((model, losses))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_batches_run_on_across_epochs() -> None:
    seen = []
    trainer = trainer_of(
        net(), Train(epochs=2.0, accumulate=2),
        loss_fn=lambda output, batch: (seen.append(int(batch[1][0])), output.square().mean())[1],
        batches=[(torch.ones(1, 12), torch.tensor([i])) for i in range(3)],
    )  # fmt: skip
    seen.clear()
    assert trainer.total_steps == 3
    trainer.run(go_on)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_autocast_is_for_student_and_teacher() -> None:
    dtypes: list[torch.dtype] = []
    student, teacher = net(0), net(1)
    trainer = trainer_of(student, Train(steps=1, autocast="bfloat16"), d=Distillation(), teacher=teacher)
    handles = [
        model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        for model in (student, teacher)
    ]
    trainer.run(go_on)
    assert dtypes == [torch.bfloat16] * 2
    assert all(p.dtype is torch.float32 for p in student.parameters())
    del handles


def test_modes_flags_and_gradients_are_as_before() -> None:
    student = nn.Sequential(net(0), nn.Dropout(0.5))
    student[0].eval()
    student[0][0].bias.requires_grad_(False)
    teacher = nn.Sequential(net(1), nn.Dropout(0.5))
    before = student[0][0].bias.clone()
    trainer = trainer_of(student, Train(steps=2, freeze=("0.2",)), d=Distillation(), teacher=teacher)

    def look(info: StepInfo) -> None:
        assert student[0].training
        assert not teacher[1].training
        assert not student[0][2].weight.requires_grad

    trainer.run(look)
    assert [student.training, student[0].training, teacher[1].training] == [True, False, True]
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == ["0.0.bias"]
    assert torch.equal(student[0][0].bias, before)
    assert all(p.grad is None for p in student.parameters())


def test_projections_are_trained() -> None:
    d = Distillation(loss="none", alpha=0.0, hidden=Hidden(layers={"0": "0"}))
    student = net(0, width=8)
    trainer = trainer_of(student, Train(steps=3, lr=0.1), d=d, teacher=net(1, width=24))
    (projection,) = trainer._objective.parameters()
    before = projection.detach().clone()
    trainer.run(go_on)
    assert not torch.equal(before, projection)


# ---- learning rate --------------------------------------------------------------------------------------------


def rates(steps: int, **options: Any) -> list[float]:
    rate = LearningRate.make(Train(steps=steps, lr=1.0, **options), steps)
    return [rate.at(step) for step in range(1, steps + 1)]


def test_learning_rates() -> None:
    assert rates(5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert rates(4, schedule="constant", warmup=2) == [0.5, 1, 1, 1]
    assert rates(5, warmup=2, final_lr=0.2) == pytest.approx([0.5, 1, 0.8, 0.6, 0.4])
    assert rates(5, schedule="cosine") == pytest.approx([(1 + math.cos(math.pi * p / 5)) / 2 for p in range(5)])
    assert rates(10, warmup=0.3) == rates(10, warmup=3)
    assert rates(1) == [1]
    assert rates(3, warmup=1.0) == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("final", [0.0, 0.1, 1 / 3])
def test_ends(schedule: Any, warmup: int, final: float) -> None:
    found = rates(40, schedule=schedule, warmup=warmup, final_lr=final)
    assert found[max(warmup, 1) - 1] == 1.0
    assert final < found[-1] < final + 0.05, "the last step still trains, and the next would have the final rate"
    rate = LearningRate.make(Train(steps=40, lr=1.0, schedule=schedule, warmup=warmup, final_lr=final), 40)
    assert rate.at(41) == pytest.approx(final)
    falling = found[max(warmup, 1) - 1 :]
    assert falling == sorted(falling, reverse=True)


def test_a_warmup_longer_than_the_stage() -> None:
    with pytest.raises(ValueError, match="warmup=9 leaves none of 5 steps"):
        trainer_of(net(), Train(epochs=1, warmup=9))


def test_epochs_to_steps() -> None:
    for epochs, batches, accumulate, steps in (
        (1, 10, 1, 10), (2.5, 10, 1, 25), (0.1, 30, 1, 3), (0.01, 10, 1, 1), (1, 10, 4, 3), (3, 7, 1, 21),
    ):  # fmt: skip
        assert total_steps(Train(epochs=epochs, accumulate=accumulate), batches) == steps


# ---- what is trained ------------------------------------------------------------------------------------------


def test_frozen_modules_stay() -> None:
    model = net(0)
    before = weights(model)
    trainer_of(model, Train(steps=3, lr=0.1, freeze=("0",))).run(go_on)
    after = weights(model)
    assert same(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


def test_freeze_patterns() -> None:
    model = Encoder()
    model.tied = model.embed
    assert frozen_names(model, ["blocks.*"]) == {f"blocks.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert frozen_names(model, ["tied"]) == {"embed.weight"}
    assert frozen_names(model, ["head.bias"]) == {"head.bias"}
    with pytest.raises(ValueError, match=r"freeze='bloks' matches no module.*; the closest names are 'blocks'"):
        trainer_of(model, Train(steps=1, freeze=("bloks",)), batches=[token_batch(3, 5)])
    with pytest.raises(ValueError, match="no parameter to train: freeze covers them all"):
        trainer_of(net(), Train(steps=1, freeze=("*",)))
    with pytest.raises(ValueError, match="no parameter to train: all have requires_grad=False"):
        trainer_of(net().requires_grad_(False), Train(steps=1), loss_fn=lambda output, batch: output.sum())


def test_shared_parameters_are_stepped_once() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 12)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    hand = copy.deepcopy(model)
    batch = (torch.randn(4, 12), torch.randint(12, (4,)))
    trainer_of(model, Train(steps=1, optimizer="sgd", lr=0.1, schedule="constant"), batches=[batch]).run(go_on)
    functional.cross_entropy(hand(batch[0]), batch[1]).backward()
    for a, b in zip(model.parameters(), hand.parameters(), strict=True):
        assert b.grad is not None
        torch.testing.assert_close(a, b - 0.1 * b.grad, rtol=1e-5, atol=1e-7)


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 5))
    trainer = trainer_of(model, Train(steps=1, weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in trainer._optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.3, 0, 0, 0, 0.3, 0]


# ---- clipping -------------------------------------------------------------------------------------------------


def test_regrowths_dense_gradient_counts_nothing_in_the_norm() -> None:
    model = net(0)
    schedule = PruningSchedule(model, sparsity=0.5, end=10, every=5, kind="constant", regrow=0.3)
    norms, x, y = {}, *pairs()[0]
    for kind in ("masked", "dense"):
        for layer in schedule.layers.values():
            layer.gradient = kind
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        plain = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norms[kind] = float(clip_norm_(list(model.parameters()), 0.1, schedule))
        kept = [layer.weight.grad[layer.mask] for layer in schedule.layers.values() if layer.weight.grad is not None]
        biases = [p.grad for p in model.parameters() if p.dim() == 1 and p.grad is not None]
        assert float(torch.nn.utils.get_total_norm([*kept, *biases])) == pytest.approx(0.1, rel=1e-4)
    assert norms["masked"] == pytest.approx(norms["dense"], rel=1e-5)
    assert float(plain) > 1.1 * norms["dense"]
