"""The operator on every backend and instruction set, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import _C, ops
from pycompress.ops.int8_matmul import Call, pick
from pycompress.ops.int8_matmul_reference import quantize_rows
from tests import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATIC = {"input_scale": torch.tensor(0.02), "input_zero_point": torch.tensor(97, dtype=torch.int32)}


def make(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, scale = ops.quantize_weight(torch.randn(n, k))
    return torch.randn(m, k).to(dtype), weight, scale, torch.randn(n)


def run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, mode: str, **kwargs: object) -> Tensor:
    static = STATIC if mode == "static" else {}
    return ops.int8_linear(x, weight, scale, bias, mode=mode, **static, **kwargs)  # type: ignore[arg-type]


def check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, mode: str, activation: str, y: Tensor) -> None:
    expected, magnitude = oracle.int8_linear(x, weight, scale, bias, mode, activation, 0.02, 97)
    oracle.assert_close(y, expected, magnitude, x.dtype, terms=x.shape[-1] if mode == "weight_only" else 0)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
def test_native_matches_float64(isa: str, shape: tuple[int, int, int], dtype: torch.dtype, mode: str) -> None:
    x, weight, scale, bias = make(*shape, dtype)
    for b in (bias, None):
        check(x, weight, scale, b, mode, "none", run(x, ops.pack_weight(weight), scale, b, mode, backend="native"))


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
def test_reference_matches_float64(shape: tuple[int, int, int], dtype: torch.dtype, mode: str) -> None:
    x, weight, scale, bias = make(*shape, dtype)
    check(x, weight, scale, bias, mode, "none", run(x, weight, scale, bias, mode, backend="reference"))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(isa: str, dtype: torch.dtype, activation: str) -> None:
    """K = 0 leaves act(bias): the whole range of the activation, tails included."""
    values = torch.cat(
        [torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4])]
    )
    weight, scale = torch.zeros(len(values), 0, dtype=torch.int8), torch.ones(len(values))
    y = ops.int8_linear(torch.zeros(2, 0, dtype=dtype), weight, scale, values, activation=activation)
    bias = values.double().numpy()[None].repeat(2, 0)
    oracle.assert_close(y, oracle.activate(bias, activation), np.abs(bias), dtype)


@pytest.mark.parametrize("m", [*range(1, 14), 47, 200])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 47, 48, 63, 64, 65, 129])
def test_every_tail(isa: str, m: int, n: int) -> None:
    """Every number of rows in a tile with every number of registers in a panel."""
    x, weight, scale, bias = make(m, n, 37)
    check(
        x,
        weight,
        scale,
        bias,
        "dynamic",
        "relu",
        run(x, ops.pack_weight(weight), scale, bias, "dynamic", activation="relu"),
    )
    check(x, weight, scale, bias, "static", "none", run(x, ops.pack_weight(weight), scale, bias, "static"))
    check(x, weight, scale, bias, "weight_only", "none", run(x, ops.pack_weight(weight), scale, bias, "weight_only"))


@pytest.mark.parametrize("k", [1, 4, 5, 127, 4096, 65472, 65473, 140000])
@pytest.mark.parametrize("signs", ["same", "opposite", "random"])
def test_integer_sums_are_exact(isa: str, k: int, signs: str) -> None:
    """x_scale and weight_scale are 1, so that y is the integer sum, at its extremes: where int16 or int32 wraps."""
    q = torch.full((3, k), 127.0)
    weight = torch.full((18, k), -127 if signs == "opposite" else 127, dtype=torch.int8)
    if signs == "random":
        q = torch.randint(-127, 128, (3, k)).float()
        q[:, 0] = 127
        weight = torch.randint(-128, 128, (18, k), dtype=torch.int8)
    expected = (q.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T).astype(np.float32)
    for backend in ("native", "reference"):
        y = ops.int8_linear(q, weight, torch.ones(18), backend=backend)
        np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
@pytest.mark.parametrize("k", [3, 600, 65472, 70000])
def test_static_sums_are_exact(isa: str, k: int, zero_point: int) -> None:
    """Both ends of the grid, and values far beyond it, with each zero point."""
    x = torch.stack([torch.full((k,), 1e30), torch.full((k,), -1e30), torch.randint(-300, 300, (k,)).float()])
    weight = torch.randint(-128, 128, (20, k), dtype=torch.int8)
    weight[0], weight[1] = 127, -128
    q = np.clip(x.numpy().astype(np.float64) + zero_point, 0, 255).astype(np.int64) - zero_point
    expected = (q @ weight.numpy().astype(np.int64).T).astype(np.float32)
    for backend in ("native", "reference"):
        y = ops.int8_linear(
            x, weight, torch.ones(20), mode="static", input_scale=torch.tensor(1.0),
            input_zero_point=torch.tensor(zero_point, dtype=torch.int32), backend=backend,
        )  # fmt: skip
        np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_bad_row_gives_nan_there_only(
    isa: str, dtype: torch.dtype, bad: float, mode: str, backend: str, activation: str
) -> None:
    x, weight, scale, bias = make(9, 70, 100, dtype)
    clean = run(x, weight, scale, bias, mode, backend=backend, activation=activation)
    x[4, 99] = bad
    y = run(x, weight, scale, bias, mode, backend=backend, activation=activation)
    assert y[4].isnan().all()
    keep = [i for i in range(9) if i != 4]
    torch.testing.assert_close(y[keep], clean[keep], rtol=0, atol=0)


def test_zero_and_tiny_rows(isa: str) -> None:
    x, weight, scale, bias = make(4, 40, 50)
    x[0] = 0
    x[1] = 1e-45
    x[2] = 1e-38
    y = run(x, weight, scale, bias, "dynamic")
    assert torch.equal(y[0], bias)
    check(x, weight, scale, bias, "dynamic", "none", y)


def test_huge_rows(isa: str) -> None:
    """The largest floats neither overflow on the way nor become NaN."""
    x = torch.full((1, 4), 3e38)
    weight = torch.full((2, 4), 127, dtype=torch.int8)
    y = ops.int8_linear(x, weight, torch.full((2,), 0.1 / 127), None)
    torch.testing.assert_close(y, torch.full((1, 2), 3e38 * 0.4), rtol=1e-5, atol=0)


def test_backends_quantise_alike(isa: str) -> None:
    """Native and reference round every activation the same way, ties included."""
    x = torch.cat([torch.randn(30, 64), (torch.randint(-254, 255, (30, 64)) / 2.0).clamp(-127, 127)])
    x[30:, 0] = 127
    identity = torch.eye(64, dtype=torch.int8)
    y = ops.int8_linear(x, identity, torch.ones(64), backend="native")
    q, x_scale = quantize_rows(x)
    torch.testing.assert_close(y, q.float() * x_scale, rtol=0, atol=0)


VIEWS = {
    "transposed": lambda k: torch.randn(k, 13).t(),
    "column step": lambda k: torch.randn(13, 3 * k)[:, ::3],
    "row step": lambda k: torch.randn(26, k)[::2],
    "slice of a batch": lambda k: torch.randn(5, 9, k)[:, 2:6],
    "batch second": lambda k: torch.randn(9, 5, k).transpose(0, 1),
    "expanded": lambda k: torch.randn(1, 1, k).expand(3, 4, k),
    "expanded columns": lambda k: torch.randn(6, 1).expand(6, k),
    "three levels": lambda k: torch.randn(3, 4, 5, k)[:, 1:3, 1:4].transpose(0, 2),
    "one row": lambda k: torch.randn(k),
    "prime strides": lambda k: torch.as_strided(torch.randn(20000), (3, 7, k), (1511, 67, 5)),
    "offset": lambda k: torch.randn(13 * k + 1)[1:].view(13, k),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(isa: str, view: str, mode: str, dtype: torch.dtype) -> None:
    x = VIEWS[view](70).to(dtype) if view == "one row" else VIEWS[view](70)
    if x.dtype != dtype:  # keeps the strides, which .to() would not for every view
        x = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) if "expanded" not in view else x.to(dtype)
    _, weight, scale, bias = make(1, 33, 70)
    y = run(x, ops.pack_weight(weight), scale, bias, mode)
    torch.testing.assert_close(y, run(x.contiguous(), ops.pack_weight(weight), scale, bias, mode), rtol=0, atol=0)
    assert y.shape == (*x.shape[:-1], 33)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 2000, 999), (5, 300, 2000), (300, 100, 700), (64, 4000, 300)], ids=str)
def test_threads_change_nothing(isa: str, shape: tuple[int, int, int], threads: int) -> None:
    x, weight, scale, bias = make(*shape)
    packed, before = ops.pack_weight(weight), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [run(x, packed, scale, bias, mode) for mode in ops.MODES]
        torch.set_num_threads(threads)
        for mode, expected in zip(ops.MODES, alone, strict=True):
            assert torch.equal(run(x, packed, scale, bias, mode), expected)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 40), n=st.integers(0, 150), k=st.integers(0, 300), seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES), bias_dtype=st.sampled_from((None, *DTYPES)), mode=st.sampled_from(ops.MODES),
    activation=st.sampled_from(ops.ACTIVATIONS), magnitude=st.integers(-3, 3), row_gap=st.integers(0, 9),
    column_step=st.integers(1, 3),
)  # fmt: skip
def test_drawn(
    isa: str, m: int, n: int, k: int, seed: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, mode: str,
    activation: str, magnitude: int, row_gap: int, column_step: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    _, weight, scale, bias = make(0, n, k)
    x = (torch.randn(m, k * column_step + row_gap) * 10.0**magnitude).to(dtype)[:, : k * column_step : column_step]
    b = None if bias_dtype is None else bias.to(bias_dtype)
    check(x, weight, scale, b, mode, activation, run(x, ops.pack_weight(weight), scale, b, mode, activation=activation))


# ---- packing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (17, 31), (64, 64), (65, 129), (200, 7)], ids=str)
def test_pack_round_trip(isa: str, shape: tuple[int, int]) -> None:
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(ops.unpack_weight(ops.pack_weight(weight)), weight)


def test_foreign_layout_still_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight packed for another instruction set (in an exported program, say) gives the same result here."""
    x, weight, scale, bias = make(20, 70, 90)
    packed = ops.pack_weight(weight)
    for other in _C.available_isas():
        monkeypatch.setenv("PYCOMPRESS_ISA", other)
        check(x, weight, scale, bias, "static", "none", run(x, packed, scale, bias, "static"))


@pytest.mark.parametrize("byte", range(64))
def test_corrupt_header_is_refused(byte: int) -> None:
    x, weight, scale, _ = make(2, 20, 30)
    packed = ops.pack_weight(weight)
    packed[byte] += 1
    with pytest.raises(ValueError, match=r"pack it again"):
        ops.int8_linear(x, packed, scale)
    with pytest.raises(ValueError, match=r"pack it again"):
        ops.unpack_weight(packed)


@pytest.mark.parametrize("size", [0, 10, 64, 700])
def test_truncated_packed_weight_is_refused(size: int) -> None:
    x, weight, scale, _ = make(2, 20, 30)
    with pytest.raises(ValueError, match=r"pack it again"):
        ops.int8_linear(x, ops.pack_weight(weight)[:size].clone(), scale)


def test_misaligned_packed_weight_is_copied() -> None:
    x, weight, scale, bias = make(3, 20, 30)
    packed = ops.pack_weight(weight)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].copy_(packed)
    assert torch.equal(ops.int8_linear(x, shifted, scale, bias), ops.int8_linear(x, packed, scale, bias))


# ---- quantising weights -----------------------------------------------------------------------------------------


def test_quantize_weight_formula() -> None:
    w = torch.randn(40, 30, dtype=torch.float64)
    w[3] = 0
    q, scale = ops.quantize_weight(w)
    expected = np.rint(
        w.float().numpy() / (np.abs(w.float().numpy()).max(1, keepdims=True) / np.float32(127)).clip(1e-38)
    )
    np.testing.assert_array_equal(q.numpy(), expected)
    assert (q[3] == 0).all()
    assert ((q.double() * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()


def test_affine_qparams() -> None:
    assert ops.affine_qparams(0.0, 255.0) == (1.0, 0)
    assert ops.affine_qparams(-255.0, 0.0) == (1.0, 255)
    assert ops.affine_qparams(2.0, 5.1) == (pytest.approx(0.02), 0)
    scale, zero_point = ops.affine_qparams(-1.0, 3.0)
    assert zero_point == round(1.0 / scale)
    assert ops.affine_qparams(0.0, 0.0)[0] > 0
    for bad in ((1.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="not a finite range"):
            ops.affine_qparams(*bad)


# ---- errors -----------------------------------------------------------------------------------------------------

X, W, S, B = torch.randn(2, 96), torch.zeros(8, 96, dtype=torch.int8), torch.ones(8), torch.zeros(8)
I32 = torch.tensor(3, dtype=torch.int32)
ERRORS = {
    "K": ((torch.randn(2, 96), torch.zeros(8, 128, dtype=torch.int8), S), {}, "x has K=96 but weight has K=128"),
    "N": ((X, torch.zeros(9, 96, dtype=torch.int8), S), {}, "weight has N=9 but weight_scale has N=8"),
    "packed K": ((X, ops.pack_weight(torch.zeros(8, 128, dtype=torch.int8)), S), {}, "x has K=96 but weight has K=128"),
    "packed N": ((X, ops.pack_weight(torch.zeros(9, 96, dtype=torch.int8)), S), {}, "N=8 but weight has N=9"),
    "x dtype": ((X.double(), W, S), {}, "x has dtype torch.float64, expected float32, bfloat16 or float16"),
    "x integer": ((X.int(), W, S), {}, "x has dtype torch.int32"),
    "x scalar": ((torch.tensor(1.0), W, S), {}, "x is a scalar"),
    "weight dtype": ((X, W.float(), S), {}, "weight has torch.float32"),
    "scale dtype": ((X, W, S.double()), {}, "weight_scale has torch.float64"),
    "scale shape": ((X, W, S[:, None]), {}, r"weight_scale has torch.float32 \(8, 1\)"),
    "bias shape": ((X, W, S, torch.zeros(9)), {}, r"bias has torch.float32 \(9,\)"),
    "bias dtype": ((X, W, S, B.int()), {}, "bias has torch.int32"),
    "device": ((X, W, S.to("meta")), {}, "x is on cpu but weight_scale is on meta; move one"),
    "mode": ((X, W, S), {"mode": "int4"}, "mode='int4', expected one of dynamic, static, weight_only"),
    "activation": ((X, W, S), {"activation": "tanh"}, "activation='tanh', expected one of none, relu"),
    "backend": ((X, W, S), {"backend": "gpu"}, "backend='gpu', expected one of auto, native, cuda, triton, reference"),
    "static without": ((X, W, S), {"mode": "static"}, "needs input_scale and input_zero_point; calibrate"),
    "dynamic with": ((X, W, S), {"input_scale": S[:1]}, "belong to mode='static'"),
    "zero point dtype": ((X, W, S), {"mode": "static", "input_scale": S[:1], "input_zero_point": S[:1]}, "one int32"),
    "zero point range": (
        (X, W, S), {"mode": "static", "input_scale": S[:1], "input_zero_point": I32 + 300}, "303, expected 0 to 255",
    ),
    "input scale": (
        (X, W, S), {"mode": "static", "input_scale": -S[:1], "input_zero_point": I32}, "positive normal",
    ),
    "input scale size": ((X, W, S), {"mode": "static", "input_scale": S, "input_zero_point": I32}, "one float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    args, kwargs, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as raised:
        ops.int8_linear(*args, **kwargs)  # type: ignore[arg-type]
    assert "int8" in str(raised.value)


def test_weight_errors() -> None:
    with pytest.raises(ValueError, match="row 2 of the weight holds NaN or Inf"):
        ops.quantize_weight(torch.tensor([[1.0], [2.0], [float("inf")]]))
    with pytest.raises(ValueError, match="meta device"):
        ops.quantize_weight(torch.empty(2, 2, device="meta"))
    with pytest.raises(ValueError, match="expected a floating"):
        ops.quantize_weight(torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="expected an int8"):
        ops.pack_weight(torch.zeros(2, 2))


def test_unknown_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCOMPRESS_ISA", "avx1024")
    with pytest.raises(ValueError, match="PYCOMPRESS_ISA=avx1024: unknown instruction set; expected one of scalar"):
        ops.int8_linear(X, W, S)


def test_named_backend_never_falls_back() -> None:
    meta = [t.to("meta") for t in (X, W, S)]
    with pytest.raises(ValueError, match="backend='native' cannot run this: x is on meta"):
        pick("native", Call(*meta, None, "dynamic", None, None, "none"))


def test_empty_isa_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = ops.pack_weight(W)
    best = ops.kernel_name(packed)
    monkeypatch.setenv("PYCOMPRESS_ISA", "")
    assert ops.kernel_name(packed) == best


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_far_out(isa: str, activation: str) -> None:
    values = torch.tensor([-3e38, -1e30, -1e9, -500.0, 500.0, 1e9, 1e30])
    y = ops.int8_linear(
        torch.zeros(1, 0), torch.zeros(7, 0, dtype=torch.int8), torch.ones(7), values, activation=activation
    )
    torch.testing.assert_close(y[0], values.clamp_min(0), rtol=1e-6, atol=1e-30)
