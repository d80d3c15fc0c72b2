"""The operator on every backend and instruction set, against float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import _C, ops
from tests.conv_helpers import Conv, check, static

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONVS = {
    "3x3": Conv(5, 20, padding=(1, 1)),
    "1x1": Conv(70, 66, (1, 1)),
    "1x1 stride 2": Conv(9, 17, (1, 1), (2, 2)),
    "first layer": Conv(3, 64, (7, 7), (2, 2), (3, 3)),
    "uneven": Conv(6, 7, (2, 3), (3, 1), (0, 2), (1, 2)),
    "far padding": Conv(4, 5, (1, 2), (2, 3), (3, 4)),
    "dilated": Conv(8, 9, (3, 3), (2, 1), (2, 4), (2, 3)),
    "groups": Conv(12, 18, groups=3, padding=(1, 0)),
    "depthwise": Conv(10, 20, groups=10, padding=(1, 1)),
}
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONVS)
def test_native_matches_float64(isa: str, name: str, mode: str) -> None:
    conv = CONVS[name]
    weight, scale, bias = conv.layer()
    packed = ops.pack_conv_weight(weight, conv.groups)
    for dtype, memory_format in product(DTYPES, FORMATS):
        x = torch.randn(2, conv.channels, 9, 11).to(dtype).to(memory_format=memory_format)
        y = conv.run(x, packed, scale, bias, mode, backend="native")
        check(y, x, weight, scale, bias, conv, mode, "none")
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("name", CONVS)
def test_reference_matches_float64(name: str, mode: str) -> None:
    conv = CONVS[name]
    weight, scale, bias = conv.layer()
    for dtype, memory_format in product(DTYPES, FORMATS):
        x = torch.randn(2, conv.channels, 9, 11).to(dtype).to(memory_format=memory_format)
        y = conv.run(x, weight, scale, bias, mode, backend="reference")
        check(y, x, weight, scale, bias, conv, mode, "none")
        assert y.is_contiguous(memory_format=memory_format)
        packed = ops.pack_conv_weight(weight, conv.groups)
        assert torch.equal(conv.run(x, packed, scale, bias, mode, backend="reference"), y)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_and_no_bias(isa: str, activation: str) -> None:
    conv = CONVS["3x3"]
    weight, scale, _ = conv.layer()
    for memory_format in FORMATS:
        x = torch.randn(1, 5, 6, 7).to(memory_format=memory_format)
        y = conv.run(x, weight, scale, None, "dynamic", activation=activation, backend="native")
        check(y, x, weight, scale, None, conv, "dynamic", activation)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("channels", [1, 33, 2400, 7272])
def test_integer_sums_are_exact(isa: str, channels: int, mode: str) -> None:
    """Scales of 1, so that y is the integer sum, at its extremes: where int16 or int32 would wrap."""
    conv = Conv(channels, 3, padding=(1, 1))
    weight = torch.randint(-128, 128, (3, channels, 3, 3), dtype=torch.int8)
    weight[0], weight[1] = 127, -128
    x = torch.full((2, channels, 3, 4), 127.0 if mode == "dynamic" else 300.0)
    x[1] = torch.randint(-127, 128, x[1].shape).float()
    x[1, 0, 0, 0] = 127
    statics = {} if mode == "dynamic" else {k: torch.ones_like(v) for k, v in static().items()}
    q = x if mode == "dynamic" else x.clamp(-1, 254)
    expected = torch.nn.functional.conv2d(q.double(), weight.double(), padding=1).float()
    for backend in ("native", "reference"):
        for memory_format in FORMATS:
            v = x.to(memory_format=memory_format)
            y = ops.int8_conv2d(
                v, weight, torch.ones(3), padding=1, mode=mode, backend=backend, **statics  # type: ignore[arg-type]
            )
            np.testing.assert_array_equal(y.numpy(), expected.numpy())
    assert conv.out == 3


def test_more_terms_than_the_kernels_take() -> None:
    weight, scale = torch.ones(1, 7276, 3, 3, dtype=torch.int8), torch.ones(1)
    x = torch.full((1, 7276, 3, 3), 127.0)
    assert ops.int8_conv2d(x, weight, scale).item() == 7276 * 9 * 127
    with pytest.raises(ValueError, match="backend='native' cannot run this: kh \\* kw \\* I / groups is above 65472"):
        ops.int8_conv2d(x, weight, scale, backend="native")
    with pytest.raises(ValueError, match="above 65472"):
        ops.pack_conv_weight(weight)


VIEWS = {
    "cropped": lambda: torch.randn(2, 6, 13, 15)[:, :, 2:11, 3:13],
    "cropped, channels last": lambda: torch.randn(2, 13, 15, 6).permute(0, 3, 1, 2)[:, 1:, 2:11, 3:13],
    "columns apart": lambda: torch.randn(2, 6, 9, 20)[..., ::2],
    "columns apart, channels last": lambda: torch.randn(2, 9, 20, 6).permute(0, 3, 1, 2)[..., ::2],
    "transposed": lambda: torch.randn(2, 6, 10, 9).transpose(2, 3),
    "batch inside": lambda: torch.randn(6, 2, 9, 10).transpose(0, 1),
    "channels apart": lambda: torch.randn(2, 12, 9, 10)[:, ::2],
    "expanded": lambda: torch.randn(1, 6, 9, 10).expand(3, 6, 9, 10),
    "expanded channels": lambda: torch.randn(2, 1, 9, 10).expand(2, 6, 9, 10),
    "one column": lambda: torch.randn(2, 6, 9, 1),
    "one column, its stride odd": lambda: torch.randn(1, 6, 9, 1).as_strided((1, 6, 9, 1), (9, 9, 1, 54)),
    "offset": lambda: torch.randn(2 * 6 * 90 + 1)[1:].view(2, 6, 9, 10),
}


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(isa: str, view: str, mode: str) -> None:
    x = VIEWS[view]()
    conv = Conv(x.shape[1], 7, (3, 1), padding=(1, 0))
    weight, scale, bias = conv.layer()
    expected = conv.run(x.clone(memory_format=torch.contiguous_format), weight, scale, bias, mode)
    assert torch.equal(conv.run(x, weight, scale, bias, mode, backend="native"), expected)


def nan_there_only(mode: str, backend: str) -> None:
    conv = Conv(6, 9, (1, 1), (2, 2))
    weight, scale, bias = conv.layer()
    for dtype, bad in product(DTYPES, (float("nan"), float("inf"), -float("inf"))):
        x = torch.randn(4, 6, 7, 7).to(dtype)
        clean = conv.run(x, weight, scale, bias, mode, backend=backend, activation="relu")
        x[2, 5, 3, 3] = bad  # which no window reads
        y = conv.run(x, weight, scale, bias, mode, backend=backend, activation="relu")
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_bad_image_gives_nan_there_only(isa: str, mode: str) -> None:
    nan_there_only(mode, "native")


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_bad_image_gives_nan_there_only_in_the_reference(mode: str) -> None:
    nan_there_only(mode, "reference")


def test_no_image_depends_on_its_batch(isa: str) -> None:
    conv = CONVS["3x3"]
    weight, scale, bias = conv.layer()
    x = torch.randn(5, 5, 8, 8) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 1e-40])[:, None, None, None]
    y = conv.run(x, weight, scale, bias, "dynamic")
    for i in range(5):
        assert torch.equal(y[i], conv.run(x[i], weight, scale, bias, "dynamic"))
    assert torch.equal(y[3], bias[:, None, None].expand_as(y[3]))


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_threads_change_nothing(isa: str, batch: int, threads: int) -> None:
    conv = Conv(40, 130, padding=(1, 1))
    weight, scale, bias = conv.layer()
    packed, before = ops.pack_conv_weight(weight), torch.get_num_threads()
    x = torch.randn(batch, 40, 12, 12)
    try:
        for memory_format in FORMATS:
            v = x.to(memory_format=memory_format)
            torch.set_num_threads(1)
            alone = conv.run(v, packed, scale, bias, "dynamic")
            torch.set_num_threads(threads)
            assert torch.equal(conv.run(v, packed, scale, bias, "dynamic"), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 5, 8, 8), (5, 8, 8), (1, 5, 3, 3)], ids=str)
def test_batches_of_none_and_one(shape: tuple[int, ...]) -> None:
    conv = CONVS["3x3"]
    weight, scale, bias = conv.layer()
    x = torch.randn(shape)
    expected = torch.nn.functional.conv2d(x, torch.randn(20, 5, 3, 3), padding=1).shape
    for backend in ("native", "reference"):
        assert conv.run(x, weight, scale, bias, "dynamic", backend=backend).shape == expected


def test_same_padding(isa: str) -> None:
    weight, scale, _ = Conv(4, 6, (4, 3)).layer()
    x = torch.randn(2, 4, 7, 8)
    y = ops.int8_conv2d(x, weight, scale, padding="same", dilation=(1, 2), backend="native")
    expected = ops.int8_conv2d(x, weight, scale, padding="same", dilation=(1, 2), backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.shape == (2, 6, 7, 8)
    q, s = x.reshape(2, -1), 127 / x.abs().amax((1, 2, 3))
    ints = (q * s[:, None]).round().reshape(x.shape).double()
    sums = torch.nn.functional.conv2d(torch.nn.functional.pad(ints, (2, 2, 1, 2)), weight.double(), dilation=(1, 2))
    torch.testing.assert_close(y.double(), sums * scale[:, None, None] / s[:, None, None, None], rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3), per_group=st.integers(1, 70), outs=st.integers(1, 70), groups=st.sampled_from([1, 1, 1, 2, 5]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 20)), kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)), seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES), mode=st.sampled_from(["dynamic", "static"]), memory_format=st.sampled_from(FORMATS),
)  # fmt: skip
def test_drawn(
    isa: str, n: int, per_group: int, outs: int, groups: int, size: tuple[int, int], kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], seed: int, dtype: torch.dtype,
    mode: str, memory_format: torch.memory_format,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    conv = Conv(per_group * groups, outs * groups, kernel, stride, padding, dilation, groups)
    fits = all(s + 2 * p > d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True))
    weight, scale, bias = conv.layer()
    x = torch.randn(n, conv.channels, *size).to(dtype).to(memory_format=memory_format)
    if fits:
        y = conv.run(x, ops.pack_conv_weight(weight, groups), scale, bias, mode, backend="native")
        check(y, x, weight, scale, bias, conv, mode, "none")
    else:
        with pytest.raises(ValueError, match="larger than the padded image"):
            conv.run(x, weight, scale, bias, mode)


# ---- packing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_pack_round_trip(isa: str, conv: Conv) -> None:
    weight = conv.layer()[0]
    assert torch.equal(ops.unpack_conv_weight(ops.pack_conv_weight(weight, conv.groups)), weight)


def test_foreign_layout_still_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = CONVS["groups"]
    weight, scale, bias = conv.layer()
    packed, x = ops.pack_conv_weight(weight, 3), torch.randn(2, 12, 6, 6)
    for other in _C.available_isas():
        monkeypatch.setenv("PYCOMPRESS_ISA", other)
        check(conv.run(x, packed, scale, bias, "static"), x, weight, scale, bias, conv, "static", "none")


@pytest.mark.parametrize("byte", range(0, 128, 7))
def test_corrupt_header_is_refused(byte: int) -> None:
    weight, scale, _ = CONVS["3x3"].layer()
    packed = ops.pack_conv_weight(weight)
    packed[byte] += 1
    with pytest.raises(ValueError, match="pack it again"):
        ops.int8_conv2d(torch.randn(1, 5, 6, 6), packed, scale)
    with pytest.raises(ValueError, match="pack it again"):
        ops.unpack_conv_weight(packed)


# ---- errors -----------------------------------------------------------------------------------------------------

X, W, S = torch.randn(1, 6, 8, 8), torch.zeros(4, 6, 3, 3, dtype=torch.int8), torch.ones(4)
ERRORS: dict[str, tuple[tuple[Tensor, ...], dict[str, object], str]] = {
    "channels": ((X[:, :5], W, S), {}, r"\(4, 6, 3, 3\), expected \(4, 5, 3, 3\) for x with C=5"),
    "outputs": ((X, W, torch.ones(5)), {}, r"expected \(5, 6, 3, 3\)"),
    "packed": ((X[:, :5], ops.pack_conv_weight(W), S), {}, r"expected \(4, 5, 3, 3\)"),
    "groups": ((X, W, S), {"groups": 4}, "C=6 and the weight O=4, expected multiples of groups=4"),
    "packed groups": ((X, ops.pack_conv_weight(W), S), {"groups": 2}, "packed for groups=1, expected groups=2"),
    "dtype": ((X.double(), W, S), {}, "x has dtype torch.float64"),
    "dims": ((X[0, 0], W, S), {}, r"x is torch.strided \(8, 8\), expected a dense \(N, C, H, W\)"),
    "weight": ((X, W.float(), S), {}, "weight has torch.float32"),
    "scale": ((X, W, S.double()), {}, "weight_scale has torch.float64"),
    "bias": ((X, W, S, torch.ones(3)), {}, "bias has torch.float32"),
    "bias apart": ((X, W, S, torch.ones(8)[::2]), {}, r"bias has torch.float32 \(4,\) with strides \(2,\)"),
    "numbers": ((X, W, S), {"stride": (1, 2, 3)}, r"\(1, 2, 3\) for height and width, expected a whole number or two"),
    "device": ((X, W, S.to("meta")), {}, "x is on cpu but weight_scale is on meta"),
    "stride": ((X, W, S), {"stride": 0}, r"stride=\(0, 0\), expected at least 1"),
    "padding": ((X, W, S), {"padding": -1}, "expected at least 0"),
    "same": ((X, W, S), {"padding": "same", "stride": 2}, "padding='same' with stride"),
    "word": ((X, W, S), {"padding": "full"}, "padding='full', expected numbers, 'same' or 'valid'"),
    "small": ((X[..., :2], W, S), {}, "larger than the padded image"),
    "mode": ((X, W, S), {"mode": "int4"}, "mode='int4', expected one of"),
    "activation": ((X, W, S), {"activation": "tanh"}, "activation='tanh'"),
    "backend": ((X, W, S), {"backend": "cuda"}, "backend='cuda', expected one of auto, native, reference"),
    "static without": ((X, W, S), {"mode": "static"}, "needs input_scale and input_zero_point; calibrate"),
    "dynamic with": ((X, W, S), {"input_scale": S[:1]}, "belong to mode='static'"),
    "weight only": ((X, W, S), {"mode": "weight_only", "backend": "native"}, "multiplies in float"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    args, kwargs, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as raised:
        ops.int8_conv2d(*args, **kwargs)  # type: ignore[arg-type]
    assert "int8_conv2d" in str(raised.value)
