"""PruningSchedule: the plan, the masks it makes, the optimizer's state, regrowth, resuming."""

from __future__ import annotations

import copy
import io
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pycompress.nn import MaskedLinear
from pycompress.pruning.patterns import Pattern
from pycompress.pruning.prune import prune_
from pycompress.pruning.regrow import regrow_fraction, regrow_mask
from pycompress.pruning.schedule import PruningSchedule
from pycompress.pruning.schedule_plan import Plan

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(10, 12, generator=generator), torch.randn(10, 8, generator=generator)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: PruningSchedule, steps: range, each: Any = None
) -> None:
    model.train()
    for step in steps:
        optimizer.zero_grad()
        x, target = batch(step)
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        schedule.step()
        if each is not None:
            each(step)


def weights_of(model: nn.Module) -> dict[str, MaskedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


# ---- the plan -------------------------------------------------------------------------------------------------


def plan(kind: str, begin: int, end: int | None, every: int = 1, initial: float = 0.0, final: float = 0.8) -> Plan:
    return Plan.make(kind, begin, end, every, initial, final, op="test")


def test_cubic_is_the_papers() -> None:
    p = plan("cubic", 10, 110, 10, 0.1, 0.9)
    for step in range(10, 111):
        expected = 0.9 + (0.1 - 0.9) * (1 - (step - 10) / 100) ** 3
        assert math.isclose(p.sparsity(step), expected, rel_tol=1e-12)
    assert p.sparsity(9) == 0
    assert p.sparsity(110) == p.sparsity(1000) == 0.9
    assert [step for step in range(200) if p.changes(step)] == list(range(10, 111, 10))


@given(
    kind=st.sampled_from(["cubic", "linear", "constant", "one_shot"]),
    begin=st.integers(0, 50),
    length=st.integers(0, 50),
    every=st.integers(1, 60),
    final=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_plans(kind: str, begin: int, length: int, every: int, final: float, share: float) -> None:
    initial = final * share if kind in ("cubic", "linear") else 0.0
    p = plan(kind, begin, begin + length, every, initial, final)
    values = [p.sparsity(step) for step in range(begin + length + 5)]
    assert all(b >= a - 1e-15 for a, b in itertools.pairwise(values))
    assert values[begin + length :] == [final] * 5
    changes = [step for step in range(begin + length + 5) if p.changes(step)]
    assert changes[0] == begin
    assert changes[-1] == p.end
    assert p.end == (begin if kind == "one_shot" else begin + length)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quadratic", 0, 5), "unknown kind 'quadratic'"),
        (("cubic", 0, None), "needs end"),
        (("cubic", 5, 4), "end=4; expected 5"),
        (("cubic", -1, 4), "begin=-1"),
        (("cubic", 0, 4, 0), "every=0"),
        (("cubic", 0, 4, 1, 0.9, 0.8), "initial_sparsity=0.9 is above"),
        (("constant", 0, 4, 1, 0.1, 0.8), "has but one"),
        (("cubic", 0, 4, 1, -0.1, 0.8), "initial_sparsity=-0.1"),
    ],
)
def test_bad_plans(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*arguments)
    with pytest.raises(TypeError, match="whole number"):
        plan("cubic", 0, 1.5)  # type: ignore[arg-type]


# ---- masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cubic", "linear", "constant", "one_shot"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "4x4", "row", "column"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsity_follows_the_plan(kind: str, pattern: str, scope: str) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    parameters = list(model.parameters())
    schedule = PruningSchedule(
        model, optimizer, sparsity=0.75, begin=3, end=12, every=4, kind=kind, pattern=pattern, scope=scope
    )
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert schedule.sparsity == 0
    units = {name: Pattern.parse(pattern).units(m.weight.shape) for name, m in weights_of(model).items()}
    before: dict[str, Tensor] = {}

    def check(step: int) -> None:
        planned = max((s for s in range(step + 1) if schedule.plan.changes(s)), default=None)
        expected = 0.0 if planned is None else schedule.sparsity_at(planned)
        pruned = {row.name: row.pruned_units for row in schedule.report().pruned}
        if scope == "layer":
            assert pruned == {name: round(expected * count) for name, count in units.items()}
        else:
            assert sum(pruned.values()) == round(expected * sum(units.values()))
        for name, layer in weights_of(model).items():
            assert not layer.weight[~layer.mask].any()
            if name in before:
                assert not (layer.mask & ~before[name]).any(), "a pruned weight came back"
            before[name] = layer.mask.clone()

    train(model, optimizer, schedule, range(1, 16), check)
    assert schedule.step_count == schedule.plan.end
    assert f"sparsity {schedule.sparsity:.4g} of 0.75" in repr(schedule)


def test_n_of_m() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = PruningSchedule(model, optimizer, pattern="2:4", end=8)
    seen: list[float] = []
    train(model, optimizer, schedule, range(1, 10), lambda step: seen.append(schedule.sparsity))
    assert schedule.plan.final == schedule.sparsity == 0.5
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.5
    for layer in weights_of(model).values():
        assert (layer.mask.view(-1, 4).sum(1) == 2).all()
    with pytest.raises(ValueError, match="leave it out"):
        PruningSchedule(net(), sparsity=0.6, pattern="2:4", end=8)


def test_magnitude_keeps_the_largest() -> None:
    model = net()
    dense = copy.deepcopy(model)
    PruningSchedule(model, sparsity=0.5, kind="one_shot")
    for layer, old in zip(weights_of(model).values(), (dense[0], dense[2]), strict=True):
        magnitudes = old.weight.abs().flatten()
        assert torch.equal(layer.mask, old.weight.abs() >= magnitudes.sort().values[magnitudes.numel() // 2])
        assert torch.equal(layer.weight, old.weight * layer.mask)


def test_at_construction_nothing_before_begin() -> None:
    model = net()
    schedule = PruningSchedule(model, sparsity=0.5, begin=2, end=2)
    assert [schedule.step(), schedule.step(), schedule.step()] == [False, True, False]
    assert schedule.sparsity == 0.5
    assert PruningSchedule(net(), sparsity=0.5, initial_sparsity=0.25, end=5).sparsity == 0.25
    assert PruningSchedule(net(), sparsity=0.5, kind="constant", end=5).sparsity == 0.5
    assert PruningSchedule(net(), sparsity=0.5, end=5).sparsity == 0


def test_after_the_end_a_step_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    schedule = PruningSchedule(model, sparsity=0.5, end=2, method="movement")
    train(model, torch.optim.SGD(model.parameters(), 0.1), schedule, range(1, 3))
    versions = [p._version for p in model.parameters()]
    monkeypatch.setattr(schedule, "_layers", None)  # not even looked at
    assert not schedule.step()
    assert schedule.step_count == 2
    assert versions == [p._version for p in model.parameters()]


def test_masks_that_are_there_stay() -> None:
    model = net()
    prune_(model, 0.6)
    masks = {name: layer.mask.clone() for name, layer in weights_of(model).items()}
    layers = weights_of(model)
    schedule = PruningSchedule(model, sparsity=0.9, end=10)
    assert weights_of(model) == layers
    for _ in range(10):
        schedule.step()
        for name, layer in layers.items():
            assert not (layer.mask & ~masks[name]).any()
        assert schedule.sparsity >= 0.6 - 1e-2
    assert [row.pruned_units for row in schedule.report().pruned] == [round(0.9 * 192), round(0.9 * 128)]


def test_blocks_on_top_of_single_weights() -> None:
    """A block that an unstructured mask has holes in is no pruned block."""
    model = net()
    prune_(model, 0.5)
    schedule = PruningSchedule(model, sparsity=0.5, kind="one_shot", begin=1, pattern="4x4")
    schedule.step()
    blocks = model[0].mask.view(4, 4, 3, 4).transpose(1, 2).any(-1).any(-1)
    assert int(blocks.sum()) == 6
    assert not model[0].weight[~model[0].mask].any()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_floors_and_ceilings_hold_all_the_way(scope: str) -> None:
    model = net()
    schedule = PruningSchedule(
        model, sparsity=0.8, end=9, scope=scope, min_sparsity={"0": 0.5, "2": 0.3}, max_sparsity={"2": 0.7}
    )
    for _ in range(9):
        schedule.step()
        assert model[2].sparsity <= 0.7
    assert model[0].sparsity >= 0.5
    assert 0.3 <= model[2].sparsity <= 0.7
    if scope == "global":
        assert schedule.sparsity == 0.8
    with pytest.raises(ValueError, match="min_sparsity and max_sparsity of the layers allow"):
        PruningSchedule(net(), sparsity=0.8, end=9, scope="global", max_sparsity=0.7)


def test_random_is_the_seeds() -> None:
    masks = []
    for seed in (0, 0, 1):
        model = net()
        schedule = PruningSchedule(model, sparsity=0.5, end=4, method="random", seed=seed)
        for _ in range(4):
            schedule.step()
        masks.append(model[0].mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_function_as_method() -> None:
    model = net()
    schedule = PruningSchedule(model, sparsity=0.5, end=4, method=lambda name, module: -module.weight.double())
    for _ in range(4):
        schedule.step()
    for layer in weights_of(model).values():
        kept, gone = layer.weight[layer.mask], layer.mask.numel() - int(layer.mask.sum())
        assert gone == layer.mask.numel() // 2
        assert kept.max() <= net()[0 if layer is model[0] else 2].weight.median() + 1e-12


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
        model, optimizer, sparsity=0.9, begin=1, end=20, method="movement", scope=scope, gradient=gradient,
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
            model, optimizer if optimizer_seen else None, sparsity=0.5, begin=3, end=12, every=3, kind="constant",
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


# ---- arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity=1.5"),
        ({"pattern": "5"}, "unknown pattern '5'"),
        ({"pattern": "32x32"}, "needs 32 outputs"),
        ({"method": "wanda"}, "prune_ has it"),
        ({"method": "best"}, "unknown method 'best'"),
        ({"scope": "model"}, "unknown scope"),
        ({"gradient": "none"}, "unknown gradient"),
        ({"method": "movement", "kind": "constant"}, "begin at 1 or later"),
        ({"regrow": 2.0}, "regrow=2.0"),
        ({"regrow": 0.2, "gradient": "dense"}, "leave one of them out"),
        ({"regrow": 0.2, "pattern": "2:4"}, "gradient='dense'"),
        ({"regrow": 0.2, "kind": "one_shot"}, "never change again"),
        ({"skip": ["0", "2"]}, "no linear layer that could be pruned: '0' skip='0'"),
        ({"skip": "9"}, "matches no module"),
        ({"min_sparsity": {"9": 0.1}}, "is of no layer"),
    ],
)
def test_bad_arguments_change_nothing(options: dict[str, Any], message: str) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        PruningSchedule(model, torch.optim.SGD(model.parameters(), 0.1), end=5, **options)
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_skip_and_filter() -> None:
    model = net()
    schedule = PruningSchedule(model, sparsity=0.5, kind="one_shot", skip="0")
    assert list(schedule.layers) == ["2"]
    assert type(model[0]) is nn.Linear
    assert schedule.report().left[0].reason == "skip='0'"
    model = net()
    assert list(PruningSchedule(model, end=3, filter_fn=lambda name, module: name == "0").layers) == ["0"]


def test_heads() -> None:
    transformers = pytest.importorskip("transformers")
    from pycompress.pruning.shrink import shrink_

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_attention_heads=4, intermediate_size=20, num_hidden_layers=2
    )
    model = transformers.BertModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = PruningSchedule(model, optimizer, sparsity=0.5, end=6, every=2, pattern="head", min_sparsity=0.25)
    ids = torch.randint(0, 30, (2, 7))
    for _ in range(7):
        optimizer.zero_grad()
        model(ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        schedule.step()
    assert schedule.sparsity == 0.5
    model.eval()
    with torch.no_grad():
        before = model(ids).last_hidden_state
        report = shrink_(model)
        torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-5, atol=1e-5)
    assert [(row.before, row.after) for row in report.shrunk] == [(4, 2), (4, 2)]
    assert not weights_of(model)


def test_half_precision() -> None:
    model = net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = PruningSchedule(model, optimizer, sparsity=0.7, end=6, method="taylor", begin=1)
    for step in range(1, 8):
        optimizer.zero_grad()
        x, target = (tensor.bfloat16() for tensor in batch(step))
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        schedule.step()
    assert model[0].weight.dtype == torch.bfloat16
    assert [row.pruned_units for row in schedule.report().pruned] == [round(0.7 * 192), round(0.7 * 128)]
