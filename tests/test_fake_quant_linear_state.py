"""``FakeQuantLinear``: its state, the weight that it keeps for evaluation, and what torch does with it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn import FakeQuantLinear, Int8Linear, MaskedLinear
from tests.fake_quant_helpers import make, mask_of

KEYS = ["weight", "bias"]
STATICS = ["input_scale", "input_zero_point"]


def saved(module: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


def output(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = layer(x)
    return result


# ---- parameters and checkpoints -----------------------------------------------------------------------------------


def test_the_parameters_stay_the_same() -> None:
    linear = nn.Linear(24, 10)
    layer = FakeQuantLinear.from_float(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert list(layer.parameters()) == list(linear.parameters())
    masked = MaskedLinear.from_linear(linear, torch.rand(10, 24) > 0.5, "dense").eval()
    layer = FakeQuantLinear.from_float(masked, "weight_only")
    assert layer.weight is linear.weight
    assert torch.equal(mask_of(layer), masked.mask)
    assert mask_of(layer) is not masked.mask
    assert (layer.gradient, layer.training) == ("dense", False)


@pytest.mark.parametrize("mask", ["", "masked", "dense"])
@pytest.mark.parametrize("mode", ops.MODES)
def test_state_dict_goes_to_and_from_a_linear(mode: str, mask: str) -> None:
    layer, x = make(mode, mask=mask).eval(), torch.randn(5, 24)
    y = output(layer, x)
    state = saved(layer)
    assert list(state) == KEYS + (STATICS if mode == "static" else [])
    again = FakeQuantLinear(24, 10, mode=mode, masked=bool(mask), gradient=mask or "masked").eval()
    again.load_state_dict(state)
    assert torch.equal(output(again, x), y)
    assert (again.mask is None) == (not mask)
    if mask:
        assert torch.equal(mask_of(again), mask_of(layer))
    plain = nn.Linear(24, 10)
    plain.load_state_dict({key: state[key] for key in KEYS})
    assert torch.equal(plain.weight, layer.to_linear().weight)
    if mode != "static":
        layer.load_state_dict(nn.Linear(24, 10).state_dict())


def test_zeros_of_a_layer_without_a_mask_are_no_mask() -> None:
    """Its checkpoint's zeros have no meaning in their sign, and prune nothing where a mask is."""
    layer = make()
    layer.weight.data[:, :5] = 0.0
    masked = make(mask="masked")
    masked.set_mask(torch.ones(10, 24, dtype=torch.bool))
    masked.load_state_dict(layer.state_dict())
    assert mask_of(masked).all()
    masked.set_mask(torch.rand(10, 24) > 0.5)
    other = make(mask="masked")
    other.load_state_dict(masked.state_dict())
    assert torch.equal(mask_of(other), mask_of(masked))


def test_set_mask_where_there_was_none() -> None:
    layer = make()
    assert (layer.mask, layer.sparsity) == (None, 0.0)
    mask = torch.rand(10, 24) > 0.5
    layer.set_mask(mask)
    assert torch.equal(mask_of(layer), mask)
    assert not layer.weight[~mask].any()
    refusing = make()
    with pytest.raises(ValueError, match="expected"):
        refusing.set_mask(mask.T)
    assert refusing.mask is None


@pytest.mark.parametrize("mask", ["", "masked", "dense"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[nn.Module], FakeQuantLinear], mask: str) -> None:
    for mode in ops.MODES:
        layer, x = make(mode, mask=mask, backend="reference").eval(), torch.randn(5, 24)
        y = output(layer, x)
        again = copied(layer)
        assert again._kept is None
        assert (again.mode, again.backend, again.gradient) == (mode, "reference", layer.gradient)
        assert torch.equal(output(again, x), y)
        with torch.no_grad():
            again.weight.mul_(-1)
        assert torch.equal(output(layer, x), y)
        assert not torch.equal(output(again, x), y)


@pytest.mark.parametrize("move", [
    lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu"), lambda m: m.type(torch.float16),
], ids=["bfloat16", "half", "cpu", "type"])  # fmt: skip
def test_moves(move: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = make("static", mask="masked").eval(), torch.randn(5, 24)
    output(layer, x)
    scale, zero_point, mask = layer.input_scale, layer.input_zero_point, mask_of(layer).clone()
    move(layer)
    assert layer.input_scale is not None
    assert layer.input_zero_point is not None
    assert torch.equal(layer.input_scale, scale)
    assert torch.equal(layer.input_zero_point, zero_point)
    assert torch.equal(mask_of(layer), mask)
    x = x.to(layer.weight.dtype)
    assert torch.equal(output(layer, x), output(Int8Linear.from_float(layer), x))


@pytest.mark.parametrize("mask", ["", "masked"])
@pytest.mark.parametrize("assign", [True, False])
def test_from_the_meta_device(assign: bool, mask: str) -> None:
    layer, x = make("static", mask=mask), torch.randn(5, 24)
    empty = FakeQuantLinear(24, 10, mode="static", masked=bool(mask), device="meta")
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    if mask:
        assert torch.equal(mask_of(empty), mask_of(layer))
    assert torch.equal(output(empty.eval(), x), output(layer.eval(), x))


# ---- the weight kept for evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["", "masked", "dense"])
def test_quantised_once_until_something_changes(monkeypatch: pytest.MonkeyPatch, mask: str) -> None:
    count = 0
    quantize = ops.quantize_weight

    def counted(weight: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        return quantize(weight)

    monkeypatch.setattr(ops, "quantize_weight", counted)
    layer, x = make(mask=mask).eval(), torch.randn(5, 24)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    other = make(mask=mask).state_dict()

    def step() -> None:
        layer.train()(x).sum().backward()
        optimizer.step()
        layer.eval()

    def halved() -> None:
        with torch.no_grad():
            layer.weight.mul_(0.5)

    def replaced() -> None:
        layer.weight = nn.Parameter(torch.randn(10, 24))

    changes: list[Callable[[], object]] = [
        step, halved, replaced, lambda: layer.load_state_dict(other), lambda: layer.to(torch.bfloat16),
        lambda: layer.float(), lambda: setattr(layer, "backend", "reference"),
    ]  # fmt: skip
    if mask:
        changes.append(lambda: layer.set_mask(mask_of(layer).flip(0)))
    for change in (lambda: None, *changes):
        change()
        count = 0
        y = output(layer, x)
        assert torch.equal(output(layer, x), y)
        assert count == 1
        assert torch.equal(y, output(Int8Linear.from_float(copy.deepcopy(layer), backend=layer.backend), x))
    assert layer.train()._kept is None


def test_nothing_is_kept_in_training() -> None:
    """Some optimizers write to weight.data, which no version tells."""
    layer, x = make(), torch.randn(5, 24)
    y = output(layer, x)
    layer.weight.data.neg_()
    assert not torch.equal(output(layer, x), y)
    assert layer._kept is None


def test_what_is_kept_is_no_gradient_and_no_state() -> None:
    layer, x = make().eval(), torch.randn(5, 24)
    output(layer, x)
    assert layer._kept is not None
    assert layer._kept.weight.dtype == torch.uint8  # packed
    assert sorted(layer.state_dict()) == sorted(KEYS)
    assert [name for name, _ in layer.named_modules()] == [""]
    layer(x).sum().backward()  # eval mode, with gradients
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()


def test_inference_mode() -> None:
    layer, x = make(mask="masked").eval(), torch.randn(5, 24)
    y = layer(x).detach()
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
        inside = make().eval()
        for _ in range(2):
            z = inside(x)
            inside.weight.mul_(2)
            assert not torch.equal(inside(x), z)
    assert torch.equal(output(layer, x), y)
    layer.requires_grad_(False)
    assert torch.equal(layer(x), y)


def test_functional_call() -> None:
    layer, x = make(mask="masked").eval(), torch.randn(5, 24)
    output(layer, x)
    weight = torch.randn(10, 24, requires_grad=True)
    y = torch.func.functional_call(layer, {"weight": weight}, x)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad[~mask_of(layer)].any()
    want = ops.fake_quant_linear(x, weight.detach() * mask_of(layer), layer.bias)
    assert torch.equal(y, want)
    kept = layer._kept
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(layer, {"weight": weight.detach()}, x), want)
    assert layer._kept is kept


# ---- torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "bias"), [("dynamic", True), ("static", False), ("weight_only", True)])
def test_opcheck(mode: str, bias: bool) -> None:
    layer = make(mode, bias=bias)
    statics = layer.input_scale, layer.input_zero_point
    x = torch.randn(2, 5, 24, requires_grad=True)
    q, scale = ops.quantize_weight(layer.weight)
    torch.library.opcheck(
        torch.ops.pycompress.fake_quant_linear.default, (x, layer.weight, q, scale, layer.bias, mode, *statics)
    )
    torch.library.opcheck(torch.ops.pycompress.quantize_weight.default, (layer.weight.detach(),))
    if mode != "weight_only":
        torch.library.opcheck(torch.ops.pycompress.fake_quant_rows.default, (x.detach()[0], mode, *statics))


@pytest.mark.parametrize(("mode", "mask"), [("dynamic", ""), ("static", "masked"), ("weight_only", "dense")])
def test_compile(mode: str, mask: str) -> None:
    """One graph without a break, with gradients, for changing shapes; and it sees what training did to the weight."""
    torch._dynamo.reset()
    layer = make(mode, mask=mask)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 17):
        x = torch.randn(2, m, 24, requires_grad=True)
        assert torch.equal(compiled(x), layer(x))
        got = torch.autograd.grad(compiled(x).square().sum(), (x, *layer.parameters()))
        want = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            layer.weight.add_(0.1)
    layer.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    layer, x = make(), torch.randn(5, 24)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    grad = torch.randn(5, 10)
    got, want = (torch.autograd.grad(f(x), layer.weight, grad)[0] for f in (compiled, layer))
    torch.testing.assert_close(got, want)


def test_export() -> None:
    layer, x = make("static").eval(), torch.randn(4, 24)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2, max=512)},))
    x = torch.randn(77, 24)
    assert torch.equal(program.module()(x), layer(x))


def test_function() -> None:
    weight, x = torch.randn(10, 24, requires_grad=True), torch.randn(5, 24)
    y = ops.fake_quant_linear(x, weight)
    assert torch.equal(y, ops.int8_linear(x, *ops.quantize_weight(weight)))
    with pytest.raises(ValueError, match=r"quantized has torch.int8 \(10, 24\), expected int8 \(9, 24\)"):
        torch.ops.pycompress.fake_quant_linear(x, weight[:9], *ops.quantize_weight(weight))


def test_repr() -> None:
    assert repr(make("static", backend="reference")) == (
        "FakeQuantLinear(in_features=24, out_features=10, bias=True, mode=static, backend=reference)"
    )
    layer = FakeQuantLinear(4, 2, masked=True, gradient="dense")
    layer.set_mask(torch.tensor([[True, True, False, False]] * 2))
    assert repr(layer).endswith("bias=True, mode=dynamic, backend=auto, sparsity=0.5, gradient=dense)")
    assert "meta" not in repr(FakeQuantLinear(4, 2, masked=True, device="meta"))
