"""``SparseLinear`` and its operator inside torch: gradients, opcheck, compile, export, autocast, plain eager mode."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycompress import ops
from pycompress.nn import SparseLinear
from pycompress.ops.sparse_linear_eager import EagerPlan
from tests.eager_watchers import NOT_FAST, assert_watched, count_plans, wrong_callers
from tests.test_int8_linear import FUNCTIONS
from tests.test_sparse_linear_module import DTYPES, FixedModel, K, N, bias_of, like, loaded, make

OP = torch.ops.pycompress.sparse_linear.default
MIXED = (8, 0, 60, 1, 2**62, 2)  # every form has its numbers of tokens


def op_args(module: SparseLinear, x: Tensor) -> tuple[Any, ...]:
    return (
        x, module.weight_bitmap, module.weight_values, module.weight_scale, module.bias, module._row_start,
        module._index, module._dense, module.choice, module.activation, module.backend,
    )  # fmt: skip


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients(activation: str, weight: str, dtype: torch.dtype, backend: str) -> None:
    """Against autograd in float64 on the dense weight, the rounding of x passed straight through."""
    module = make(weight, activation=activation, backend=backend, format="bitmap")
    x = torch.randn(2, 5, K).to(dtype).requires_grad_()
    with torch.no_grad():
        before = loaded(like(module, activation="none", backend=backend), module.state_dict())(x).double()
    grad = torch.randn(2, 5, N).to(dtype)
    grads = torch.autograd.grad(module(x), (x, bias_of(module)), grad)

    x64, bias64 = x.detach().double().requires_grad_(), bias_of(module).detach().double().requires_grad_()
    z = F.linear(x64, module.to_dense().double(), bias64)
    z = z + (before - z).detach()  # the value that the activation really saw
    expected = torch.autograd.grad(FUNCTIONS[activation](z), (x64, bias64), grad.double())
    relative = 1e-5 if dtype == torch.float32 else 0.02
    if dtype == torch.float32 and weight == "bfloat16":
        relative = 1e-4
    for got, want in zip(grads, expected, strict=True):
        assert (got.double() - want).abs().max() <= relative * want.abs().max()
    assert grads[0].dtype == dtype
    assert grads[1].dtype == torch.float32


def test_gradient_only_where_wanted() -> None:
    module = make(bias=False)
    x = torch.randn(5, K, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.to_dense().sum(0).expand(5, K), rtol=1e-5, atol=1e-5)
    frozen = make().requires_grad_(False)
    assert not frozen(torch.randn(5, K)).requires_grad
    only_bias = make()
    only_bias(torch.randn(5, K)).sum().backward()
    torch.testing.assert_close(bias_of(only_bias).grad, torch.full((N,), 5.0))


def test_gradient_of_empty_and_strided_input() -> None:
    module = make(activation="gelu")
    x = torch.randn(0, K, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, K)
    torch.testing.assert_close(bias_of(module).grad, torch.zeros(N))
    wide = torch.randn(5, 2 * K, requires_grad=True)
    module(wide[:, ::2]).sum().backward()
    assert wide.grad is not None
    assert (wide.grad[:, 1::2] == 0).all()
    assert wide.grad[:, ::2].abs().sum() > 0


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_second_order_gradient(activation: str) -> None:
    module = make(activation=activation)
    exact = module.to_float()
    x = torch.randn(5, K)

    def penalty(layer: nn.Module) -> Tensor:
        v = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(v).square().sum(), v, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), v)[0]

    expected = penalty(exact)
    assert ((penalty(module) - expected).norm() / expected.norm()).item() < 1e-4


# ---- operator, compile, export, autocast ------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "activation", "dtype", "bias"), [
    ("float32", "none", torch.float32, True), ("bfloat16", "gelu", torch.bfloat16, True),
    ("int8", "silu", torch.float32, False),
])  # fmt: skip
def test_opcheck(weight: str, activation: str, dtype: torch.dtype, bias: bool) -> None:
    module = make(weight, bias=bias, activation=activation, cost_model=FixedModel(*MIXED))
    x = torch.randn(20, K).to(dtype).requires_grad_()
    torch.library.opcheck(OP, op_args(module, x))
    if bias:
        torch.library.opcheck(OP, (x.detach(), module.weight_bitmap, module.weight_values))
    args = (module.weight_bitmap, module.weight_values, module.weight_scale, K)
    for checked in (False, True):
        torch.library.opcheck(torch.ops.pycompress.sparse_unpack.default, (*args, checked))


@pytest.mark.parametrize("weight", DTYPES)
def test_compile(weight: str) -> None:
    """One graph without a break, with gradients, for changing shapes that take different forms."""
    torch._dynamo.reset()
    module = make(weight, activation="gelu", cost_model=FixedModel(*MIXED))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 17, 33):
        x = torch.randn(2, m, K, requires_grad=True)
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
        got = torch.autograd.grad(compiled(x).square().sum(), (x, bias_of(module)))
        want = torch.autograd.grad(module(x).square().sum(), (x, bias_of(module)))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(make(), nn.LayerNorm(N), make(k=N)), torch.randn(5, K)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_compile_sees_a_new_state() -> None:
    torch._dynamo.reset()
    module, x = make(cost_model=FixedModel(*MIXED)), torch.randn(20, K)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        module.load_state_dict(make().state_dict())
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("weight", DTYPES)
def test_export(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the forms inside, and usable where they are foreign."""
    module = make(weight, activation="silu", cost_model=FixedModel(*MIXED)).eval()
    x = torch.randn(4, K)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2, max=512)},))
    (node,) = [node for node in program.graph.nodes if node.target is OP]
    assert None not in node.args[5:8]
    assert tuple(node.args[8]) == MIXED
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    inputs = [torch.randn(m, K) for m in (2, 4, 20, 77)]
    expected = [module(x) for x in inputs]
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(again(x), y)
    monkeypatch.setenv("PYCOMPRESS_ISA", "scalar")
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(again(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", DTYPES)
def test_autocast(weight: str) -> None:
    module, x = make(weight, activation="relu", format="bitmap"), torch.randn(5, K)
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


# ---- the short way in plain eager mode --------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return count_plans(monkeypatch, EagerPlan)


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_fast_path_equals_the_operator(isa: str, weight: str, activation: str, fast: list[bool]) -> None:
    for bias in (True, False):
        module = make(weight, activation=activation, bias=bias, cost_model=FixedModel(*MIXED)).requires_grad_(False)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in ((1, K), (K,), (2, 5, K), (0, K), (130, K)):
                x = torch.randn(shape).to(dtype)
                fast.clear()
                y = module(x)
                assert fast == [True]
                assert torch.equal(y, OP(*op_args(module, x)))
                assert y.shape == (*shape[:-1], N)


@pytest.mark.parametrize("case", NOT_FAST)
def test_who_watches_sees_the_operator(case: str, fast: list[bool]) -> None:
    module = make(format="bitmap").requires_grad_(False)
    assert_watched("sparse_linear", case, module, lambda m, x: OP(*op_args(m, x)), fast)


def test_plan_is_kept(fast: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that the plan cannot take (a gradient, strides, another K) does not make it anew."""
    made = []
    init = EagerPlan.__init__

    def counted(self: EagerPlan, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(EagerPlan, "__init__", counted)
    module = make()
    for _ in range(3):
        module(torch.randn(5, K))
        module(torch.randn(K, 5).t())
        with pytest.raises(ValueError, match="x has K=96"):
            module(torch.randn(5, 96))
        with torch.no_grad():
            module(torch.randn(5, K))
    assert len(made) == 1


def test_inference_tensors(fast: list[bool]) -> None:
    """They count no versions."""
    with torch.inference_mode():
        module, x = make(), torch.randn(20, K)
        y = module(x)
        assert torch.equal(copy.deepcopy(module)(x), y)
    assert fast == [True, True]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    module, x = make().requires_grad_(False), torch.randn(3, 5, K)
    torch.testing.assert_close(torch.func.vmap(module)(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_and_fx() -> None:
    module, x, other = make(format="index").requires_grad_(False), torch.randn(5, K), torch.randn(3, K)
    expected = module(other)
    traced = torch.jit.trace(module, x)
    assert "pycompress::sparse_linear" in str(traced.graph)
    assert torch.equal(traced(other), expected)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(module))(other), expected)


# ---- threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["float32", "int8"])
def test_python_threads(weight: str) -> None:
    """Callers at once, each with a team of two, while another thread replaces the state with an equal one."""
    module = make(weight, k=300, n=200, cost_model=FixedModel(8, 0, 2**62, 1)).requires_grad_(False)
    inputs = [torch.randn(m, 300) for m in (1, 7, 64, 200)]
    assert wrong_callers(module, inputs, 30, lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-5)) == []
