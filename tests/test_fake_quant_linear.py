"""``FakeQuantLinear``: what it computes, its gradients, and what becomes of it. State is in the file beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn import FakeQuantLinear, Int8Linear, MaskedLinear, SparseLinear
from tests import oracle
from tests.fake_quant_helpers import (
    DTYPES,
    RANGE,
    composed,
    expected,
    make,
    mask_of,
    quantized_weight,
)

SHAPES = [*(s for s in oracle.SHAPES if s != (1, 1024, 1024)), (1, 96, 256), (2, 3, 20000)]
EMPTY = "ignore:Initializing zero-element tensors"


def data(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(m, k) * torch.logspace(-2, 1, m)[:, None] if m else torch.randn(m, k)).to(dtype)


def terms(layer: FakeQuantLinear) -> int:
    return layer.in_features if layer.mode == "weight_only" else 0


# ---- values -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(EMPTY)
@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_is_what_the_converted_layer_computes(isa: str, dtype: torch.dtype, mode: str) -> None:
    """In training and in eval, bit by bit, on every instruction set; and within the roundings of float64."""
    for m, n, k in SHAPES:
        layer, x = make(mode, k, n, backend="native"), data(m, k, dtype)
        y = layer(x)
        converted = Int8Linear.from_float(layer, backend="native").eval()
        assert converted.mode == mode
        with torch.no_grad():
            assert torch.equal(converted(x), y)
            assert torch.equal(layer(x), y)
            assert torch.equal(layer.eval()(x), y)
        oracle.assert_close(y.detach(), *expected(layer, x), dtype, terms=terms(layer))


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_and_fake_quantised_float_differ_by_the_rounding_of_the_epilogue(
    isa: str, dtype: torch.dtype, mode: str
) -> None:
    """With the integer sums equal, product = sum * weight_scale is the same float. Then the kernel rounds once in
    "product * x_scale + bias", torch twice: half a unit of the product and both halves of y make 2^-24 (|product| +
    2 |y|), and where y is narrower one unit of it. In weight_only mode both sum K floats.
    """
    for m, n, k in ((5, 33, 127), (3, 5, 5001), (2, 7, 20000)):
        layer, x = make(mode, k, n, backend="native"), data(m, k, dtype)
        reference = FakeQuantLinear.from_float(layer.to_linear(), mode, input_range=RANGE if mode == "static" else None,
                                               backend="reference")  # fmt: skip
        y, z = layer(x).detach().double().numpy(), reference(x).detach().double().numpy()
        exact, magnitude = expected(layer, x)
        unit = oracle.ROUNDOFF[torch.float32]
        allowed = unit * ((1 + np.sqrt(terms(layer))) * magnitude + 2.01 * np.abs(exact))
        if dtype != torch.float32:
            allowed += 2.02 * oracle.ROUNDOFF[dtype] * np.abs(exact) + (2.0**-24 if dtype == torch.float16 else 0)
        assert (np.abs(y - z) <= allowed).all(), (np.abs(y - z) / allowed).max()


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast(backend: str, mode: str) -> None:
    """float32 weights are quantised as they are, x goes to bfloat16, as in Int8Linear."""
    layer, x = make(mode, backend=backend), torch.randn(7, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.detach().bfloat16()))
    y.float().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert (x.grad.dtype, layer.weight.grad.dtype) == (torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(layer.eval()(x), y)
        assert torch.equal(Int8Linear.from_float(layer, backend=backend)(x), y)


@pytest.mark.filterwarnings(EMPTY)
@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 3, 24), (2, 0, 24), (2, 3, 4, 24)], ids=str)
def test_leading_dimensions_and_strides(shape: tuple[int, ...]) -> None:
    for mode in ops.MODES:
        for backend in ("auto", "reference"):
            layer = make(mode, backend=backend)
            wide = torch.randn(*shape[:-1], 48).requires_grad_()
            x = wide[..., ::2]
            y = layer(x)
            assert y.shape == (*shape[:-1], 10)
            rows = layer(x.detach().reshape(-1, 24).contiguous())
            torch.testing.assert_close(y.reshape(-1, 10), rows, rtol=0, atol=1e-6)
            y.sum().backward()
            assert wide.grad is not None
            assert (wide.grad[..., 1::2] == 0).all()
            assert layer.weight.grad is not None
            assert layer.weight.grad.shape == (10, 24)


@pytest.mark.filterwarnings(EMPTY)
@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 0), (1, 1)])
def test_smallest_layers(k: int, n: int) -> None:
    for mode in ops.MODES:
        layer, x = make(mode, k, n), torch.randn(3, k, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is not None
        assert layer.bias is not None
        assert (x.grad.shape, layer.weight.grad.shape) == ((3, k), (n, k))
        assert torch.equal(layer.bias.grad, torch.full((n,), 3.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_row_that_is_not_finite_stays_in_its_row(backend: str, mode: str, bad: float) -> None:
    layer, x = make(mode, backend=backend), torch.randn(5, 24)
    clean = layer(x)
    x[2, 7] = bad
    x.requires_grad_()
    y = layer(x)
    rest = torch.arange(5) != 2
    assert torch.equal(y[rest], clean[rest])
    assert y[2].isnan().all()
    y[rest].sum().backward()
    assert x.grad is not None
    assert x.grad[rest].isfinite().all()
    # The weight's gradient has met the row, as in nn.Linear.
    assert layer.weight.grad is not None
    assert layer.weight.grad.isnan().all()


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    layer = make()
    layer.weight.data[3, 0] = float("nan")
    with pytest.raises(ValueError, match="row 3 of the weight holds NaN or Inf"):
        layer(torch.randn(2, 24))


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["", "masked", "dense"])
@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_composition_in_float64(
    dtype: torch.dtype, backend: str, mode: str, mask: str
) -> None:
    layer, x = make(mode, 40, 12, mask=mask, backend=backend), torch.randn(2, 9, 40, dtype=dtype, requires_grad=True)
    layer(x)  # writes zeros where the weight is pruned
    grad = torch.randn(2, 9, 12).to(dtype)
    assert layer.bias is not None
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    want = torch.autograd.grad(composed(layer, *leaves), leaves, grad.double())
    got = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
    relative = 3e-6 if dtype == torch.float32 else 0.02
    for a, b, leaf in zip(got, want, (x, layer.weight, layer.bias), strict=True):
        assert a.dtype == leaf.dtype
        assert (a.double() - b).abs().max() <= relative * b.abs().max()
    if mask:
        assert bool((got[1][~mask_of(layer)] == 0).all()) == (mask == "masked")


def test_static_passes_no_gradient_outside_the_range() -> None:
    layer = make("static")
    step, zero_point = ops.affine_qparams(*RANGE)
    low, high = -zero_point * step, (255 - zero_point) * step
    x = torch.tensor([low - 0.1, low + 1e-4, 0.0, high - 1e-4, high + 0.1, 1e9]).repeat(1, 4).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    inside = torch.tensor([False, True, True, True, False, False]).repeat(4)
    assert torch.equal(x.grad[0] != 0, inside)


def test_gradients_only_where_wanted() -> None:
    layer, x = make(), torch.randn(5, 24, requires_grad=True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    frozen = make().requires_grad_(False)
    assert not frozen(torch.randn(5, 24)).requires_grad
    layer = make(bias=False)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None
    # In eval too, where the weight is kept: static still clips.
    layer = make("static").eval().requires_grad_(False)
    x = torch.full((1, 24), 9.0, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_pruned_weights_stay_pruned_while_training(gradient: str) -> None:
    layer = make(mask=gradient)
    mask = mask_of(layer).clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[layer.weight]["momentum_buffer"] = torch.ones_like(layer.weight)  # from before it was pruned
    x = torch.randn(16, 24)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        q, _ = quantized_weight(layer)
        assert (q[~mask] == 0).all()
        y, z = layer(x).detach(), Int8Linear.from_float(layer)(x).detach()
        assert torch.equal(y, z)
        assert (layer.state_dict()["weight"][~mask] == 0).all()
    assert torch.equal(mask_of(layer), mask)
    assert ((layer.weight[~mask] == 0).all()) == (gradient == "masked")


# ---- conversion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["", "masked", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_layer_has_the_same_integers_and_scales(dtype: torch.dtype, mask: str) -> None:
    for mode in ops.MODES:
        layer = make(mode, mask=mask, dtype=dtype)
        converted = Int8Linear.from_float(layer, activation="gelu")
        q, scale = quantized_weight(layer)
        assert torch.equal(converted.weight, q)
        assert torch.equal(converted.weight_scale, scale)
        for name in ("input_scale", "input_zero_point"):
            ours, theirs = getattr(layer, name), getattr(converted, name)
            assert (ours is None) == (theirs is None) == (mode != "static")
            assert ours is None or (torch.equal(ours, theirs) and ours is not theirs)
        assert (converted.mode, converted.activation, converted.training) == (mode, "gelu", True)
        assert converted.bias is not layer.bias


@pytest.mark.parametrize("format", ["bitmap", "index"])
@pytest.mark.parametrize("mask", ["masked", "dense"])
def test_sparse_layer_has_the_same_integers_and_scales(isa: str, mask: str, format: str) -> None:
    layer, x = make(k=5001, n=7, mask=mask).eval(), data(9, 5001)
    sparse = SparseLinear.from_dense(layer, dtype="int8", format=format).eval()
    q, scale = quantized_weight(layer)
    assert torch.equal(sparse.to_dense(), q.float() * scale[:, None])
    assert sparse.weight_scale is not None
    assert torch.equal(sparse.weight_scale, scale)
    exact, magnitude = expected(layer, x)
    with torch.no_grad():
        y, z = layer(x).double().numpy(), sparse(x).double().numpy()
    assert (np.abs(y - z) <= 2.0**-23 * (magnitude + np.abs(exact))).all()


def test_from_float_of_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode='weight_only' but the layer was trained for mode='static'; leave mode"):
        Int8Linear.from_float(make("static"), "weight_only")
    assert Int8Linear.from_float(make("static").to_linear(), "weight_only").mode == "weight_only"
    ranged = Int8Linear.from_float(make("static"), "static", input_range=(0.0, 1.0))
    assert ranged.input_scale == torch.tensor(1 / 255)


def test_from_float_of_a_masked_layer_is_pruned() -> None:
    layer = MaskedLinear.from_linear(nn.Linear(24, 10), torch.rand(10, 24) > 0.5, "dense")
    assert torch.equal(Int8Linear.from_float(layer).weight, ops.quantize_weight(layer.weight * layer.mask)[0])


def test_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(10, 24)
    layer, x = FakeQuantLinear.from_float(conv1d), torch.randn(5, 24)
    assert layer.weight.shape == (10, 24)
    assert layer.bias is conv1d.bias
    torch.testing.assert_close(layer(x), conv1d(x), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: make("int4"), "mode='int4', expected one of dynamic, static, weight_only"),
    (lambda: make(backend="gpu"), "backend='gpu', expected one of auto"),
    (lambda: FakeQuantLinear(3, 4, gradient="soft"), "unknown gradient 'soft'; expected one of masked, dense"),
    (lambda: FakeQuantLinear.from_float(nn.Linear(3, 4), "static"), "static mode needs a range"),
    (lambda: FakeQuantLinear.from_float(nn.Linear(3, 4), input_range=(0, 1)), "the others take none"),
    (lambda: FakeQuantLinear.from_float(nn.Conv2d(3, 4, 1)), "expected an nn.Linear with a weight"),
    (lambda: make()(torch.randn(2, 23)), "x has K=23 but weight has K=24"),
    (lambda: make()(torch.randn(2, 24).double()), "x has dtype torch.float64"),
    (lambda: make().set_mask(torch.ones(3, 3)), "mask is torch.float32; expected torch.bool"),
])  # fmt: skip
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
