"""``Int4Linear`` and its operator inside torch: gradients, opcheck, compile, export, autocast, short way, threads."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycompress import ops
from pycompress.nn import Int4Linear
from pycompress.ops.int4_matmul_eager import EagerPlan
from tests.eager_watchers import NOT_FAST, assert_watched, count_plans, wrong_callers
from tests.int4_oracle import KIND_IDS, KINDS
from tests.test_int4_linear import bias_of, like, loaded, make
from tests.test_int8_linear import FUNCTIONS

OP = torch.ops.pycompress.int4_linear.default


def arguments(module: Int4Linear, x: Tensor) -> tuple[Any, ...]:
    parts = module._weight, module._weight_scale, module._weight_zero_point
    sizes = module.in_features, module.out_features
    return x, *parts, module.bias, *sizes, module.format, module.group_size, module.activation, module.backend


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients(activation: str, format: str, symmetric: bool, dtype: torch.dtype, backend: str) -> None:
    """Against autograd in float64 on the dequantised layer."""
    module = make(format, k=97, symmetric=symmetric, activation=activation, backend=backend)
    x = torch.randn(2, 5, 97).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, 40).to(dtype)
    grads = torch.autograd.grad(module(x), (x, bias_of(module)), grad)

    exact = module.to_float()
    weight = (exact[0] if isinstance(exact, nn.Sequential) else exact).weight.detach().double()  # type: ignore
    x64, bias64 = x.detach().double().requires_grad_(), bias_of(module).detach().double().requires_grad_()
    z = F.linear(x64, weight, bias64)
    z = z + (z.to(dtype).double() - z).detach()  # the value that the activation's gradient is taken at
    expected = torch.autograd.grad(FUNCTIONS[activation](z), (x64, bias64), grad.double())
    relative = 1e-5 if dtype == torch.float32 else 0.02
    for got, want in zip(grads, expected, strict=True):
        assert (got.double() - want).abs().max() <= relative * want.abs().max()
    assert grads[0].dtype == dtype
    assert grads[1].dtype == torch.float32


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


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_second_order_gradient(activation: str) -> None:
    module = make(activation=activation)
    exact = module.to_float()
    x = torch.randn(5, 96)

    def penalty(layer: nn.Module) -> Tensor:
        v = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(v).square().sum(), v, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), v)[0]

    expected = penalty(exact)
    assert ((penalty(module) - expected).norm() / expected.norm()).item() < 1e-4


# ---- operator, compile, export, autocast ------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("format", "symmetric", "activation", "dtype", "bias"), [
    ("int4", True, "none", torch.float32, True), ("int4", False, "gelu", torch.bfloat16, True),
    ("nf4", True, "silu", torch.float32, False),
])  # fmt: skip
def test_opcheck(format: str, symmetric: bool, activation: str, dtype: torch.dtype, bias: bool, packed: bool) -> None:
    module = make(format, k=97, bias=bias, symmetric=symmetric, activation=activation)
    if not packed:
        module.backend = "triton"
    x = torch.randn(2, 5, 97).to(dtype).requires_grad_()
    torch.library.opcheck(OP, (*arguments(module, x)[:-1], "auto"))
    torch.library.opcheck(
        torch.ops.pycompress.int4_dequantize.default,
        (*arguments(module, x)[1:4], 97, 40, format, module.group_size),
    )


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_compile(format: str, symmetric: bool) -> None:
    """One graph without a break, with gradients, for changing shapes."""
    torch._dynamo.reset()
    module = make(format, symmetric=symmetric, activation="gelu")
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
    model, x = nn.Sequential(make(), nn.LayerNorm(40), make("nf4", k=40)), torch.randn(5, 96)
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


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_export(format: str, symmetric: bool) -> None:
    module, x = make(format, k=97, symmetric=symmetric, activation="silu").eval(), torch.randn(4, 97)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2, max=512)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for m in (2, 4, 77):
        x = torch.randn(m, 97)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_fx_and_vmap() -> None:
    module, x, other = make().requires_grad_(False), torch.randn(5, 96), torch.randn(3, 96)
    expected = module(other)
    assert torch.equal(torch.jit.trace(module, x)(other), expected)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(module))(other), expected)


# ---- the short way ----------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return count_plans(monkeypatch, EagerPlan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fast_path_equals_the_operator(isa: str, dtype: torch.dtype, fast: list[bool]) -> None:
    for format, symmetric in KINDS:
        for bias in (True, False):
            module = make(format, symmetric=symmetric, activation="gelu", bias=bias).requires_grad_(False)
            for shape in ((1, 96), (96,), (2, 5, 96), (0, 96), (70, 96)):
                x = torch.randn(shape).to(dtype)
                fast.clear()
                y = module(x)
                assert fast == [True]
                assert torch.equal(y, OP(*arguments(module, x)))
                assert y.shape == (*shape[:-1], 40)


@pytest.mark.parametrize("case", NOT_FAST)
def test_who_watches_sees_the_operator(case: str, fast: list[bool]) -> None:
    assert_watched("int4_linear", case, make().requires_grad_(False), lambda m, x: OP(*arguments(m, x)), fast)


def set_all_data(module: Int4Linear) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    bias_of(module).data.mul_(2)


CHANGES: dict[str, Callable[[Int4Linear], Any]] = {
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.randn(40))),
    "no bias": lambda m: setattr(m, "bias", None),
    "bias in place": lambda m: bias_of(m).mul_(3),
    "bias.data": lambda m: setattr(bias_of(m), "data", torch.arange(40.0)),
    "bias in half": lambda m: setattr(bias_of(m), "data", torch.arange(40).half()),
    "every data": set_all_data,
    "state_dict": lambda m: m.load_state_dict(make().state_dict()),
    "assigned": lambda m: m.load_state_dict(make().state_dict(), assign=True),
    "activation": lambda m: setattr(m, "activation", "relu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_never_missed(change: str) -> None:
    module, x = make(), torch.randn(5, 96)
    with torch.no_grad():
        before = module(x)
        CHANGES[change](module)
        litter = [torch.full((40,), 1e9) for _ in range(50)]  # takes over what was freed
        y = module(x)
        assert torch.equal(y, OP(*arguments(module, x)))
        torch.testing.assert_close(y, loaded(like(module), module.state_dict())(x), rtol=1e-3, atol=1e-3)
        assert not torch.equal(y, before)
    del litter


def test_gradients_switch_the_fast_path(fast: list[bool]) -> None:
    module, x = make(), torch.randn(5, 96)
    assert module(x).requires_grad  # the bias may be trained
    assert True not in fast
    with torch.no_grad():
        assert not module(x.requires_grad_()).requires_grad
    with torch.inference_mode():
        module(torch.randn(5, 96))
    assert fast.count(True) == 2


def test_unknown_backend_set_later_raises() -> None:
    module, x = make(), torch.randn(2, 96)
    module(x)
    module.backend = "bogus"
    with torch.no_grad(), pytest.raises(ValueError, match="backend='bogus', expected one of auto"):
        module(x)


# ---- threads ----------------------------------------------------------------------------------------------------


def test_python_threads() -> None:
    """Callers at once, each with a team of two, while another thread replaces the state with an equal one."""
    module = Int4Linear.from_float(nn.Linear(300, 500)).requires_grad_(False)
    assert wrong_callers(module, [torch.randn(m, 300) for m in (1, 7, 64, 200)], calls=20) == []
