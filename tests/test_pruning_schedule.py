"""PruningSchedule: the plan, the masks it makes, its arguments."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pycompress.pruning.patterns import Pattern
from pycompress.pruning.prune import prune_
from pycompress.pruning.schedule import PruningSchedule
from pycompress.pruning.schedule_plan import Plan
from tests.schedule_helpers import batch, net, train, weights_of

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


def test_float64() -> None:
    model = net().double()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = PruningSchedule(model, optimizer, sparsity=0.7, end=4, method="movement", begin=1, regrow=0.3)
    for step in range(1, 6):
        optimizer.zero_grad()
        x, target = (tensor.double() for tensor in batch(step))
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        schedule.step()
    assert [row.pruned_units for row in schedule.report().pruned] == [round(0.7 * 192), round(0.7 * 128)]


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
