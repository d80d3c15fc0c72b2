"""What the cost model does for a layer: its choice, ties settled by a made-up clock, explain().

Nothing here is timed. Where something would be measured, a clock stands in that advances by what a call is said to
cost.
"""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from pycompress import cost_cache, cost_calibration, cost_model
from pycompress.cost_core import ANY_M, BUCKETS, DTYPES, FORMS, Shape
from pycompress.nn import Int8Linear, SparseLinear
from tests.cost_fakes import FakeMachine, flat, model_of, seconds_of

settle_ties = cost_model.settle_ties  # a fixture replaces it


def pruned_layer(n=32, k=48, sparsity=0.8, dtype="float32", bias=True, **options):
    linear = nn.Linear(k, n, bias)
    mask = torch.rand(n, k) >= sparsity
    return SparseLinear.from_dense(linear, mask, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("dtype", "bias", "expected"),
    [
        ("float32", torch.float32, "float32"),
        ("float32", torch.bfloat16, "float32"),
        ("bfloat16", torch.bfloat16, "bfloat16"),
        ("bfloat16", torch.float32, "float32"),
        ("bfloat16", None, "float32"),
        ("int8", torch.float32, "int8"),
    ],
)
def test_the_dense_layer_it_competes_with(dtype, bias, expected):
    layer = pruned_layer(dtype=dtype, bias=bias is not None)
    if bias is not None:
        layer.to(bias)
    shape = Shape.of_layer(layer)
    assert (shape.dtype, shape.dense) == (dtype, expected)
    dense = cost_calibration.variant(layer, "dense", expected)
    assert isinstance(dense, Int8Linear if expected == "int8" else nn.Linear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_variants_compute_the_same(dtype, activation):
    layer = pruned_layer(dtype=dtype, activation=activation)
    x = torch.randn(5, 48)
    expected = layer(x)
    for form in FORMS:
        other = cost_calibration.variant(layer, form, "int8" if dtype == "int8" else "float32")
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown form 'csr'"):
        cost_calibration.variant(layer, "csr", "float32")


@pytest.fixture
def fake_variants(monkeypatch):
    """Layers of a made-up machine in the place of the real ones, whose index form is slower than predicted."""
    machine = FakeMachine(slower={"index": 1.5})
    made = []

    def variant(layer, form, dense):
        made.append(form)
        return machine.module(form, Shape.of_layer(layer))

    monkeypatch.setattr(cost_calibration, "variant", variant)
    return machine, made


def test_ties_are_settled_by_measuring_once(own_cache, fake_variants):
    machine, made = fake_variants
    layer = pruned_layer(64, 256, 0.6, format="bitmap")
    shape = Shape.of_layer(layer)
    model = model_of("float32")
    near = [m for m in BUCKETS[:-1] if len(_near(model, m, shape)) > 1]
    assert near, "the made-up machine has a break-even point"
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    assert set(made) >= {"index"}
    for m in near:
        for form in FORMS:
            if model.is_corrected(form, m, shape):
                real = seconds_of(form, m, shape) * machine.slower.get(form, 1.0)
                assert model.predict(form, m, shape) == pytest.approx(real)
    calls = machine.calls
    again = cost_cache.load(model.threads)
    assert again is None or again.corrections == model.corrections
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    settled = machine.calls
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    assert machine.calls == settled, "what was measured is not measured again"
    assert settled >= calls


def _near(model, m, shape):
    times = {form: model.predict(form, m, shape) for form in FORMS}
    return [form for form in FORMS if times[form] <= cost_model.TIE * min(times.values())]


def test_ties_have_a_limit_in_time(own_cache, fake_variants):
    machine, _ = fake_variants
    layer = pruned_layer(64, 256, 0.6, format="bitmap")
    shape = Shape.of_layer(layer)
    model = model_of("float32")
    settle_ties(model, layer, shape, (1, 512), seconds=-1.0, clock=machine.clock)
    assert model.corrections == []


def test_making_a_layer_calibrates_and_loading_does_not(own_cache, calibrations, fake_variants):
    linear = nn.Linear(48, 32)
    mask = torch.rand(32, 48) >= 0.8
    layer = SparseLinear.from_dense(linear, mask)
    assert calibrations == ["float32"]
    fresh = SparseLinear(48, 32)
    fresh.load_state_dict(layer.state_dict())
    fresh(torch.randn(2, 48))
    SparseLinear.from_dense(linear, mask, dtype="bfloat16", cost_model=model_of("float32"), format="bitmap")
    assert calibrations == ["float32"]
    SparseLinear.from_dense(linear, mask, dtype="bfloat16")
    assert calibrations == ["float32", "bfloat16"]


def test_a_model_that_was_passed_decides_alone(own_cache, calibrations):
    layer = pruned_layer(cost_model=flat(bitmap=2e-6, index=1e-6, dense=3e-6))
    assert layer.choice == (ANY_M, 1)
    assert calibrations == []


# ---- explain ----


def test_explain_without_measuring():
    layer = pruned_layer(cost_model=flat(bitmap=2e-6, index=1e-6, dense=3e-6))
    explanation = layer.explain(tokens=(1, 300), measure=False)
    assert [(t.m, t.form, t.measured, t.dense_measured) for t in explanation.tokens] == [
        (1, "index", None, None),
        (300, "index", None, None),
    ]
    assert explanation.tokens[0].why == "predicted 3.00x as fast as dense"
    assert (explanation.tokens[0].predicted, explanation.tokens[0].dense_predicted) == (1e-6, 3e-6)
    text = str(explanation)
    assert "dense us predicted" in text
    assert "32x48 float32" in text
    console = Console(file=io.StringIO(), width=200)
    console.print(explanation)
    assert "3.00x as fast" in console.file.getvalue()


def test_explain_measures_both():
    explanation = pruned_layer().explain(tokens=(1, 5))
    assert [t.m for t in explanation.tokens] == [1, 5]
    assert all(t.measured > 0 and t.dense_measured > 0 for t in explanation.tokens)
    assert "built-in figures" in explanation.summary()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"format": "index"}, "format='index' was asked for"),
        ({"cost_model": "slow"}, "index is predicted to take 2.00x as long"),
    ],
)
def test_explain_says_why(options, why):
    if "cost_model" in options:
        options = {"cost_model": flat(bitmap=9e-6, index=2e-6, dense=1e-6)}
    assert pruned_layer(**options).explain(tokens=(8,), measure=False).tokens[0].why == why


@pytest.mark.parametrize("tokens", [(0,), (1.5,), ("8",), (), 8])
def test_explain_refuses(tokens):
    with pytest.raises(ValueError, match=r"tokens=.*expected a sequence of integers, each at least 1"):
        pruned_layer().explain(tokens=tokens)


def test_times_that_are_far_off_correct_nothing(own_cache, fake_variants):
    machine, _ = fake_variants
    machine.slower["index"] = 30.0
    layer = pruned_layer(64, 256, 0.6, format="bitmap")
    shape = Shape.of_layer(layer)
    model = model_of("float32")
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    assert not any("index" in key for key, _, _ in model.corrections)
