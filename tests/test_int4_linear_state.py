"""``Int4Linear``'s state: plain in checkpoints, packed in memory, the same on every instruction set."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pycompress import _native, ops
from pycompress.nn import Int4Linear
from tests.int4_oracle import KIND_IDS, KINDS
from tests.test_int4_linear import bias_of, like, loaded, make, tensors
from tests.test_int8_linear import CASTS, assert_same, saved


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_plain(format: str, symmetric: bool, bias: bool) -> None:
    expected = {"weight": (torch.uint8, (40, 49)), "weight_scale": (torch.float32, (40, 4))}
    if bias:
        expected["bias"] = (torch.float32, (40,))
    if not symmetric:
        expected["weight_zero_point"] = (torch.uint8, (40, 4))
    for backend in ("auto", "reference"):
        module = make(format, k=97, bias=bias, symmetric=symmetric, backend=backend)
        state = nn.Sequential(module).state_dict()
        assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
            f"0.{name}": value for name, value in expected.items()
        }


COPIES: dict[str, Callable[[Int4Linear], Int4Linear]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "copy": copy.copy,
    "share_memory": lambda m: copy.deepcopy(m).share_memory(),
    "float and back": lambda m: copy.deepcopy(m).to(torch.float32),
    "through meta": lambda m: loaded(copy.deepcopy(m).to("meta").to_empty(device="cpu"), m.state_dict()),
    "to_empty": lambda m: loaded(copy.deepcopy(m).to_empty(device="cpu"), m.state_dict()),
    "through half": lambda m: loaded(copy.deepcopy(m).half().float(), m.state_dict()),
    "another backend": lambda m: with_backend(copy.deepcopy(m), "triton", "auto"),
}


def with_backend(module: Int4Linear, *backends: str) -> Int4Linear:
    for backend in backends:
        module.backend = backend
    return module


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_copies_are_equal_and_independent(format: str, symmetric: bool, how: str) -> None:
    module, x = make(format, k=97, symmetric=symmetric, activation="gelu"), torch.randn(5, 97)
    with torch.no_grad():
        expected = module(x)
        other = COPIES[how](module)
        assert_same(tensors(module), tensors(other))
        assert torch.equal(other(x), expected)
        assert other.extra_repr() == module.extra_repr()
        loaded(other, {**other.state_dict(), "weight_scale": other.weight_scale * 2})
        assert not torch.equal(other(x), expected)
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_move_between_instruction_sets(
    isa: str, format: str, symmetric: bool, assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = make(format, symmetric=symmetric), torch.randn(5, 96)
    state, pickled, expected = saved(module.state_dict()), pickle.dumps(module), module(x)
    for other in _native.available_isas():
        monkeypatch.setenv("PYCOMPRESS_ISA", other)
        there = loaded(like(module), state, strict=True, assign=assign)
        assert_same(tensors(there), state)
        kernel = ops.int4_kernel_name(there._weight)
        assert there.extra_repr().endswith(kernel)
        torch.testing.assert_close(there(x), expected, rtol=1e-5, atol=1e-5)
        assert pickle.loads(pickled).extra_repr().endswith(kernel)
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)  # packed for `isa`, called under other


def test_loading_does_not_alias_the_checkpoint() -> None:
    for assign in (False, True):
        for backend in ("auto", "triton"):  # packed and plain
            state = make().state_dict()
            module = loaded(Int4Linear(96, 40, group_size=32, backend=backend), state, assign=assign)
            before = module.weight.clone()
            state["weight"].zero_()
            assert torch.equal(module.weight, before)


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_meta(format: str, symmetric: bool) -> None:
    state, x = make(format, symmetric=symmetric).state_dict(), torch.randn(3, 96)
    options: dict[str, Any] = {"format": format, "symmetric": symmetric, "group_size": 32}
    expected = loaded(Int4Linear(96, 40, **options), state)(x)
    with torch.device("meta"):
        module = Int4Linear(96, 40, **options)
    assert module.weight.is_meta
    assert module.weight_scale.is_meta
    assert module(torch.empty(2, 3, 96, device="meta")).shape == (2, 3, 40)
    # dict: torch notes assign=True in the metadata that travels with a state_dict
    assert torch.equal(loaded(copy.deepcopy(module), dict(state), assign=True)(x), expected)
    assert torch.equal(loaded(copy.deepcopy(module).to_empty(device="cpu"), state)(x), expected)
    with pytest.warns(UserWarning, match="meta"):
        module.load_state_dict(state)  # without assign torch leaves meta tensors as they are
    assert module.weight.is_meta


@pytest.mark.parametrize("start", ["cpu", "meta"])
def test_to_empty_holds_a_weight(start: str) -> None:
    """Memory without values is no packed weight: the module holds zeros, and takes calls."""
    for backend in ("auto", "triton"):
        module = make(symmetric=False).to(start)
        module.backend = backend
        module.to_empty(device="cpu")
        bias_of(module).data.zero_()
        assert torch.equal(module(torch.randn(2, 96)), torch.zeros(2, 40)) or backend == "triton"


STATE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "weight shape": ({"weight": torch.zeros(40, 47).byte()}, r"weight is torch.uint8 \(40, 47\), expected"),
    "float weight": ({"weight": torch.zeros(40, 96)}, "torch.float32.*quantize_ converts it"),
    "int8 weight": ({"weight": torch.zeros(40, 48, dtype=torch.int8)}, "weight is torch.int8"),
    "no tensor": ({"weight": 3}, "weight is int, expected torch.uint8"),
    "scale shape": ({"weight_scale": torch.ones(40, 6)}, r"weight_scale is .*\(40, 6\), expected .*\(40, 3\); .*group"),
    "scale dtype": ({"weight_scale": torch.ones(40, 3).half()}, "weight_scale is torch.float16 .*, expected torch.flo"),
    "zero point shape": ({"weight_zero_point": torch.ones(40, 2).byte()}, r"weight_zero_point is .*\(40, 2\)"),
    "zero point dtype": ({"weight_zero_point": torch.ones(40, 3)}, "weight_zero_point is torch.float32"),
    "zero point value": ({"weight_zero_point": torch.full((40, 3), 16).byte()}, "weight_zero_point holds 16, expected"),
    "bias shape": ({"bias": torch.ones(39)}, r"bias is \(39,\), expected \(40,\)"),
    "no weight": ({"weight": None}, "without 0.weight; they belong together"),
    "no scale": ({"weight_scale": None}, "without 0.weight_scale"),
    "no zero point": ({"weight_zero_point": None}, "without 0.weight_zero_point"),
}


@pytest.mark.parametrize("case", STATE_ERRORS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_bad_state_changes_nothing(case: str, assign: bool) -> None:
    changes, message = STATE_ERRORS[case]
    module = nn.Sequential(make(symmetric=False))
    layer: Int4Linear = module[0]  # type: ignore[assignment]
    x, before = torch.randn(3, 96), tensors(layer)
    y = layer(x)
    state = {f"0.{k}": t for k, t in (tensors(make(symmetric=False)) | changes).items() if t is not None}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, assign=assign)
    assert_same(tensors(layer), before)
    assert torch.equal(layer(x), y)


def test_missing_and_unexpected_keys() -> None:
    state = make(symmetric=False).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_zero_point"):
        Int4Linear(96, 40, group_size=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match="without weight_zero_point"):
        Int4Linear(96, 40, group_size=32, symmetric=False).load_state_dict(make().state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        Int4Linear(96, 40, bias=False, group_size=32).load_state_dict(make().state_dict())
    result = Int4Linear(96, 40, group_size=32).load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == ["weight_zero_point"]
    missing = Int4Linear(96, 40, symmetric=False).load_state_dict({}, strict=False).missing_keys
    assert sorted(missing) == ["bias", "weight", "weight_scale", "weight_zero_point"]


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_integers_and_scales_alone(cast: str, backend: str) -> None:
    function, dtype = CASTS[cast]
    model = nn.Sequential(make(symmetric=False, backend=backend), nn.LayerNorm(40))
    before = tensors(model[0])  # type: ignore[arg-type]
    after = tensors(function(model)[0])  # type: ignore[index]
    # the kernels take no float64 bias
    assert after.pop("bias").dtype == (torch.float32 if dtype == torch.float64 else dtype)
    before.pop("bias")
    assert_same(before, after)
    if dtype != torch.float64 and backend == "auto":
        assert model[0](torch.randn(3, 96).to(dtype)).dtype == dtype
