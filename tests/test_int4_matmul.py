"""The operator on every backend of the CPU and every instruction set, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import _C, ops
from pycompress.ops.int4_matmul import pick
from pycompress.ops.int4_matmul_reference import Call
from tests import int4_oracle, oracle
from tests.int4_oracle import KIND_IDS, KINDS, Parts
from tests.test_int8_matmul import VIEWS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_SIZES = (1, 7, 32, 128, -1)


def make(n: int, k: int, format: str = "int4", group_size: int = 32, symmetric: bool = True) -> Parts:
    # Lopsided, so that zero points are all over their range.
    return ops.quantize_weight_int4(torch.randn(n, k) + 0.5 * torch.randn(n, 1), format, group_size, symmetric)


def pack(parts: Parts, k: int, format: str = "int4", group_size: int = 32) -> Tensor:
    return ops.pack_weight_int4(*parts, in_features=k, format=format, group_size=group_size)


def isas() -> list[str]:
    """One instruction set a kernel: the others that this CPU has run one of these kernels, on the same packed form."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for isa in _C.available_isas():
            patch.setenv("PYCOMPRESS_ISA", isa)
            found[ops.int4_kernel_name(pack(make(1, 1), 1))] = isa
    return list(found.values())


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYCOMPRESS_ISA", request.param)
    return str(request.param)


@pytest.fixture(params=[*isas(), "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The native backend with each kernel that runs here, and the reference."""
    if request.param == "reference":
        return "reference"
    monkeypatch.setenv("PYCOMPRESS_ISA", request.param)
    return "native"


def run(
    x: Tensor, parts: Parts, bias: Tensor | None, format: str = "int4", group_size: int = 32, activation: str = "none",
    backend: str = "native",
) -> Tensor:  # fmt: skip
    """Packed beforehand for the native backend."""
    given = (pack(parts, x.shape[-1], format, group_size), None, None) if backend == "native" else parts
    return ops.int4_linear(
        x, *given, bias, format=format, group_size=group_size, activation=activation, backend=backend
    )


def check(
    y: Tensor, x: Tensor, parts: Parts, bias: Tensor | None, format: str = "int4", group_size: int = 32,
    activation: str = "none",
) -> None:  # fmt: skip
    expected, magnitude = int4_oracle.int4_linear(x, parts, bias, format, group_size, activation)
    oracle.assert_close(y, expected, magnitude, x.dtype, terms=x.shape[-1])


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
def test_matches_float64(backend: str, shape: tuple[int, int, int], format: str, symmetric: bool) -> None:
    m, n, k = shape
    parts, bias = make(n, k, format, 128, symmetric), torch.randn(n)
    for dtype in DTYPES:
        x = torch.randn(m, k).to(dtype)
        b = None if dtype == torch.float16 else bias.to(dtype)
        check(run(x, parts, b, format, 128, backend=backend), x, parts, b, format, 128)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_group_sizes(backend: str, format: str, symmetric: bool, group_size: int) -> None:
    """Whole and short groups, groups larger than K, and an odd K, which ends inside a byte."""
    for k in (1, 2, 7, 8, 31, 127, 129, 300):
        parts, bias = make(19, k, format, group_size, symmetric), torch.randn(19)
        for m in (1, 3, 9):
            x = torch.randn(m, k)
            check(run(x, parts, bias, format, group_size, backend=backend), x, parts, bias, format, group_size)


@pytest.mark.parametrize("m", [*range(1, 14), 47, 200])
def test_every_tail(isa: str, m: int) -> None:
    """Every number of rows in a tile with every number of registers in a panel."""
    x = torch.randn(m, 37)
    for n in (1, 15, 16, 17, 47, 48, 63, 64, 65, 129):
        bias = torch.randn(n)
        for format, symmetric in KINDS[1:]:
            parts = make(n, 37, format, 16, symmetric)
            check(run(x, parts, bias, format, 16, "relu"), x, parts, bias, format, 16, "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations(backend: str, activation: str, dtype: torch.dtype) -> None:
    """K = 0 leaves act(bias): the whole range of the activation, tails included."""
    values = torch.cat(
        [torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4])]
    )
    y = run(torch.zeros(2, 0, dtype=dtype), make(len(values), 0), values, activation=activation, backend=backend)
    bias = values.double().numpy()[None].repeat(2, 0)
    oracle.assert_close(y, oracle.activate(bias, activation), np.abs(bias), dtype)


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_every_value_at_every_place(backend: str, format: str, symmetric: bool) -> None:
    """x is the identity, so that y is the weight itself: exactly, in float32."""
    n, k, group_size = 33, 40, 12
    q = (torch.arange(n)[:, None] * 3 + torch.arange(k)) % 16
    weight = (q[:, 0::2] | q[:, 1::2] << 4).to(torch.uint8)
    scale, zero_point = 2.0 ** torch.randint(-3, 4, (n, 4)), None
    if not symmetric:
        zero_point = (torch.arange(n * 4).reshape(n, 4) % 16).to(torch.uint8)
    parts = weight, scale, zero_point
    y = run(torch.eye(k), parts, None, format, group_size, backend=backend)
    np.testing.assert_array_equal(y.t().numpy(), int4_oracle.weight(parts, k, format, group_size))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_bad_row_is_not_finite_and_no_other(backend: str, bad: float, format: str, symmetric: bool) -> None:
    parts, bias = make(70, 99, format, 32, symmetric), torch.randn(70)
    for m, dtype in ((1, torch.float32), (5, torch.bfloat16), (40, torch.float16)):
        x = torch.randn(m, 99).to(dtype)
        clean = run(x, parts, bias, format, backend=backend)
        x[m // 2, 98] = bad
        y = run(x, parts, bias, format, backend=backend)
        assert not y[m // 2].isfinite().any()
        assert bad == bad or y[m // 2].isnan().all()
        keep = [i for i in range(m) if i != m // 2]
        torch.testing.assert_close(y[keep], clean[keep], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_far_out_values(isa: str, scale: float) -> None:
    x, parts = torch.randn(3, 64), make(20, 64)
    check(run(x * scale, parts, None), x * scale, parts, None)
    scaled = parts[0], parts[1] * scale, None
    check(run(x, scaled, None), x, scaled, None)


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_what_only_others_write(backend: str, format: str, symmetric: bool) -> None:
    """Scales that are negative or 0, zero points beyond 15, and a nibble behind an odd K that is not 0."""
    for group_size in (5, 16, -1):
        weight, scale, zero_point = make(35, 33, format, group_size, symmetric)
        weight[:, -1] |= 0xA0
        scale[::3] *= -1
        scale[4] = 0
        if zero_point is not None:
            zero_point = zero_point + 200
        parts = weight, scale, zero_point
        for m in (3, 20):
            x = torch.randn(m, 33)
            check(run(x, parts, None, format, group_size, backend=backend), x, parts, None, format, group_size)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(isa: str, view: str) -> None:
    given, parts, bias = VIEWS[view](70), make(33, 70), torch.randn(33)
    for dtype in DTYPES:
        x = given.to(dtype)
        if x.stride() != given.stride() and "expanded" not in view:
            x = torch.empty_strided(given.shape, given.stride(), dtype=dtype).copy_(given)
        y = run(x, parts, bias)
        torch.testing.assert_close(y, run(x.contiguous(), parts, bias), rtol=0, atol=0)
        assert y.shape == (*x.shape[:-1], 33)


def test_views_of_the_weight() -> None:
    x, parts, bias = torch.randn(3, 70), make(33, 70), torch.randn(33)
    wide = torch.zeros(33, 80, dtype=torch.uint8)
    wide[:, :35] = parts[0]
    y = ops.int4_linear(x, wide[:, :35], parts[1], None, bias, group_size=32)
    assert torch.equal(y, run(x, parts, bias))


@pytest.mark.parametrize("shape", [(1, 1500, 333), (5, 300, 700), (100, 100, 300), (20, 700, 100)], ids=str)
def test_threads_change_nothing(isa: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, before = torch.randn(m, k), torch.get_num_threads()
    for format, symmetric in KINDS[1:]:
        packed, results = pack(make(n, k, format, 128, symmetric), k, format, 128), []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(ops.int4_linear(x, packed, format=format))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize(("m", "rows"), [(12, (0, 1)), (12, (3, 8)), (50, (10, 50)), (50, (20, 40))], ids=str)
def test_a_row_does_not_depend_on_the_others(isa: str, m: int, rows: tuple[int, int]) -> None:
    """Among calls of at most 12 rows, and among those of more: two kernels."""
    x, packed, (first, last) = torch.randn(m, 300), pack(make(130, 300), 300), rows
    y = ops.int4_linear(x, packed, group_size=32)
    assert torch.equal(ops.int4_linear(x[first:last], packed, group_size=32), y[first:last])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 40), n=st.integers(0, 150), k=st.integers(0, 300), seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES), bias_dtype=st.sampled_from((None, *DTYPES)), kind=st.sampled_from(KINDS),
    group_size=st.one_of(st.just(-1), st.integers(1, 310)), activation=st.sampled_from(ops.ACTIVATIONS),
    magnitude=st.integers(-3, 3), row_gap=st.integers(0, 9), column_step=st.integers(1, 3),
)  # fmt: skip
def test_drawn(
    backend: str, m: int, n: int, k: int, seed: int, dtype: torch.dtype, bias_dtype: torch.dtype | None,
    kind: tuple[str, bool], group_size: int, activation: str, magnitude: int, row_gap: int, column_step: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    format, symmetric = kind
    parts = make(n, k, format, group_size, symmetric)
    x = (torch.randn(m, k * column_step + row_gap) * 10.0**magnitude).to(dtype)[:, : k * column_step : column_step]
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    y = run(x, parts, bias, format, group_size, activation, backend)
    check(y, x, parts, bias, format, group_size, activation)


# ---- errors -----------------------------------------------------------------------------------------------------

X, B = torch.randn(2, 96), torch.zeros(8)
PARTS = ops.quantize_weight_int4(torch.randn(8, 96), group_size=32)
W, S, _ = PARTS
Z = torch.zeros(8, 3, dtype=torch.uint8)
PACKED = ops.pack_weight_int4(*PARTS, in_features=96, group_size=32)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "K": ((torch.randn(2, 92), W, S), {}, "K=92 but weight has 48 bytes a row, which hold K=95 or 96"),
    "N": ((X, W[:7], S), {}, "weight has N=7 but weight_scale has N=8|weight has N=8, expected N=7"),
    "packed K": ((torch.randn(2, 95), PACKED), {}, "the weight was packed with K=96, not 95"),
    "packed group size": ((X, PACKED), {"group_size": 64}, "the weight was packed with group_size=32, not 64"),
    "packed format": ((X, PACKED), {"format": "nf4"}, "the weight was packed with format=int4, not nf4"),
    "packed with scale": ((X, PACKED, S), {}, "a packed weight holds its scales"),
    "no scale": ((X, W), {}, "weight_scale is None.*quantize_weight_int4"),
    "x dtype": ((X.double(), W, S), {}, "x has dtype torch.float64, expected float32, bfloat16 or float16"),
    "x scalar": ((torch.tensor(1.0), W, S), {}, "x is a scalar"),
    "weight dtype": ((X, W.float(), S), {}, r"weight has torch.float32 \(8, 48\), expected uint8"),
    "weight shape": ((X, W[0].float()), {}, r"weight has torch.float32 \(48,\)"),
    "scale dtype": ((X, W, S.double()), {}, "weight_scale has torch.float64"),
    "scale shape": ((X, W, S[:, 0]), {}, r"weight_scale has torch.float32 \(8,\)"),
    "groups": ((X, W, S), {"group_size": 96}, r"weight_scale is \(8, 3\), expected \(8, 1\) for K=96"),
    "zero point dtype": ((X, W, S, Z.int()), {}, "weight_zero_point has torch.int32"),
    "zero point shape": ((X, W, S, Z[:, :2].contiguous()), {}, r"weight_zero_point is \(8, 2\), expected \(8, 3\)"),
    "zero point of nf4": ((X, W, S, Z), {"format": "nf4"}, "symmetric=False with format='nf4'"),
    "bias shape": ((X, W, S, None, torch.zeros(9)), {}, r"bias has torch.float32 \(9,\)"),
    "bias dtype": ((X, W, S, None, B.int()), {}, "bias has torch.int32"),
    "device": ((X, W, S.to("meta")), {}, "x is on cpu but weight_scale is on meta; move one"),
    "format": ((X, W, S), {"format": "int3"}, "format='int3', expected one of int4, nf4"),
    "group size": ((X, W, S), {"group_size": 0}, "group_size=0, expected 1 or more, or -1"),
    "activation": ((X, W, S), {"activation": "tanh"}, "activation='tanh', expected one of none, relu"),
    "backend": ((X, W, S), {"backend": "cuda"}, "backend='cuda', expected one of auto, native, triton, reference"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    args, kwargs, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as raised:
        ops.int4_linear(*args, **{"group_size": 32, **kwargs})
    assert "int4_linear" in str(raised.value)


def test_named_backend_never_falls_back() -> None:
    meta = [t.to("meta") for t in (X, W, S)]
    with pytest.raises(ValueError, match="backend='native' cannot run this: x is on meta"):
        pick("native", Call(*meta, None, None, 96, 8, "int4", 32, "none"))
