"""Int8Conv2d: conversion, state, what torch does with it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from pycompress import ops
from pycompress.nn import Int8Conv2d
from pycompress.nn.int8_conv2d import why_not

CONVS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 2, "padding": "valid", "stride": 2},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "groups": 2},
    "replicate": {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}


def make(name: str = "3x3", **kwargs: object) -> tuple[nn.Conv2d, Int8Conv2d]:
    conv = nn.Conv2d(6, 8, **CONVS[name])  # type: ignore[arg-type]
    return conv, Int8Conv2d.from_float(conv, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 6, 9, 10), (6, 9, 10)], ids=str)
@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("name", CONVS)
def test_from_float_is_close(name: str, mode: str, shape: tuple[int, ...]) -> None:
    conv, module = make(name, mode=mode, input_range=(-4.0, 4.0) if mode == "static" else None)
    x = torch.randn(shape)
    y, expected = module(x), conv(x)
    assert y.shape == expected.shape
    assert (y - expected).norm() < 0.03 * expected.norm()
    again = module.to_float()
    assert type(again) is nn.Conv2d
    assert (again(x) - expected).norm() < 0.02 * expected.norm()


def test_repr_says_what_runs() -> None:
    assert "backend=native:int8_conv2d_" in repr(make(activation="relu")[1])
    assert "activation=relu" in repr(make(activation="relu")[1])
    assert "backend=reference" in repr(make(mode="weight_only")[1])


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_state_is_plain_and_travels(mode: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = make(mode=mode, input_range=(-3.0, 3.0) if mode == "static" else None)
    x = torch.randn(2, 6, 9, 10)
    expected, state = module(x), module.state_dict()
    statics = ["input_scale", "input_zero_point"] if mode == "static" else []
    assert sorted(state) == sorted(["weight", "weight_scale", "bias", *statics])
    assert state["weight"].dtype == torch.int8
    assert state["weight"].shape == (8, 6, 3, 3)
    monkeypatch.setenv("PYCOMPRESS_ISA", "scalar")
    fresh = Int8Conv2d(6, 8, 3, padding=1, mode=mode)
    fresh.load_state_dict(state)
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)


def test_to_empty_leaves_a_weight() -> None:
    """Of no values in particular, but one that runs and can be loaded into."""
    for module in (make()[1].to_empty(device="cpu"), make()[1].to("meta").to_empty(device="cpu")):
        assert module.weight.shape == (8, 6, 3, 3)
        assert "native" in repr(module)


def test_meta_then_assign() -> None:
    _, module = make()
    x = torch.randn(1, 6, 5, 5)
    empty = Int8Conv2d(6, 8, 3, padding=1, device="meta")
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))
    assert "native" in repr(empty)


def test_half_keeps_integers_and_scales() -> None:
    _, module = make()
    x = torch.randn(2, 6, 9, 10)
    expected = module(x)
    half = copy.deepcopy(module).half()
    assert half.weight_scale.dtype == torch.float32
    assert half.bias is not None
    assert half.bias.dtype == torch.float16
    torch.testing.assert_close(half(x.half()).float(), expected, rtol=2e-2, atol=2e-2)
    assert copy.deepcopy(module).double().bias.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 6, 3, 3)}, "a float checkpoint is loaded into the float model first"),
        ({"weight": torch.zeros(8, 6, 1, 1, dtype=torch.int8)}, r"expected torch.int8 \(8, 6, 3, 3\)"),
        ({"weight": None}, "weight_scale comes without weight"),
        ({"weight_scale": torch.ones(3)}, r"weight_scale is \(3,\), expected \(8,\)"),
        ({"weight_scale": torch.ones(8).half()}, "weight_scale is torch.float16, expected torch.float32"),
    ],
)
def test_a_bad_state_loads_nothing(change: dict[str, Tensor | None], message: str) -> None:
    _, module = make()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    state = {k: v for k, v in {**make()[1].state_dict(), **change}.items() if v is not None}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name])


def test_from_float_refuses() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for layer, message in (
        (nn.Linear(2, 2), "expected an nn.Conv2d, got Linear"),
        (nn.ConvTranspose2d(2, 2, 1), "got ConvTranspose2d"),
        (Own(2, 2, 1), r"Own computes its own way \(forward\)"),
        (nn.Conv2d(2, 2, 1, device="meta"), "meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            Int8Conv2d.from_float(layer)
    with pytest.raises(ValueError, match="static mode needs a range"):
        make(mode="static")
    conv = nn.Conv2d(2, 2, 1)
    conv.weight.data[1] = float("nan")
    with pytest.raises(ValueError, match="row 1 of the weight holds NaN"):
        Int8Conv2d.from_float(conv)
    with pytest.raises(ValueError, match="padding_mode='mirror'"):
        Int8Conv2d(2, 2, 1, padding_mode="mirror")
    with pytest.raises(ValueError, match="groups=3"):
        Int8Conv2d(2, 2, 1, groups=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, r"kernel_size=\(0, 0\), expected at least 1"),
        ({"kernel_size": (3, 3, 3)}, r"\(3, 3, 3\) for height and width, expected a whole number or two"),
        ({"kernel_size": ()}, r"\(\) for height and width"),
        ({"kernel_size": 3.0}, "3.0 for height and width"),
        ({"stride": 0}, r"stride=\(0, 0\)"),
        ({"dilation": (1, 0)}, r"dilation=\(1, 0\)"),
        ({"padding": -1}, r"padding=\(-1, -1, -1, -1\), expected at least 0"),
        ({"padding": "same", "stride": 2}, "padding='same' with stride"),
        ({"in_channels": -2}, "in_channels=-2"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8Conv2d(**{"in_channels": 2, "out_channels": 2, "kernel_size": 1, **options})  # type: ignore[arg-type]


def test_no_channels_and_no_outputs() -> None:
    x = torch.randn(2, 0, 3, 3)
    for backend in ("native", "reference"):
        module = Int8Conv2d(0, 4, 3, padding=1, backend=backend)
        assert module.bias is not None
        nn.init.normal_(module.bias)
        assert torch.equal(module(x), module.bias[:, None, None].expand(2, 4, 3, 3))
        assert Int8Conv2d(3, 0, 3, padding=1, backend=backend)(torch.randn(2, 3, 5, 5)).shape == (2, 0, 5, 5)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("name", CONVS)
def test_gradients_are_those_of_the_float_layer(name: str, activation: str) -> None:
    _, module = make(name, mode="weight_only", activation=activation)
    twin, x = module.to_float(), torch.randn(2, 6, 9, 10)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(a).square().sum().backward()
    twin(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    bias = next(p for name, p in twin.named_parameters() if name.endswith("bias"))
    assert module.bias is not None
    torch.testing.assert_close(module.bias.grad, bias.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_gradients_go_straight_through(mode: str) -> None:
    _, module = make(mode=mode, input_range=(-3.0, 3.0) if mode == "static" else None)
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    y = module(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    weight = module.weight.float() * module.weight_scale[:, None, None, None]
    expected = conv2d_input((2, 6, 5, 5), weight, grad, padding=1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ops.MODES)
def test_opcheck(mode: str) -> None:
    _, module = make("same", mode=mode, input_range=(-3.0, 3.0) if mode == "static" else None)
    statics = module.input_scale, module.input_zero_point
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 9, 10).to(memory_format=memory_format).requires_grad_()
        window = (4, 3), (1, 1), (3, 3, 2, 2), (2, 2), 1
        args = (x, module._weight, module.weight_scale, module.bias, *window, mode, *statics, "relu", "auto")
        torch.library.opcheck(torch.ops.pycompress.int8_conv2d.default, args)


def test_compiles_whole() -> None:
    for name in ("same", "reflect"):
        _, module = make(name)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 6, 9, 10).to(memory_format=memory_format)
            expected = module(x)
            assert torch.equal(compiled(x), expected)
            assert compiled(x).stride() == expected.stride()


def test_exports() -> None:
    _, module = make()
    x = torch.randn(2, 6, 9, 10)
    program = torch.export.export(module, (x,))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    assert torch.equal(torch.export.load(saved).module()(x), module(x))


def test_autocast() -> None:
    _, module = make()
    x = torch.randn(2, 6, 9, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module(x.bfloat16()))


def test_why_not() -> None:
    assert why_not(nn.Conv2d(64, 64, 3)) == ""
    assert "groups=64" in why_not(nn.Conv2d(64, 64, 3, groups=64))
