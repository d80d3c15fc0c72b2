"""``Int8Linear`` and its operator inside torch: gradients, opcheck, compile, export, autocast, threads."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycompress import ops
from pycompress.nn import Int8Linear
from tests.eager_watchers import wrong_callers
from tests.test_int8_linear import FUNCTIONS, bias_of, loaded, make

OP = torch.ops.pycompress.int8_linear.default


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients(activation: str, mode: str, dtype: torch.dtype, backend: str) -> None:
    """Against autograd in float64 on the dequantised layer, the rounding of x passed straight through."""
    module = make(mode, activation=activation, backend=backend)
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    before = make_before(module, x.detach())
    grad = torch.randn(2, 5, 40).to(dtype)
    grads = torch.autograd.grad(module(x), (x, bias_of(module)), grad)

    weight = module.weight.double() * module.weight_scale.double()[:, None]
    x64, bias64 = x.detach().double().requires_grad_(), bias_of(module).detach().double().requires_grad_()
    z = F.linear(x64, weight, bias64)
    z = z + (before - z).detach()  # the value that the activation really saw
    expected = torch.autograd.grad(FUNCTIONS[activation](z), (x64, bias64), grad.double())
    relative = 1e-5 if dtype == torch.float32 else 0.02
    for got, want in zip(grads, expected, strict=True):
        assert (got.double() - want).abs().max() <= relative * want.abs().max()
    assert grads[0].dtype == dtype
    assert grads[1].dtype == torch.float32


def make_before(module: Int8Linear, x: Tensor) -> Tensor:
    """What the layer computes before its activation."""
    plain = Int8Linear(96, 40, mode=module.mode, backend=module.backend)
    with torch.no_grad():
        return loaded(plain, module.state_dict())(x).double()


def test_gradient_only_where_wanted() -> None:
    module = make(bias=False)
    x = torch.randn(5, 96, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    frozen = make().requires_grad_(False)
    assert not frozen(torch.randn(5, 96)).requires_grad
    only_bias = make()
    only_bias(torch.randn(5, 96)).sum().backward()
    torch.testing.assert_close(bias_of(only_bias).grad, torch.full((40,), 5.0))


def test_gradient_of_empty_and_strided_input() -> None:
    module = make(activation="gelu")
    x = torch.randn(0, 96, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 96)
    torch.testing.assert_close(bias_of(module).grad, torch.zeros(40))
    wide = torch.randn(5, 192, requires_grad=True)
    module(wide[:, ::2]).sum().backward()
    assert wide.grad is not None
    assert (wide.grad[:, 1::2] == 0).all()
    assert wide.grad[:, ::2].abs().sum() > 0


# ---- operator, compile, export, autocast ------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("mode", "activation", "dtype", "bias"), [
    ("dynamic", "none", torch.float32, True), ("static", "gelu", torch.bfloat16, True),
    ("weight_only", "silu", torch.float32, False),
])  # fmt: skip
def test_opcheck(mode: str, activation: str, dtype: torch.dtype, bias: bool, packed: bool) -> None:
    module = make(mode, bias=bias, activation=activation)
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    weight = module._weight if packed else module.weight
    args = (x, weight, module.weight_scale, module.bias, mode, module.input_scale, module.input_zero_point, activation)
    torch.library.opcheck(OP, args)


@pytest.mark.parametrize("mode", ops.MODES)
def test_compile(mode: str) -> None:
    """One graph without a break, with gradients, for changing shapes."""
    torch._dynamo.reset()
    module = make(mode, activation="gelu")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 17, 33):
        x = torch.randn(2, m, 96, requires_grad=True)
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
        got = torch.autograd.grad(compiled(x).square().sum(), (x, bias_of(module)))
        want = torch.autograd.grad(module(x).square().sum(), (x, bias_of(module)))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(make(), nn.LayerNorm(40), make(k=40)), torch.randn(5, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_compile_sees_a_new_state() -> None:
    torch._dynamo.reset()
    module, x = make(), torch.randn(5, 96)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        module.load_state_dict(make().state_dict())
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_export(mode: str) -> None:
    module, x = make(mode, activation="silu").eval(), torch.randn(4, 96)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2, max=512)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for m in (2, 4, 77):
        x = torch.randn(m, 96)
        assert torch.equal(again(x), module(x))


def test_autocast() -> None:
    module, x = make(activation="relu"), torch.randn(5, 96)
    expected = module(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16(), x.half()):
            assert module(given).dtype == torch.bfloat16
        assert torch.equal(module(x), expected)
        module(x.requires_grad_()).sum().backward()
        with torch.autocast("cpu", enabled=False):
            assert module(x).dtype == torch.float32
        with torch.no_grad():
            assert module(x).dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert module.weight_scale.dtype == torch.float32


# ---- threads ----------------------------------------------------------------------------------------------------


def test_python_threads() -> None:
    """Callers at once, each with a team of two, while another thread replaces the state with an equal one."""
    module = Int8Linear.from_float(nn.Linear(300, 500)).requires_grad_(False)
    assert wrong_callers(module, [torch.randn(m, 300) for m in (1, 7, 64, 200)], calls=40) == []


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_second_order_gradient(activation: str) -> None:
    """Of the float layer with the same weight, through the activation: weight_only, where nothing is rounded."""
    module = make("weight_only", activation=activation)
    exact = module.to_float()
    x = torch.randn(5, 96)

    def penalty(layer: nn.Module) -> Tensor:
        v = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(v).square().sum(), v, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), v)[0]

    expected = penalty(exact)
    assert ((penalty(module) - expected).norm() / expected.norm()).item() < 1e-4
