"""The layers of two models side by side: which are matched, what their error, bytes and work are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress
from pycompress.nn import LowRankLinear, SparseLinear
from pycompress.nn.fake_quant_linear import FakeQuantLinear
from pycompress.ops.sparse_linear_reference import BITMAP, INDEX
from pycompress.workflow.measure_layers import _CudaClock, _Tap, layer_rows
from tests.measure_models import half_mask, mlp


def rows_of(baseline: nn.Module, change: Callable[[nn.Module], object], sample: Tensor, rounds: int = 0) -> Any:
    model = copy.deepcopy(baseline)
    change(model)
    rows = layer_rows(baseline, model, sample, rounds)
    json.dumps([row.to_dict() for row in rows], allow_nan=False)
    return model, {row.name: row for row in rows}


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / a.double().norm())


def test_layer_rows_compare_behind_a_folded_activation() -> None:
    baseline, x = mlp(), torch.randn(5, 16)
    model, rows = rows_of(baseline, pycompress.quantize_, x)
    with torch.no_grad():
        inner = baseline[1](baseline[0](x))
        assert rows["0"].error == pytest.approx(relative(inner, model[0](x)), rel=1e-5)
        assert rows["2"].error == pytest.approx(relative(baseline(x), model(x)), rel=1e-5)
    first = rows["0"]
    assert (first.activation, first.shape, first.calls, first.tokens) == ("gelu", (32, 16), 1, 5)
    assert (first.before.kind, first.after.kind, first.after.form) == ("Linear", "Int8Linear", "int8 dynamic")
    assert (first.before.precision, first.after.precision) == ("float32", "int8")
    assert first.after.bytes == model[0].memory_bytes()
    assert first.flops == first.before.flops == first.after.flops == 2 * 5 * 16 * 32
    assert first.before.moved == 4 * (16 * 32 + 5 * 16 + 5 * 32)
    assert first.before.seconds is None


def test_layer_rows_compare_up_to_the_factors_that_a_layer_took_in() -> None:
    """SmoothQuant divides the channels before a layer, where the layer before can take that in."""
    baseline = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def change(model: nn.Module) -> None:
        factors = torch.linspace(0.2, 5, 32)
        with torch.no_grad():
            model[0].weight /= factors[:, None]  # type: ignore[index, operator]
            model[0].bias /= factors  # type: ignore[index]
            model[2].weight *= factors  # type: ignore[index, operator]

    _, rows = rows_of(baseline, change, torch.randn(50, 16))
    assert rows["0"].error < 1e-5
    assert "up to a factor a channel" in rows["0"].note
    assert rows["2"].error < 1e-5
    assert rows["2"].note == ""


def test_layer_rows_do_not_take_pruning_for_such_factors() -> None:
    _, rows = rows_of(mlp(), lambda model: pycompress.prune_(model, 0.8), torch.randn(50, 16))
    assert rows["0"].error > 0.3
    assert rows["0"].note == rows["2"].note == ""


def test_layer_rows_of_the_same_model_have_no_error() -> None:
    baseline = mlp()
    _, rows = rows_of(baseline, lambda model: None, torch.randn(5, 16), rounds=2)
    assert [row.error for row in rows.values()] == [0.0, 0.0]
    assert all(row.after.seconds > 0 and row.before.seconds > 0 for row in rows.values())


@pytest.mark.parametrize(("form", "code"), [("bitmap", BITMAP), ("index", INDEX)])
def test_layer_rows_count_what_a_sparse_layer_does(form: str, code: int) -> None:
    baseline, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(32, 64)
    with torch.no_grad():
        baseline[0].weight[half_mask(64, 64)] = 0.0

    def change(model: nn.Module) -> None:
        model[0] = SparseLinear.from_dense(model[0], format=form)  # type: ignore[operator]

    model, rows = rows_of(baseline, change, x)
    row = rows["0"]
    assert model[0].choice[1] == code
    assert row.after.flops == row.flops // 2 == 2 * 32 * model[0].nnz
    assert row.after.sparsity == row.before.sparsity == 0.5
    weight = row.after.moved - 2 * 4 * 32 * 64
    layer = model[0]
    state = (layer.weight_bitmap, layer.weight_values, layer._row_start, layer.bias)
    read = state if form == "bitmap" else (layer._index, layer.bias)
    assert weight == sum(tensor.nbytes for tensor in read)  # only the form that computes is read
    assert row.error < 1e-6
    assert row.after.intensity == row.after.flops / row.after.moved


def test_layer_rows_match_what_became_several_layers() -> None:
    baseline, x = mlp(), torch.randn(5, 16)

    def change(model: nn.Module) -> None:
        model[0] = LowRankLinear.from_linear(model[0], 4)  # type: ignore[operator, index]
        pycompress.quantize_(model, skip="0.down")

    model, rows = rows_of(baseline, change, x)
    row = rows["0"]
    assert list(rows) == ["0", "2"]
    assert row.activation == "gelu"  # behind the second factor
    with torch.no_grad():
        assert row.error == pytest.approx(relative(baseline[1](baseline[0](x)), model[0](x)), rel=1e-5)
    assert row.shape == (32, 16)
    assert (row.after.kind, row.after.form) == (
        "LowRankLinear",
        "rank 4 of Linear and Int8Linear, float32, int8 dynamic",
    )
    assert row.after.flops == 2 * 5 * 4 * (16 + 32)
    weights = model[0].up.memory_bytes() + 4 * 4 * 16
    assert row.after.moved == weights + 4 * (5 * 16 + 5 * 32 + 2 * 5 * 4)


def test_layer_rows_of_fake_quantised_layers_are_those_of_int8() -> None:
    def change(model: nn.Module) -> None:
        model[0] = FakeQuantLinear.from_float(model[0])  # type: ignore[operator, index]

    _, rows = rows_of(mlp(), change, torch.randn(5, 16))
    after = rows["0"].after
    assert (after.kind, after.form, after.precision) == ("FakeQuantLinear", "int8 dynamic", "int8")
    assert 0 < rows["0"].error < 0.1


class Odd(nn.Module):
    """One layer called twice, one never, one whose weight is read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.read = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.twice(self.twice(x)), self.read.weight)


def test_layer_rows_of_layers_called_twice_or_never() -> None:
    baseline, x = Odd(), torch.randn(5, 8)
    model, rows = rows_of(baseline, pycompress.quantize_, x, rounds=1)
    twice = rows["twice"]
    assert (twice.calls, twice.tokens) == (2, 10)
    with torch.no_grad():
        expected = torch.cat((a := baseline.twice(x), baseline.twice(a)))[None]
        found = torch.cat((b := model.twice(x), model.twice(b)))[None]
    assert twice.error == pytest.approx(relative(expected, found), rel=1e-5)
    assert rows["never"].error is None
    assert "never called" in rows["never"].note
    assert rows["never"].after.seconds is None
    assert rows["never"].after.moved == 0
    assert rows["never"].after.intensity is None


def test_layer_rows_say_why_there_is_no_error() -> None:
    baseline = nn.ModuleDict({"a": nn.Linear(8, 8)})
    baseline.forward = lambda x: baseline["a"](x)  # type: ignore[assignment, method-assign]
    model = nn.Sequential(nn.Linear(8, 8))
    rows = {row.name: row for row in layer_rows(baseline, model, torch.randn(3, 8), rounds=0)}
    assert rows["a"].after is None
    assert rows["a"].note == "only in the baseline"
    assert rows["0"].before is None
    assert rows["0"].note == "only in the compressed model"

    infinite = mlp()
    with torch.no_grad():
        infinite[0].bias.fill_(torch.inf)
    assert layer_rows(mlp(), infinite, torch.randn(3, 16), rounds=0)[0].note == "its output holds NaN or Inf"


def test_layer_rows_see_the_layers_of_an_encoder() -> None:
    """torch's fused path in eval mode would go past every hook."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    baseline, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(2, 3, 16)
    _, rows = rows_of(baseline, pycompress.quantize_, x, rounds=1)
    row = rows["layers.0.linear1"]
    assert row.tokens == 6
    assert row.activation == "relu"
    assert 0 < row.error < 0.1
    assert row.before.seconds > 0
    assert "read directly" in rows["layers.0.self_attn.out_proj"].note


def test_hooks_and_flags_are_as_before_when_a_model_raises() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes"):
        layer_rows(model, mlp(), torch.zeros(2, 15))
    assert model[0].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class FakeEvent:
    """Each one that is recorded comes two milliseconds after the one before."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        FakeEvent.now += 2.0
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_on_a_gpu_layers_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of one layer in one forward add up; what is read out has been waited for."""
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append(True))
    clock, once, twice = _CudaClock(), _Tap(nn.Linear(1, 1)), _Tap(nn.Linear(1, 1))
    for tap in (once, twice, twice):
        before, after = clock.hooks(tap)
        before()
        after()
    assert clock.read() == {once: pytest.approx(0.002), twice: pytest.approx(0.004)}
    assert waited == [True]
