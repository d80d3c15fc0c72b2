"""``SparseLinear``: checkpoints, copies, casts, the meta device, damaged files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn import SparseLinear
from pycompress.ops.sparse_linear_eager import EagerPlan, Forms
from tests.held_bytes import held_bytes
from tests.sparse_oracle import block_mask
from tests.test_int8_linear import CASTS, assert_same, saved
from tests.test_sparse_linear_module import DTYPES, K, N, bias_of, like, loaded, make, tensors

KB = -(-K // 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_plain(dtype: str, bias: bool) -> None:
    """Whatever forms are held: bitmap and values as documented, by numpy."""
    linear = nn.Linear(K, N, bias)
    linear.weight.data *= block_mask(N, K, 0.7)
    for format in ops.FORMATS:
        module = SparseLinear.from_dense(linear, dtype=dtype, format=format)
        values, weight_dtype = linear.weight[linear.weight != 0], ops.SPARSE_DTYPES[dtype]
        expected = {
            "weight_bitmap": torch.from_numpy(np.packbits(linear.weight.detach() != 0, axis=1, bitorder="little")),
            "weight_values": values.to(weight_dtype),
        }
        if dtype == "int8":
            q, scale = ops.quantize_weight(linear.weight)
            expected |= {"weight_values": q[linear.weight != 0], "weight_scale": scale}
        if bias:
            expected["bias"] = linear.bias
        state = nn.Sequential(module).state_dict()
        assert_same({name.removeprefix("0."): t for name, t in sorted(state.items())}, dict(sorted(expected.items())))


COPIES: dict[str, Callable[[SparseLinear], SparseLinear]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "copy": copy.copy,
    "share_memory": lambda m: copy.deepcopy(m).share_memory(),
    "float and back": lambda m: copy.deepcopy(m).to(torch.float32),
    "through meta": lambda m: loaded(copy.deepcopy(m).to("meta").to_empty(device="cpu"), m.state_dict()),
    "to_empty": lambda m: loaded(copy.deepcopy(m).to_empty(device="cpu"), m.state_dict()),
    "through half": lambda m: loaded(copy.deepcopy(m).half().float(), m.state_dict()),
    "a new module": lambda m: loaded(like(m), m.state_dict()),
    "a saved file": lambda m: loaded(like(m), saved(m.state_dict())),
    "assigned": lambda m: loaded(like(m, device="meta"), dict(m.state_dict()), assign=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_equal_and_independent(dtype: str, how: str) -> None:
    for format in ops.FORMATS:
        module = make(dtype, activation="gelu", format=format)
        with torch.no_grad():
            inputs = [torch.randn(m, K) for m in (1, 5, 70)]
            expected = [module(x) for x in inputs]
            other = COPIES[how](module)
            assert_same(tensors(module), tensors(other))
            assert all(torch.equal(other(x), y) for x, y in zip(inputs, expected, strict=True))
            assert other.extra_repr() == module.extra_repr()
            assert other.forms() == module.forms()
            other._buffers["weight_values"] = other.weight_values.flip(0).contiguous()
            assert not torch.equal(other(inputs[1]), expected[1])
            assert torch.equal(module(inputs[1]), expected[1])


@pytest.mark.parametrize("assign", [False, True])
def test_loading_takes_any_number_of_values(assign: bool) -> None:
    """And neither shares memory with the checkpoint nor keeps forms of the old weight."""
    x = torch.randn(20, K)
    for format in ops.FORMATS:
        module = make(format=format)
        for sparsity in (0.2, 0.95, 1.0, 0.0):
            linear = nn.Linear(K, N)
            mask = block_mask(N, K, sparsity)
            other = SparseLinear.from_dense(linear, mask, format=format)
            state = other.state_dict()
            loaded(module, state, assign=assign)
            torch.testing.assert_close(module(x), other(x), rtol=1e-6, atol=1e-6)
            assert module.nnz == mask.sum()
            state["weight_values"].zero_()
            assert torch.equal(module.to_dense(), linear.weight * mask)


def test_meta() -> None:
    for dtype in DTYPES:
        source, x = make(dtype), torch.randn(3, K)
        state, expected = source.state_dict(), source(x)
        with torch.device("meta"):
            module = SparseLinear(K, N, dtype=dtype)
        assert module.to_dense().is_meta
        assert module(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)
        # dict: torch notes assign=True in the metadata that travels with a state_dict
        assert torch.equal(loaded(copy.deepcopy(module), dict(state), assign=True)(x), expected)
        assert torch.equal(loaded(copy.deepcopy(module).to_empty(device="cpu"), state)(x), expected)
        with pytest.warns(UserWarning, match="meta"):
            module.load_state_dict(state)  # without assign torch leaves meta tensors as they are
        assert module.weight_bitmap.is_meta


def flipped(state: dict[str, Tensor], row: int, byte: int, bit: int) -> Tensor:
    bitmap = state["weight_bitmap"].clone()
    bitmap[row, byte] ^= 1 << bit
    return bitmap


State = dict[str, Tensor]
STATE_ERRORS: dict[str, tuple[Callable[[State], dict[str, Any]], str]] = {
    "a bit flipped": (lambda s: {"weight_bitmap": flipped(s, 3, 2, 1)}, "the bitmap keeps .* but there are"),
    "a bit past K": (lambda s: {"weight_bitmap": flipped(s, 3, KB - 1, 7)}, "0.weight_bitmap: .*K=97"),
    "a value lost": (lambda s: {"weight_values": s["weight_values"][1:]}, "the bitmap keeps .* but there are"),
    "a value more": (lambda s: {"weight_values": s["weight_values"].repeat(2)[: s["weight_values"].numel() + 1]},
                     "the bitmap keeps .* but there are"),
    "bitmap shape": (lambda s: {"weight_bitmap": s["weight_bitmap"][:, 1:]}, r"bitmap is torch.uint8 \(40, 12\)"),
    "bitmap rows": (lambda s: {"weight_bitmap": s["weight_bitmap"][1:]}, r"\(39, 13\), expected .*\(40, 13\)"),
    "bitmap dtype": (lambda s: {"weight_bitmap": s["weight_bitmap"].to(torch.int8)}, "bitmap is torch.int8"),
    "values dtype": (lambda s: {"weight_values": s["weight_values"].double()},
                     "values is torch.float64 .*, expected torch.int8"),
    "values shape": (lambda s: {"weight_values": s["weight_values"][None]}, r"expected torch.int8 \(nnz,\)"),
    "scale shape": (lambda s: {"weight_scale": torch.ones(41)}, r"\(41,\), expected torch.float32 \(40,\)"),
    "scale dtype": (lambda s: {"weight_scale": torch.ones(40).half()}, "weight_scale is torch.float16"),
    "bias shape": (lambda s: {"bias": torch.ones(39)}, r"bias is torch.float32 \(39,\), expected \(40,\)"),
    "no bitmap": (lambda s: {"weight_bitmap": None}, "comes without 0.weight_bitmap; they belong together"),
    "no values": (lambda s: {"weight_values": None}, "comes without 0.weight_values"),
    "no scale": (lambda s: {"weight_scale": None}, "comes without 0.weight_scale"),
    "not a tensor": (lambda s: {"weight_values": 3.0}, "values is float"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATE_ERRORS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_bad_state_changes_nothing(case: str, assign: bool) -> None:
    changes, message = STATE_ERRORS[case]
    model = nn.Sequential(make("int8"))
    layer: SparseLinear = model[0]  # type: ignore[assignment]
    x, before = torch.randn(3, K), tensors(layer)
    y = layer(x)
    new = tensors(make("int8"))
    new |= changes(new)
    state = {f"0.{name}": t for name, t in new.items() if t is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign)
    assert_same(tensors(layer), before)
    assert torch.equal(layer(x), y)


def test_every_flipped_bit_of_a_small_bitmap_is_noticed() -> None:
    module = make(k=11, n=3)
    state = module.state_dict()
    for row in range(3):
        for byte in range(2):
            for bit in range(8):
                with pytest.raises(RuntimeError, match="bitmap"):
                    module.load_state_dict({**state, "weight_bitmap": flipped(state, row, byte, bit)})


def test_missing_and_unexpected_keys() -> None:
    state, int8 = make().state_dict(), make("int8").state_dict()
    with pytest.raises(RuntimeError, match=r"values is torch\.int8"):
        SparseLinear(K, N).load_state_dict(int8)
    with pytest.raises(RuntimeError, match="comes without weight_scale"):
        SparseLinear(K, N, dtype="int8").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        SparseLinear(K, N, bias=False).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_scale"):
        SparseLinear(K, N).load_state_dict({**state, "weight_scale": torch.ones(N)})
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        SparseLinear(K, N).load_state_dict(make(bias=False).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_bitmap.*weight_values"):
        SparseLinear(K, N).load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_bitmap"):  # a dense checkpoint
        SparseLinear(K, N).load_state_dict(nn.Linear(K, N).state_dict())
    module = make()
    before = tensors(module)
    result = module.load_state_dict({}, strict=False)
    assert_same(tensors(module), before)
    assert "bias" in result.missing_keys
    assert module.load_state_dict({"more": torch.ones(1)}, strict=False).unexpected_keys == ["more"]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("weight", DTYPES)
def test_casts_leave_the_weight_alone(weight: str, cast: str) -> None:
    function, dtype = CASTS[cast]
    for format in ops.FORMATS:
        model = nn.Sequential(make(weight, format=format), nn.LayerNorm(N))
        before = tensors(model[0])
        x = torch.randn(3, K).to(dtype if dtype != torch.float64 else torch.float32)
        model[0](x)
        after = tensors(function(model)[0])  # type: ignore[index]
        # the kernels take no float64 bias
        assert after.pop("bias").dtype == (torch.float32 if dtype == torch.float64 else dtype)
        before.pop("bias")
        assert_same(before, after)
        assert model[0](x).dtype == x.dtype


# ---- derived forms are never stale ------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[SparseLinear], Any]] = {
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.randn(N))),
    "no bias": lambda m: setattr(m, "bias", None),
    "bias in place": lambda m: bias_of(m).mul_(3),
    "bias.data": lambda m: setattr(m.bias, "data", torch.arange(float(N))),
    "bias in half": lambda m: setattr(m.bias, "data", torch.arange(N).half()),
    "values": lambda m: setattr(m, "weight_values", m.weight_values.flip(0)),
    "values in place": lambda m: m.weight_values.copy_(m.weight_values.flip(0)),
    "values.data": lambda m: setattr(m.weight_values, "data", m.weight_values.flip(0)),
    "bitmap": lambda m: setattr(m, "weight_bitmap", m.weight_bitmap.flip(0)),
    "bitmap in place": lambda m: m.weight_bitmap.copy_(m.weight_bitmap.flip(0)),
    "scale": lambda m: setattr(m, "weight_scale", torch.rand(N)),
    "scale in place": lambda m: m.get_buffer("weight_scale").mul_(3),
    "scale.data": lambda m: setattr(m.weight_scale, "data", torch.rand(N)),
    "state_dict": lambda m: m.load_state_dict(make("int8").state_dict()),
    "activation": lambda m: setattr(m, "activation", "relu"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("format", ops.FORMATS)
def test_changes_are_never_missed(format: str, change: str) -> None:
    module, x = make("int8", format=format), torch.randn(20, K)
    with torch.no_grad():
        before = module(x)
        CHANGES[change](module)
        litter = [torch.full((N * K,), 1e9) for _ in range(20)]  # takes over what was freed
        y = module(x)
        fresh = like(module, format="bitmap", backend="reference")
        torch.testing.assert_close(y, loaded(fresh, module.state_dict())(x), rtol=1e-3, atol=1e-3)
        assert not torch.equal(y, before)
    del litter


@pytest.mark.parametrize("format", ops.FORMATS)
def test_functional_call(format: str) -> None:
    """Other values than the forms were made of, with and without gradients."""
    module, x = make(format=format), torch.randn(20, K)
    values = torch.randn(module.nnz)
    expected = loaded(like(module), {**module.state_dict(), "weight_values": values})(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = torch.func.functional_call(module, {"weight_values": values}, (x,))
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            assert not torch.equal(module(x), y)


def test_a_damaged_state_in_memory_raises() -> None:
    module = make()
    module.weight_values = module.weight_values[1:]
    for grad in (False, True):
        with pytest.raises(ValueError, match="the bitmap keeps"), torch.set_grad_enabled(grad):
            module(torch.randn(3, K))
    with pytest.raises(ValueError, match="the bitmap keeps"):
        module.to_dense()


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ops.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_held_twice(dtype: str, format: str) -> None:
    module = make(dtype, k=200, n=100, format=format).requires_grad_(False)
    state = module.state_dict()
    for change in (lambda: module(torch.randn(2, 200)), lambda: module.load_state_dict(state), module.half):
        change()
        assert held_bytes(module, EagerPlan, Forms) <= module.memory_bytes()
    module(torch.randn(2, 200))
    before = module.memory_bytes()
    assert module.mask.shape == module.to_dense().shape == (100, 200)
    assert held_bytes(module, EagerPlan, Forms) <= before
