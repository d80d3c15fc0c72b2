"""PruningSchedule: scores from gradients, the optimizer's state, regrowth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pycompress.pruning.patterns import Pattern
from pycompress.pruning.prune import prune_
from pycompress.pruning.regrow import regrow_fraction, regrow_mask
from pycompress.pruning.schedule import PruningSchedule
from tests.schedule_helpers import OPTIMIZERS, batch, net, train, weights_of

# ---- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["movement", "taylor"])
def test_gradient_scores_add_up(method: str) -> None:
    """The mask at `end` is that of sums kept by hand over every step, changes or not."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    schedule = PruningSchedule(model, optimizer, sparsity=0.5, begin=6, kind="one_shot", method=method)
    sums = [torch.zeros(16, 12), torch.zeros(8, 16)]
    for step in range(1, 7):
        optimizer.zero_grad()
        x, target = batch(step)
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        for total, layer in zip(sums, (model[0], model[2]), strict=True):
            product = layer.weight.detach() * layer.weight.grad
            total += -product if method == "movement" else product.abs()
        schedule.step()
    for total, layer in zip(sums, (model[0], model[2]), strict=True):
        assert torch.equal(layer.mask, total > total.flatten().sort().values[total.numel() // 2 - 1])


@pytest.mark.parametrize("gradient", ["masked", "dense"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_movement_with_growing_sparsity(scope: str, gradient: str) -> None:
    """Signed scores: what is pruned stays below whatever a kept weight has; behind dense masks it may come back."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    schedule = PruningSchedule(
        model,
        optimizer,
        sparsity=0.9,
        begin=1,
        end=20,
        method="movement",
        scope=scope,
        gradient=gradient,
        pattern="1x2",
    )
    before: dict[str, Tensor] = {}
    revived = 0

    def check(step: int) -> None:
        nonlocal revived
        rows = schedule.report().pruned
        assert sum(row.pruned_units for row in rows) == sum(
            [round(schedule.sparsity_at(step) * n) for n in ([160] if scope == "global" else [96, 64])]
        )
        for name, layer in weights_of(model).items():
            if name in before:
                revived += int((layer.mask & ~before[name]).sum())
            before[name] = layer.mask.clone()

    train(model, optimizer, schedule, range(1, 21), check)
    assert (revived > 0) == (gradient == "dense")


def test_without_gradients_a_clear_error_and_no_step() -> None:
    for options in ({"method": "movement"}, {"regrow": 0.3, "kind": "constant"}):
        model = net()
        schedule = PruningSchedule(model, sparsity=0.5, begin=1, end=9, **options)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r"before zero_grad\(\)"):
            schedule.step()
        assert schedule.step_count == 0
        assert schedule.sparsity == 0


def test_overflown_gradients_count_nothing() -> None:
    """As GradScaler leaves them, when it skips the optimizer's step."""
    model = net()
    schedule = PruningSchedule(model, sparsity=0.5, begin=2, end=4, kind="constant", method="movement", regrow=0.5)
    for value in (1.0, math.inf, math.nan, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        schedule.step()
        assert all(torch.isfinite(total).all() for total in schedule._sums.values())
    assert schedule.sparsity == 0.5


def test_nan_weights_are_an_error_and_no_step() -> None:
    model = net()
    schedule = PruningSchedule(model, sparsity=0.5, end=4)
    schedule.step()
    with torch.no_grad():
        model[0].weight[tuple(model[0].mask.nonzero()[0])] = math.nan
    masks = [layer.mask.clone() for layer in weights_of(model).values()]
    with pytest.raises(ValueError, match="layer '0'"):
        schedule.step()
    assert schedule.step_count == 1
    with pytest.raises(ValueError, match="weight holds NaN or Inf"):
        PruningSchedule(model, end=9, begin=5)
    assert all(torch.equal(a, b.mask) for a, b in zip(masks, weights_of(model).values(), strict=True))


# ---- the optimizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regrow", [0.0, 0.4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_cleared_and_zeros_stay_zero(name: str, regrow: float) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = PruningSchedule(model, optimizer, sparsity=0.7, begin=4, end=16, every=4, regrow=regrow)
    before = {n: layer.mask.clone() for n, layer in weights_of(model).items()}
    grown = 0

    def check(step: int) -> None:
        nonlocal grown
        for n, layer in weights_of(model).items():
            gone = ~layer.mask
            assert not layer.weight[gone].any()
            fresh = layer.mask & ~before[n]
            grown += int(fresh.sum())
            assert not layer.weight[fresh].any()
            if schedule.plan.changes(step):
                tensors = [t for t in optimizer.state[layer.weight].values() if isinstance(t, Tensor)]
                tensors = [t for t in tensors if t.shape == layer.weight.shape]
                assert tensors
                assert any(bool(t.any()) for t in tensors), "what is kept keeps its state"
                for tensor in [*tensors, layer.weight.grad]:
                    assert not tensor[gone | fresh].any()
            before[n] = layer.mask.clone()

    train(model, optimizer, schedule, range(1, 30), check)
    assert (grown > 0) == (regrow > 0)
    assert [row.pruned_units for row in schedule.report().pruned] == [round(0.7 * 192), round(0.7 * 128)]


def test_without_the_schedule_momentum_would_have_moved_them() -> None:
    """What is cleared is worth clearing: the same run with the state left alone ends elsewhere."""

    def run(optimizer_seen: bool) -> Tensor:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        schedule = PruningSchedule(
            model,
            optimizer if optimizer_seen else None,
            sparsity=0.5,
            begin=3,
            end=12,
            every=3,
            kind="constant",
            regrow=0.5,
        )
        train(model, optimizer, schedule, range(1, 13))
        weight: Tensor = model[0].weight.detach()
        return weight

    assert not torch.equal(run(True), run(False))


def test_bad_optimizers() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        PruningSchedule(model, "adam", end=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no weight of the layers"):
        PruningSchedule(model, torch.optim.SGD(net().parameters(), 0.1), end=3)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("options", [{"method": "movement"}, {"regrow": 0.3}])
def test_frozen_layers_have_no_gradient_to_rank_by(options: dict[str, Any]) -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="layer '2' is frozen"):
        PruningSchedule(model, end=5, **options)
    schedule = PruningSchedule(model, end=5, skip="2", **options)
    assert list(schedule.layers) == ["0"]
    assert PruningSchedule(net(), end=5, seed=2**62, method="random").step()


def test_conv1d_needs_its_new_parameter() -> None:
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(8, 6))
    with pytest.raises(ValueError, match="is a Conv1D"):
        PruningSchedule(model, torch.optim.SGD(model.parameters(), 0.1), end=3)
    prune_(model, 0.0)
    schedule = PruningSchedule(model, torch.optim.SGD(model.parameters(), 0.1), sparsity=0.5, end=1)
    schedule.step()
    assert model[0].sparsity == 0.5


# ---- regrowth -------------------------------------------------------------------------------------------------


def test_regrow_fraction_is_the_papers() -> None:
    assert regrow_fraction(0.3, 0) == 0.3
    assert math.isclose(regrow_fraction(0.3, 0.5), 0.15)
    assert regrow_fraction(0.3, 1) == 0


def test_regrow_drops_the_lowest_and_grows_the_steepest() -> None:
    mask = torch.tensor([[True, True, True, True, False, False, False, False]])
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, -1, -1, -1, -1]])
    gradient = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, -9.0, 2.0, -3.0]])
    new = regrow_mask(Pattern.parse("unstructured"), mask, scores, gradient, 0.5)
    assert new.tolist() == [[True, False, True, False, False, True, False, True]]
    assert regrow_mask(Pattern.parse("unstructured"), mask, scores, gradient * math.nan, 0.5) is mask
    gradient[0, 1] = 10.0  # dropped and grown again
    new = regrow_mask(Pattern.parse("unstructured"), mask, scores, gradient, 0.5)
    assert new.tolist() == [[True, True, True, False, False, True, False, False]]


@settings(deadline=None, max_examples=60)
@given(
    pattern=st.sampled_from(["unstructured", "2x3", "4x1", "row", "column"]),
    shape=st.tuples(st.integers(4, 9), st.integers(3, 9)),
    sparsity=st.floats(0, 1),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_regrow_keeps_the_sparsity(
    pattern: str, shape: tuple[int, int], sparsity: float, fraction: float, seed: int
) -> None:
    torch.manual_seed(seed)
    parsed = Pattern.parse(pattern)
    mask = parsed.mask_from_scores(torch.rand(shape), sparsity)
    new = regrow_mask(parsed, mask, torch.rand(shape), torch.randn(shape), fraction)
    units = [parsed.unit_scores(m.float()) > 0 for m in (mask, new)]
    assert units[0].sum() == units[1].sum()
    assert torch.equal(parsed.spread(units[1], mask.shape), new)


@pytest.mark.parametrize("pattern", ["unstructured", "4x4", "row"])
def test_regrowth_while_training(pattern: str) -> None:
    """RigL proper: constant sparsity, masks that move, the dense gradient in the backward before a change alone."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = PruningSchedule(
        model, optimizer, sparsity=0.5, end=20, every=5, kind="constant", regrow=0.5, pattern=pattern
    )
    layers, moved = weights_of(model), 0
    before = {name: layer.mask.clone() for name, layer in layers.items()}

    def check(step: int) -> None:
        nonlocal moved
        for name, layer in layers.items():
            assert layer.gradient == ("dense" if (step + 1) in (5, 10, 15) else "masked")
            assert layer.sparsity == 0.5
            moved += int((layer.mask != before[name]).sum())
            assert (not torch.equal(layer.mask, before[name])) <= (step in (5, 10, 15))
            before[name] = layer.mask.clone()

    train(model, optimizer, schedule, range(1, 25), check)
    assert moved > 0


def test_regrowth_beats_the_first_mask() -> None:
    """The one input that matters is pruned at first; regrowth finds it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.01, 1, 1, 1, 1, 1, 1, 1]]))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    schedule = PruningSchedule(model, optimizer, sparsity=0.75, end=40, every=4, kind="constant", regrow=1.0)
    assert not model[0].mask[0, 0]
    for _ in range(60):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), 3 * x[:, :1]).backward()
        optimizer.step()
        schedule.step()
    assert model[0].mask[0, 0]
    assert abs(model[0].weight[0, 0].item() - 3) < 0.5
