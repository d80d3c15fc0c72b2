"""The short way from ``Int8Linear`` to the kernel in plain eager mode: taken where nothing watches, never stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn import Int8Linear
from pycompress.ops.int8_matmul_eager import EagerPlan
from tests.eager_watchers import NOT_FAST, assert_watched, count_plans
from tests.test_int8_linear import bias_of, loaded, make


def through_op(module: Int8Linear, x: Tensor) -> Tensor:
    return torch.ops.pycompress.int8_linear.default(
        x, module._weight, module.weight_scale, module.bias, module.mode, module.input_scale,
        module.input_zero_point, module.activation, module.backend,
    )  # fmt: skip


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return count_plans(monkeypatch, EagerPlan)


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


@pytest.mark.parametrize("case", NOT_FAST)
def test_who_watches_sees_the_operator(case: str, fast: list[bool]) -> None:
    assert_watched("int8_linear", case, make().requires_grad_(False), through_op, fast)


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
    init = EagerPlan.__init__

    def counted(self: EagerPlan, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(EagerPlan, "__init__", counted)
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
        expected = module(x) - bias_of(module) + bias
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
    "bias in place": lambda m: bias_of(m).mul_(3),
    "bias.data": set_data("bias", torch.arange(40.0)),
    "bias in half": set_data("bias", torch.arange(40).half()),
    "scale": lambda m: setattr(m, "weight_scale", torch.rand(40)),
    "scale in place": lambda m: m.weight_scale.mul_(3),
    "scale.data": set_data("weight_scale", torch.rand(40)),
    "input_scale": lambda m: setattr(m, "input_scale", torch.tensor(0.1)),
    "input_scale in place": lambda m: m.get_buffer("input_scale").mul_(2),
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
        fresh = Int8Linear(96, 40, module.bias is not None, mode=module.mode, activation=module.activation)
        torch.testing.assert_close(y, loaded(fresh, module.state_dict())(x), rtol=1e-3, atol=1e-3)
        assert change == "half" or not torch.equal(y, before)
    del litter


def test_options_may_change() -> None:
    module, x = make(), torch.randn(5, 96)
    with torch.no_grad():
        for name, value in (("activation", "relu"), ("mode", "weight_only"), ("backend", "reference")):
            before = module(x)
            setattr(module, name, value)
            y = module(x)
            assert torch.equal(y, through_op(module, x))
            assert name == "backend" or not torch.equal(y, before)


def test_recycled_memory_is_noticed(fast: list[bool]) -> None:
    """Memory freed through .data may come back as another tensor's, at the same address."""
    module, x = make("dynamic").requires_grad_(False), torch.randn(3, 96)
    module(x)
    for _ in range(50):
        assert module.bias is not None
        module.bias.data = torch.empty(0)
        module.bias.data = torch.randn(40).half()
        assert torch.equal(module(x), through_op(module, x))


def test_wrong_k_does_not_spoil_the_plan(fast: list[bool]) -> None:
    module = make("dynamic").requires_grad_(False)
    with pytest.raises(ValueError, match="x has K=95 but weight has K=96"):
        module(torch.randn(2, 95))
    fast.clear()
    module(torch.randn(2, 96))
    assert fast == [True]


def test_unknown_backend_set_later_raises() -> None:
    module, x = make("dynamic"), torch.randn(2, 96)
    module(x)
    module.backend = "bogus"
    with torch.no_grad(), pytest.raises(ValueError, match="backend='bogus', expected one of auto"):
        module(x)


def test_torch_without_the_private_questions(monkeypatch: pytest.MonkeyPatch, fast: list[bool]) -> None:
    module, x = make("dynamic").requires_grad_(False), torch.randn(2, 96)
    expected = module(x)
    monkeypatch.setattr("pycompress.ops.eager._CAN_ASK_OF_AUTOCAST", False)
    fast.clear()
    assert torch.equal(module(x), expected)
    assert fast == []


def test_to_empty_and_double() -> None:
    module, x = make("dynamic"), torch.randn(2, 96)
    state = module.state_dict()
    expected = module(x)
    module.to_empty(device="cpu")
    assert module.state_dict()["weight"].shape == (40, 96)
    module.load_state_dict(state)
    assert torch.equal(module.double()(x), expected)
