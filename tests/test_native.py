"""``pycompress.native``: layers from numpy arrays give the bits of ``pycompress.nn``, on every instruction set."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pycompress import native, ops
from pycompress.nn import Int4Linear, Int8Linear, SparseLinear
from tests import oracle

RNG = np.random.default_rng(0)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RANGE = (-3.0, 4.0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def as_torch(x: np.ndarray) -> torch.Tensor:
    """Bits in uint16 are bfloat16."""
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == np.uint16 else torch.from_numpy(x)


def as_numpy(t: torch.Tensor) -> np.ndarray:
    t = t.detach()
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()


def same(layer: Callable[[np.ndarray], np.ndarray], module: nn.Module, x: np.ndarray) -> None:
    y = layer(x)
    with torch.no_grad():
        expected = as_numpy(module(as_torch(np.ascontiguousarray(x))))
    assert y.dtype == x.dtype
    assert y.flags.c_contiguous
    np.testing.assert_array_equal(y.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


def inputs(k: int) -> list[np.ndarray]:
    """Every dtype, leading dimensions, and views that are not contiguous."""
    wide = floats(7, 2 * k)
    unaligned = np.zeros(4 * k * 3 + 1, np.uint8)[1:].view(np.float32).reshape(3, k)
    unaligned[...] = floats(3, k)
    cases = [
        floats(1, k), floats(k), floats(9, k), floats(40, k), floats(0, k), floats(2, 3, 4, k), floats(3, 1, k),
        wide[:, ::2], wide[:, k:], wide[::-1, :k], floats(k, 5).T, floats(3, 8, k)[:, ::3],
        floats(2, 3, 4, k)[:, ::2, ::2], np.broadcast_to(floats(1, k), (5, k)), unaligned,
        floats(4, k).astype(np.float16), as_numpy(torch.randn(6, k).bfloat16()),
    ]  # fmt: skip
    return cases


# ---- the same bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_int8_linear(isa: str, mode: str, activation: str) -> None:
    for n, k, bias in ((40, 96, True), (17, 33, False), (1, 1, True)):
        linear = nn.Linear(k, n, bias)
        input_range = RANGE if mode == "static" else None
        module = Int8Linear.from_float(linear, mode, activation, input_range=input_range)
        weight, b = as_numpy(linear.weight), as_numpy(linear.bias) if bias else None
        layer = native.Int8Linear.from_float(weight, b, mode=mode, activation=activation, input_range=input_range)
        assert isa in layer.kernel
        np.testing.assert_array_equal(layer.weight, module.weight.numpy())
        np.testing.assert_array_equal(layer.weight_scale, module.weight_scale.numpy())
        for x in inputs(k):
            same(layer, module, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("format", ["bitmap", "index"])
def test_sparse_linear(isa: str, dtype: str, format: str) -> None:
    for n, k in ((40, 96), (17, 33)):
        linear = nn.Linear(k, n)
        mask = torch.rand(n, k) > 0.7
        module = SparseLinear.from_dense(linear, mask, dtype=dtype, format=format, activation="relu")
        bias = as_numpy(linear.bias)
        layers = []
        if dtype != "bfloat16":
            made = native.SparseLinear.from_dense(
                as_numpy(linear.weight), mask.numpy(), bias, dtype=dtype, format=format, activation="relu"
            )
            layers.append(made)
        scale = None if module.weight_scale is None else module.weight_scale.numpy()
        state = module.weight_bitmap.numpy(), as_numpy(module.weight_values), scale, bias
        layers.append(native.SparseLinear(*state, in_features=k, format=format, activation="relu"))
        for layer in layers:
            assert layer.nnz == module.nnz
            np.testing.assert_array_equal(layer.to_dense(), as_numpy(module.to_dense()))
            for x in inputs(k):
                same(layer, module, x)


def test_sparse_auto_takes_the_bitmap_for_few_tokens() -> None:
    weight = floats(40, 96)
    weight[RNG.random(weight.shape) > 0.3] = 0
    auto = native.SparseLinear.from_dense(weight)
    forms = {name: native.SparseLinear.from_dense(weight, format=name) for name in ("bitmap", "index")}
    assert forms["bitmap"].memory_bytes() < forms["index"].memory_bytes() <= auto.memory_bytes()
    assert auto.kernel == f"{forms['bitmap'].kernel}+{forms['index'].kernel}"
    np.testing.assert_array_equal(auto.to_dense(), weight)
    for m in (1, 8, 9, 100):
        x = floats(m, 96)
        np.testing.assert_array_equal(auto(x), forms["bitmap" if m <= 8 else "index"](x))


@pytest.mark.parametrize(("format", "symmetric"), [("int4", True), ("int4", False), ("nf4", True)])
def test_int4_linear(isa: str, format: str, symmetric: bool) -> None:
    for n, k, group in ((40, 96, 32), (17, 33, 16), (5, 7, -1)):
        linear = nn.Linear(k, n)
        module = Int4Linear.from_float(linear, format, "silu", group_size=group, symmetric=symmetric)
        state: dict[str, Any] = {name: as_numpy(t) for name, t in module.state_dict().items()}
        layer = native.Int4Linear(**state, in_features=k, group_size=group, format=format, activation="silu")
        for x in inputs(k):
            same(layer, module, x)


def test_bfloat16_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weight, x = floats(24, 40), floats(3, 40)
    layer = native.Int8Linear.from_float(weight.astype(ml_dtypes.bfloat16), floats(24).astype(ml_dtypes.bfloat16))
    y = layer(x.astype(ml_dtypes.bfloat16))
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y.view(np.uint16), layer(x.astype(ml_dtypes.bfloat16).view(np.uint16)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_view(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 70))
    shape = (*data.draw(st.lists(st.integers(0, 4), max_size=3)), k)
    linear = nn.Linear(k, n)
    layer = native.Int8Linear.from_float(as_numpy(linear.weight), as_numpy(linear.bias))
    x = floats(*(2 * size for size in shape))
    steps = data.draw(st.lists(st.sampled_from([1, 2]), min_size=len(shape), max_size=len(shape)))
    view = x[tuple(slice(0, size * step, step) for size, step in zip(shape, steps, strict=True))]
    same(layer, Int8Linear.from_float(linear), view)


def test_quantize_weight_is_torchs() -> None:
    for weight in (floats(30, 50), np.zeros((3, 4), np.float32), floats(5, 0), floats(30, 50).astype(np.float16)):
        q, scale = native.quantize_weight(weight)
        expected = ops.quantize_weight(torch.from_numpy(weight))
        np.testing.assert_array_equal(q, expected[0].numpy())
        np.testing.assert_array_equal(scale, expected[1].numpy())
    wide = floats(30, 50).astype(np.float64)
    np.testing.assert_array_equal(native.quantize_weight(wide)[0], native.quantize_weight(wide.astype(np.float32))[0])


def test_against_float64() -> None:
    weight, bias, x = floats(30, 50), floats(30), floats(9, 50)
    q, scale = native.quantize_weight(weight)
    y = native.Int8Linear(q, scale, bias, mode="weight_only")(x)
    given_x, given_q, given_scale, given_bias = (torch.from_numpy(array) for array in (x, q, scale, bias))
    expected, magnitude = oracle.int8_linear(given_x, given_q, given_scale, given_bias, "weight_only", "none")
    oracle.assert_close(torch.from_numpy(y), expected, magnitude, torch.float32, terms=50)


# ---- what a layer keeps -----------------------------------------------------------------------------------------


def test_a_layer_keeps_copies() -> None:
    weight, bias, x = floats(20, 30), floats(20), floats(4, 30)
    q, scale = native.quantize_weight(weight)
    layers = [native.Int8Linear(q, scale, bias), native.SparseLinear.from_dense(weight, None, bias)]
    before = [layer(x) for layer in layers]
    for array in (q, scale, bias, weight):
        array[...] = 1
    for layer, expected in zip(layers, before, strict=True):
        np.testing.assert_array_equal(layer(x), expected)
        assert "kernel=" in repr(layer)
    assert layers[0].memory_bytes() < 4 * 20 * 30


def test_threads_change_no_bit() -> None:
    weight, x = floats(700, 300), floats(150, 300)
    results = [native.Int8Linear.from_float(weight, threads=threads)(x) for threads in (1, 2, 5)]
    before = native.get_num_threads()
    try:
        native.set_num_threads(3)
        assert native.get_num_threads() == 3
        results.append(native.Int8Linear.from_float(weight)(x))
    finally:
        native.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_callers_in_parallel() -> None:
    layer, x = native.Int8Linear.from_float(floats(200, 300), threads=2), [floats(m, 300) for m in (1, 9, 40)]
    expected, wrong = [layer(item) for item in x], []

    def call(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(layer(x[i]), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


# ---- errors -----------------------------------------------------------------------------------------------------

Q, SCALE = np.ones((4, 9), np.int8), np.ones(4, np.float32)
BITMAP, VALUES = np.full((4, 2), [[255, 1]], np.uint8), np.ones(36, np.float32)
BITS4 = np.zeros((4, 5), np.uint8)

ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "mode": (ValueError, "mode='int4', expected one of dynamic", lambda: native.Int8Linear(Q, SCALE, mode="int4")),
    "activation": (ValueError, "activation='tanh'", lambda: native.Int8Linear(Q, SCALE, activation="tanh")),
    "float weight": (TypeError, "weight has dtype float32, expected int8",
                     lambda: native.Int8Linear(Q.astype(np.float32), SCALE)),
    "list": (TypeError, "weight is a list, expected a numpy array", lambda: native.Int8Linear([[1]], SCALE)),  # type: ignore[arg-type]
    "1-D": (ValueError, "weight has shape (9,), expected (any, any)", lambda: native.Int8Linear(Q[0], SCALE)),
    "scale": (ValueError, "weight_scale has shape (3,), expected (4)", lambda: native.Int8Linear(Q, SCALE[:3])),
    "scale dtype": (TypeError, "weight_scale has dtype float64", lambda: native.Int8Linear(Q, SCALE.astype(float))),
    "bias": (ValueError, "bias has shape (3,), expected (4,)", lambda: native.Int8Linear(Q, SCALE, SCALE[:3])),
    "bias dtype": (TypeError, "bias has dtype int8", lambda: native.Int8Linear(Q, SCALE, Q[:, 0])),
    "no statics": (ValueError, "needs input_scale and input_zero_point",
                   lambda: native.Int8Linear(Q, SCALE, mode="static")),
    "statics": (ValueError, "belong to mode='static'", lambda: native.Int8Linear(Q, SCALE, input_scale=1.0)),
    "zero point": (ValueError, "input_zero_point=256, expected a whole number in 0..255",
                   lambda: native.Int8Linear(Q, SCALE, mode="static", input_scale=1.0, input_zero_point=256)),
    "input scale": (ValueError, "input_scale=0.000000, expected a positive normal number",
                    lambda: native.Int8Linear(Q, SCALE, mode="static", input_scale=0.0, input_zero_point=0)),
    "range": (ValueError, "static mode needs a range",
              lambda: native.Int8Linear.from_float(Q.astype(np.float32), mode="static")),
    "NaN": (ValueError, "row 1 of the weight holds NaN or Inf (1 such rows)",
            lambda: native.quantize_weight(np.array([[0.0], [np.nan]]))),
    "whole weight": (TypeError, "weight has dtype int8, expected a floating one", lambda: native.quantize_weight(Q)),
    "threads": (ValueError, "threads=0, expected 1 to 4096", lambda: native.Int8Linear(Q, SCALE, threads=0)),
    "threads type": (TypeError, "threads=2.0, expected a whole number", lambda: native.set_num_threads(2.0)),  # type: ignore[arg-type]
    "bits past K": (ValueError, "weight_bitmap has a bit set behind K=7 in row 0",
                    lambda: native.SparseLinear(np.full((4, 1), 255, np.uint8), VALUES[:28], in_features=7)),
    "values": (ValueError, "keeps 36 weights but there are 35 values",
               lambda: native.SparseLinear(BITMAP, VALUES[:35], in_features=9)),
    "in_features": (ValueError, "in_features=17 needs 3 bytes a row, weight_bitmap has 2",
                    lambda: native.SparseLinear(BITMAP, VALUES, in_features=17)),
    "no scale": (ValueError, "weight_scale is missing",
                 lambda: native.SparseLinear(BITMAP, VALUES.astype(np.int8), in_features=9)),
    "superfluous scale": (ValueError, "weight_scale is given", lambda: native.SparseLinear(BITMAP, VALUES, SCALE)),
    "float16 values": (TypeError, "values.astype(numpy.float32)",
                       lambda: native.SparseLinear(BITMAP, VALUES.astype(np.float16), in_features=9)),
    "format": (ValueError, "format='dense', expected one of auto, bitmap, index",
               lambda: native.SparseLinear(BITMAP, VALUES, format="dense")),
    "mask": (ValueError, "mask has shape (4, 8), expected (4, 9)",
             lambda: native.SparseLinear.from_dense(Q.astype(np.float32), Q[:, :8].astype(bool))),
    "kept NaN": (ValueError, "row 0 of the weight holds NaN or Inf",
                 lambda: native.SparseLinear.from_dense(np.full((1, 2), np.inf))),
    "groups": (ValueError, "weight_scale has shape (4, 1), expected (4, 2)",
               lambda: native.Int4Linear(BITS4, SCALE[:, None], group_size=8)),
    "group size": (ValueError, "group_size=0", lambda: native.Int4Linear(BITS4, SCALE[:, None], group_size=0)),
    "nf4 zero point": (ValueError, "weight_zero_point belongs to format='int4'",
                       lambda: native.Int4Linear(BITS4, SCALE[:, None], BITS4[:, :1], format="nf4")),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_call_errors() -> None:
    layer = native.Int8Linear(Q, SCALE)
    for kind, message, x in (
        (ValueError, "x has K=8 but weight has K=9", floats(2, 8)),
        (ValueError, "x is a scalar", np.array(1.0, np.float32)),
        (TypeError, "x has dtype float64, expected float32, float16 or bfloat16", np.ones((2, 9))),
        (TypeError, "x has dtype >f4", np.ones((2, 9), ">f4")),
        (TypeError, "x has dtype int64", np.ones((2, 9), np.int64)),
        (TypeError, "x is a list", [[1.0] * 9]),
        (TypeError, "x is a Tensor", torch.ones(2, 9)),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            layer(x)  # type: ignore[arg-type]


def test_isas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.selected_isa() in native.available_isas()
    monkeypatch.setenv("PYCOMPRESS_ISA", "avx1024")
    with pytest.raises(ValueError, match="unknown instruction set"):
        native.selected_isa()
