"""``Int8Linear``: conversion, state, memory. What torch does with it is in test_int8_linear_torch.py."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycompress import _native, ops
from pycompress.nn import Int8Linear
from pycompress.ops.int8_matmul_eager import EagerPlan
from tests import oracle
from tests.held_bytes import held_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANGE = (-3.0, 4.0)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def make(mode: str = "dynamic", k: int = 96, n: int = 40, bias: bool = True, **options: Any) -> Int8Linear:
    input_range = RANGE if mode == "static" else None
    return Int8Linear.from_float(nn.Linear(k, n, bias), mode, input_range=input_range, **options)


def bias_of(module: Int8Linear) -> nn.Parameter:
    assert module.bias is not None
    return module.bias


def tensors(module: Int8Linear) -> dict[str, Tensor]:
    """Every value that the module's results depend on."""
    return {name: t.clone() for name, t in module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def saved(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- from float and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_from_float(mode: str, activation: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(96, 40, dtype=dtype).eval()
    before = {name: t.clone() for name, t in linear.state_dict().items()}
    module = Int8Linear.from_float(linear, mode, activation, input_range=RANGE if mode == "static" else None)
    q, scale = ops.quantize_weight(linear.weight)
    assert torch.equal(module.weight, q)
    assert torch.equal(module.weight_scale, scale)
    assert torch.equal(bias_of(module), linear.bias)
    assert bias_of(module).dtype == dtype
    assert not module.training
    assert module.bias is not linear.bias
    assert all(torch.equal(t, before[name]) for name, t in linear.state_dict().items())

    x = torch.randn(7, 96).to(dtype)
    s, z = ops.affine_qparams(*RANGE) if mode == "static" else (1.0, 0)
    expected, magnitude = oracle.int8_linear(x, q, scale, linear.bias.detach(), mode, activation, s, z)
    with torch.no_grad():
        oracle.assert_close(module(x), expected, magnitude, dtype, terms=96 if mode == "weight_only" else 0)
        y = FUNCTIONS[activation](linear(x)).float()
        assert F.cosine_similarity(module(x).float(), y).min() > 0.999


def test_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for cls in (conv1d, type("Subclass", (conv1d,), {})):
        layer, x = cls(40, 96), torch.randn(5, 96)
        nn.init.normal_(layer.bias)
        module = Int8Linear.from_float(layer)
        assert (module.in_features, module.out_features) == (96, 40)
        torch.testing.assert_close(module(x), layer(x), rtol=0, atol=0.01)


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 3, 96), (2, 0, 96), (2, 3, 4, 96)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], backend: str) -> None:
    module, x = make(backend=backend), torch.randn(shape)
    with torch.no_grad():
        y = module(x)
        assert y.shape == (*shape[:-1], 40)
        rows = module(x.reshape(-1, 96)).reshape(y.shape)
    torch.testing.assert_close(y, rows, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 0), (1, 1)])
def test_smallest_layers(k: int, n: int) -> None:
    module = make(k=k, n=n)
    with torch.no_grad():
        assert module(torch.randn(3, k)).shape == (3, n)
        if k == 0:
            assert torch.equal(module(torch.randn(3, k)), bias_of(module).expand(3, n))
    Int8Linear(k, n).load_state_dict(module.state_dict())


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_to_float(activation: str, bias: bool) -> None:
    module = make("weight_only", bias=bias, activation=activation).eval()
    back = module.to_float()
    linear = back[0] if isinstance(back, nn.Sequential) else back
    assert type(linear) is nn.Linear
    assert not linear.training
    assert (linear.bias is None) == (not bias)
    assert (back is linear) == (activation == "none")
    assert torch.equal(linear.weight, module.weight.float() * module.weight_scale[:, None])
    x = torch.randn(5, 96)
    torch.testing.assert_close(module(x), back(x), rtol=1e-5, atol=1e-5)
    assert_same(tensors(Int8Linear.from_float(linear)), tensors(make_like(module)))  # nothing is lost on the way


def make_like(module: Int8Linear) -> Int8Linear:
    other = Int8Linear(module.in_features, module.out_features, module.bias is not None)
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_to_float_has_the_dtype_of_the_bias(dtype: torch.dtype) -> None:
    assert make().to(dtype).to_float().weight.dtype == dtype


def test_from_float_of_a_float64_layer() -> None:
    linear, x = nn.Linear(96, 40, dtype=torch.float64), torch.randn(3, 96)
    torch.testing.assert_close(Int8Linear.from_float(linear)(x), linear(x.double()).float(), rtol=0, atol=0.05)


def test_from_float_keeps_a_frozen_bias_frozen() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    assert not bias_of(Int8Linear.from_float(linear)).requires_grad


def bad_weight(value: float) -> nn.Linear:
    linear = nn.Linear(8, 4)
    linear.weight.data[2, 3] = value
    return linear


CONVERSION_ERRORS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "NaN": (lambda: bad_weight(float("nan")), {}, "row 2 of the weight holds NaN or Inf"),
    "Inf": (lambda: bad_weight(float("inf")), {}, "row 2 of the weight holds NaN or Inf"),
    "meta": (lambda: nn.Linear(8, 4, device="meta"), {}, "meta device"),
    "mode": (lambda: nn.Linear(8, 4), {"mode": "int4"}, "mode='int4', expected one of dynamic"),
    "activation": (lambda: nn.Linear(8, 4), {"activation": "tanh"}, "activation='tanh', expected one of none"),
    "backend": (lambda: nn.Linear(8, 4), {"backend": "gpu"}, "backend='gpu', expected one of auto"),
    "no range": (lambda: nn.Linear(8, 4), {"mode": "static"}, "static mode needs a range"),
    "range": (lambda: nn.Linear(8, 4), {"input_range": RANGE}, "the others take none"),
    "bad range": (lambda: nn.Linear(8, 4), {"mode": "static", "input_range": (1, 0)}, "not a finite range"),
    "not a linear": (lambda: nn.Conv2d(3, 4, 3), {}, "expected an nn.Linear, got Conv2d"),
    "no weight": (nn.ReLU, {}, "expected an nn.Linear, got ReLU"),
    "already int8": (make, {}, "expected a floating"),
}


@pytest.mark.parametrize("case", CONVERSION_ERRORS)
def test_conversion_errors(case: str) -> None:
    source, options, message = CONVERSION_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        Int8Linear.from_float(source(), **options)


def test_call_errors() -> None:
    module = make()
    for x, message in (
        (torch.randn(2, 95), "x has K=95 but weight has K=96"),
        (torch.randn(2, 96).double(), "x has dtype torch.float64"),
        (torch.ones(2, 96, dtype=torch.int64), "x has dtype torch.int64"),
        (torch.tensor(1.0), "x is a scalar"),
        (torch.randn(2, 96, device="meta"), "x is on meta but weight is on cpu; move one"),
        (torch.randn(2, 96).to_sparse(), "x is torch.sparse_coo, expected|x has .*sparse_coo.*, expected"),
    ):
        with pytest.raises(ValueError, match=message):
            module(x)
        with pytest.raises(ValueError, match=message), torch.no_grad():
            module(x)
    module(torch.randn(2, 96))  # an error leaves nothing behind


def test_extra_repr(isa: str) -> None:
    native = f"backend=native:{ops.kernel_name(ops.pack_weight(torch.zeros(8, 8, dtype=torch.int8)))}"
    assert isa in native
    text = "in_features=96, out_features=40, bias="
    assert make().extra_repr() == f"{text}True, mode=dynamic, {native}"
    assert make(bias=False, activation="gelu").extra_repr() == f"{text}False, mode=dynamic, activation=gelu, {native}"
    assert make(backend="reference").extra_repr() == f"{text}True, mode=dynamic, backend=reference"
    assert "backend=reference" in make().to("meta").extra_repr()


# ---- state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_plain(mode: str, bias: bool) -> None:
    expected = {"weight": (torch.int8, (40, 96)), "weight_scale": (torch.float32, (40,))}
    if bias:
        expected["bias"] = (torch.float32, (40,))
    if mode == "static":
        expected |= {"input_scale": (torch.float32, ()), "input_zero_point": (torch.int32, ())}
    state = nn.Sequential(make(mode, bias=bias)).state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        f"0.{name}": value for name, value in expected.items()
    }


COPIES: dict[str, Callable[[Int8Linear], Int8Linear]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "copy": copy.copy,
    "share_memory": lambda m: copy.deepcopy(m).share_memory(),
    "float and back": lambda m: copy.deepcopy(m).to(torch.float32),
    "through meta": lambda m: loaded(copy.deepcopy(m).to("meta").to_empty(device="cpu"), m.state_dict()),
    "to_empty": lambda m: loaded(copy.deepcopy(m).to_empty(device="cpu"), m.state_dict()),
    "through half": lambda m: loaded(copy.deepcopy(m).half().float(), m.state_dict()),
}


def loaded(module: Int8Linear, state: dict[str, Any], **options: Any) -> Int8Linear:
    module.load_state_dict(state, **options)
    return module


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", ops.MODES)
def test_copies_are_equal_and_independent(mode: str, how: str) -> None:
    module, x = make(mode, activation="gelu"), torch.randn(5, 96)
    with torch.no_grad():
        expected = module(x)
        other = COPIES[how](module)
        assert_same(tensors(module), tensors(other))
        assert torch.equal(other(x), expected)
        assert other.extra_repr() == module.extra_repr()
        other._buffers["weight_scale"] = other.weight_scale * 2
        assert not torch.equal(other(x), expected)
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_move_between_instruction_sets(
    isa: str, mode: str, assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = make(mode), torch.randn(5, 96)
    state, pickled, expected = saved(module.state_dict()), pickle.dumps(module), module(x)
    for other in _native.available_isas():
        monkeypatch.setenv("PYCOMPRESS_ISA", other)
        there = loaded(Int8Linear(96, 40, mode=mode), state, strict=True, assign=assign)
        assert_same(tensors(there), state)
        assert there.extra_repr().endswith(f"_{other}")
        torch.testing.assert_close(there(x), expected, rtol=1e-5, atol=1e-5)
        assert pickle.loads(pickled).extra_repr().endswith(f"_{other}")
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)  # packed for `isa`, called under other


def test_loading_does_not_alias_the_checkpoint() -> None:
    for assign in (False, True):
        state = make().state_dict()
        module = loaded(Int8Linear(96, 40), state, assign=assign)
        before = module.weight
        state["weight"].zero_()
        assert torch.equal(module.weight, before)


@pytest.mark.parametrize("mode", ops.MODES)
def test_meta(mode: str) -> None:
    state, x = make(mode).state_dict(), torch.randn(3, 96)
    expected = loaded(Int8Linear(96, 40, mode=mode), state)(x)
    with torch.device("meta"):
        module = Int8Linear(96, 40, mode=mode)
    assert module.weight.is_meta
    assert module(torch.empty(2, 3, 96, device="meta")).shape == (2, 3, 40)
    # dict: torch notes assign=True in the metadata that travels with a state_dict
    assert torch.equal(loaded(copy.deepcopy(module), dict(state), assign=True)(x), expected)
    assert torch.equal(loaded(copy.deepcopy(module).to_empty(device="cpu"), state)(x), expected)
    with pytest.warns(UserWarning, match="meta"):
        module.load_state_dict(state)  # without assign torch leaves meta tensors as they are
    assert module.weight.is_meta


STATE_ERRORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "weight shape": ({"weight": torch.zeros(40, 95, dtype=torch.int8)}, r"weight is torch.int8 \(40, 95\), expected"),
    "float weight": ({"weight": torch.zeros(40, 96)}, "torch.float32.*quantize_ converts it"),
    "uint8 weight": ({"weight": torch.zeros(40, 96, dtype=torch.uint8)}, "weight is torch.uint8"),
    "scale shape": ({"weight_scale": torch.ones(41)}, r"weight_scale is \(41,\), expected \(40,\)"),
    "scale dtype": ({"weight_scale": torch.ones(40).half()}, "weight_scale is torch.float16, expected torch.float32"),
    "bias shape": ({"bias": torch.ones(39)}, r"bias is \(39,\), expected \(40,\)"),
    "input_scale shape": ({"input_scale": torch.ones(2)}, r"input_scale is \(2,\), expected \(\)"),
    "zero point dtype": ({"input_zero_point": torch.tensor(1.0)}, "input_zero_point is torch.float32"),
    "no weight": ({"weight": None}, "0.weight"),
    "no scale": ({"weight_scale": None}, "0.weight_scale"),
}


@pytest.mark.parametrize("case", STATE_ERRORS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_bad_state_changes_nothing(case: str, assign: bool) -> None:
    changes, message = STATE_ERRORS[case]
    module = nn.Sequential(make("static"))
    layer: Int8Linear = module[0]  # type: ignore[assignment]
    x, before = torch.randn(3, 96), tensors(layer)
    y = layer(x)
    state = {f"0.{name}": t for name, t in (tensors(make("static")) | changes).items() if t is not None}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, assign=assign)
    assert_same(tensors(layer), before)
    assert torch.equal(layer(x), y)


def test_missing_and_unexpected_keys() -> None:
    state = make("static").state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*input_scale"):
        Int8Linear(96, 40).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*input_zero_point"):
        Int8Linear(96, 40, mode="static").load_state_dict(make().state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        Int8Linear(96, 40, bias=False).load_state_dict(make().state_dict())
    result = Int8Linear(96, 40).load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert sorted(result.unexpected_keys) == ["input_scale", "input_zero_point"]
    assert Int8Linear(96, 40).load_state_dict({}, strict=False).missing_keys != []


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to device and dtype": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),  # torch casts integers too here
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_int8_and_scales_alone(cast: str) -> None:
    function, dtype = CASTS[cast]
    model = nn.Sequential(make("static"), nn.LayerNorm(40))
    before = tensors(model[0])  # type: ignore[arg-type]
    x = torch.randn(3, 96).to(dtype if dtype != torch.float64 else torch.float32)
    model[0](x)
    after = tensors(function(model)[0])  # type: ignore[index]
    # the kernels take no float64 bias
    assert after.pop("bias").dtype == (torch.float32 if dtype == torch.float64 else dtype)
    before.pop("bias")
    assert_same(before, after)
    if dtype != torch.float64:
        assert model[0](x).dtype == dtype


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(384, 384), (384, 1536), (1536, 384), (768, 3072)])
def test_one_copy_of_the_weight(isa: str, k: int, n: int) -> None:
    module = make(k=k, n=n)
    for change in (lambda: module(torch.randn(2, k)), lambda: module.load_state_dict(module.state_dict()), module.half):
        change()
        assert held_bytes(module, EagerPlan) <= module.memory_bytes() <= 1.05 * n * k
    assert module.weight.shape == (n, k)
    assert held_bytes(module, EagerPlan) <= 1.05 * n * k  # reading .weight keeps nothing
