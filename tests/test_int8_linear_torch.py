"""``Int8Linear`` and its operator inside torch: the eager fast path, gradients, compile, export, autocast, threads."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pycompress import ops
from pycompress.nn import Int8Linear
from pycompress.ops.int8_matmul_eager import EagerPlan
from tests.test_int8_linear import FUNCTIONS, loaded, make

OP = torch.ops.pycompress.int8_linear.default


def through_op(module: Int8Linear, x: Tensor) -> Tensor:
    return OP(
        x, module._weight, module.weight_scale, module.bias, module.mode, module.input_scale,
        module.input_zero_point, module.activation, module.backend,
    )  # fmt: skip


# ---- the eager fast path ----------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry a call that asked a plan: whether it gave the result."""
    taken: list[bool] = []
    run = EagerPlan.run

    def counted(self: EagerPlan, *args: Any) -> Tensor | None:
        y = run(self, *args)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(EagerPlan, "run", counted)
    return taken


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_fast_path_equals_the_operator(
    isa: str, mode: str, activation: str, dtype: torch.dtype, fast: list[bool]
) -> None:
    for bias in (True, False):
        module = make(mode, activation=activation, bias=bias).requires_grad_(False)
        for shape in ((1, 96), (96,), (2, 5, 96), (0, 96), (130, 96)):
            x = torch.randn(shape).to(dtype)
            fast.clear()
            y = module(x)
            assert fast == [True]
            assert torch.equal(y, through_op(module, x))
            assert y.shape == (*shape[:-1], 40)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class FunctionRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


# What the call is made under, and how x is made; each must take the operator.
NOT_FAST: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[Tensor], Tensor]]] = {
    "x wants a gradient": (nullcontext, lambda x: x.clone().requires_grad_()),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda x: x),
    "dispatch mode": (Recorder, lambda x: x),
    "function mode": (FunctionRecorder, lambda x: x),
    "profiler": (torch.profiler.profile, lambda x: x),
    "old profiler": (torch.autograd.profiler.profile, lambda x: x),
    "subclass": (nullcontext, lambda x: x.as_subclass(Subclass)),
    "parameter": (nullcontext, lambda x: nn.Parameter(x, requires_grad=False)),
    "not contiguous": (nullcontext, transposed),
    "negative bit": (nullcontext, lambda x: torch._neg_view(-x)),
}


@pytest.mark.parametrize("case", NOT_FAST)
def test_who_watches_sees_the_operator(case: str, fast: list[bool]) -> None:
    context, change = NOT_FAST[case]
    module, x = make().requires_grad_(False), torch.randn(5, 96)
    expected = module(x)
    assert fast == [True]
    with context() as watcher:
        y = module(change(x))
    assert True not in fast[1:]
    if case == "autocast":
        assert y.dtype == torch.bfloat16
        expected = through_op(module, x.bfloat16())
    torch.testing.assert_close(torch.Tensor(y.detach()) if case != "autocast" else y, expected, rtol=0, atol=0)
    if isinstance(watcher, (Recorder, FunctionRecorder)):
        assert any("pycompress.int8_linear" in str(func) for func in watcher.seen)
    if case == "profiler":
        assert "pycompress::int8_linear" in {event.key for event in watcher.key_averages()}
    if case == "subclass":
        assert isinstance(y, Subclass)


def test_gradients_switch_the_fast_path(fast: list[bool]) -> None:
    module, x = make(), torch.randn(5, 96)
    assert module(x).requires_grad  # the bias may be trained
    assert True not in fast
    with torch.no_grad():
        assert not module(x.requires_grad_()).requires_grad
    with torch.inference_mode():
        module(torch.randn(5, 96))
    assert fast.count(True) == 2


def test_plan_is_kept(fast: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that the plan cannot take (a gradient, strides) does not make it anew."""
    made = []
    make_plan = EagerPlan.make.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(EagerPlan, "make", classmethod(lambda cls, *args: made.append(1) or make_plan(cls, *args)))
    module = make()
    for _ in range(3):
        module(torch.randn(5, 96))
        module(torch.randn(96, 5).t())
        with torch.no_grad():
            module(torch.randn(5, 96))
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_and_fx() -> None:
    module, x, other = make().requires_grad_(False), torch.randn(5, 96), torch.randn(3, 96)
    expected = module(other)
    traced = torch.jit.trace(module, x)
    assert "pycompress::int8_linear" in str(traced.graph)
    assert torch.equal(traced(other), expected)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(module))(other), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(fast: list[bool]) -> None:
    module, x = make().requires_grad_(False), torch.randn(3, 5, 96)
    expected = module(x)
    assert torch.equal(torch.func.vmap(module)(x), expected)
    torch.func.vmap(lambda i: i + module(x).sum())(torch.zeros(2))
    assert fast == [True]


def test_functional_call() -> None:
    module, x, bias = make(), torch.randn(5, 96), torch.randn(40)
    with torch.no_grad():
        expected = module(x) - module.bias + bias
        torch.testing.assert_close(torch.func.functional_call(module, {"bias": bias}, (x,)), expected)


# ---- stale plans ------------------------------------------------------------------------------------------------


def set_data(name: str, value: Any) -> Callable[[Int8Linear], None]:
    def change(module: Int8Linear) -> None:
        getattr(module, name).data = torch.as_tensor(value)

    return change


def set_all_data(module: Int8Linear) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    module.weight_scale.mul_(2)


def share_each(module: Int8Linear) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.share_memory_()
    module.weight_scale.mul_(2)


CHANGES: dict[str, Callable[[Int8Linear], Any]] = {
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.randn(40))),
    "no bias": lambda m: setattr(m, "bias", None),
    "bias in place": lambda m: m.bias.mul_(3),
    "bias.data": set_data("bias", torch.arange(40.0)),
    "bias in half": set_data("bias", torch.arange(40).half()),
    "scale": lambda m: setattr(m, "weight_scale", torch.rand(40)),
    "scale in place": lambda m: m.weight_scale.mul_(3),
    "scale.data": set_data("weight_scale", torch.rand(40)),
    "input_scale": lambda m: setattr(m, "input_scale", torch.tensor(0.1)),
    "input_scale in place": lambda m: m.input_scale.mul_(2),
    "input_scale.data": set_data("input_scale", 0.1),
    "zero point.data": set_data("input_zero_point", torch.tensor(3, dtype=torch.int32)),
    "every data": set_all_data,
    "every tensor shared": share_each,
    "state_dict": lambda m: m.load_state_dict(make("static").state_dict()),
    "assigned": lambda m: m.load_state_dict(make("static").state_dict(), assign=True),
    "half": lambda m: m.half(),
    "another way of loading": lambda m: nn.Sequential(m).load_state_dict(
        {f"0.{k}": v for k, v in make("static").state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_never_missed(change: str) -> None:
    module, x = make("static"), torch.randn(5, 96)
    with torch.no_grad():
        before = module(x)
        CHANGES[change](module)
        litter = [torch.full((40,), 1e9) for _ in range(50)]  # takes over what was freed
        y = module(x)
        assert torch.equal(y, through_op(module, x))
        fresh = Int8Linear(96, 40, module.bias is not None, mode="static")
        torch.testing.assert_close(y, loaded(fresh, module.state_dict())(x), rtol=1e-3, atol=1e-3)
        assert change == "half" or not torch.equal(y, before)
    del litter


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
    grads = torch.autograd.grad(module(x), (x, module.bias), grad)

    weight = module.weight.double() * module.weight_scale.double()[:, None]
    x64, bias64 = x.detach().double().requires_grad_(), module.bias.detach().double().requires_grad_()
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
    torch.testing.assert_close(only_bias.bias.grad, torch.full((40,), 5.0))


def test_gradient_of_empty_and_strided_input() -> None:
    module = make(activation="gelu")
    x = torch.randn(0, 96, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == (0, 96)
    assert torch.equal(module.bias.grad, torch.zeros(40))
    wide = torch.randn(5, 192, requires_grad=True)
    module(wide[:, ::2]).sum().backward()
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
        got = torch.autograd.grad(compiled(x).square().sum(), (x, module.bias))
        want = torch.autograd.grad(module(x).square().sum(), (x, module.bias))
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
    assert x.grad.dtype == torch.float32
    assert module.weight_scale.dtype == torch.float32


# ---- threads ----------------------------------------------------------------------------------------------------


def test_python_threads() -> None:
    """Callers at once, each with a team of two, while another thread replaces the state with an equal one."""
    module = Int8Linear.from_float(nn.Linear(300, 500)).requires_grad_(False)
    inputs = [torch.randn(m, 300) for m in (1, 7, 64, 200)]
    expected = [module(x) for x in inputs]
    state, wrong, stop = module.state_dict(), [], threading.Event()

    def call(i: int) -> None:
        torch.set_num_threads(2)
        for _ in range(40):
            if not torch.equal(module(inputs[i]), expected[i]):
                wrong.append(i)

    def reload() -> None:
        while not stop.is_set():
            module.load_state_dict(state)

    before = torch.get_num_threads()
    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    loader = threading.Thread(target=reload)
    for thread in (*callers, loader):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    loader.join()
    torch.set_num_threads(before)
    assert wrong == []
