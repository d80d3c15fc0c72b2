"""``Int4Linear``: conversion, memory. Its state: test_int4_linear_state.py; inside torch: test_int4_linear_torch.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycompress import ops
from pycompress.nn import Int4Linear, MaskedLinear
from pycompress.ops.int4_matmul_eager import EagerPlan
from tests import int4_oracle, oracle
from tests.held_bytes import held_bytes
from tests.int4_oracle import KIND_IDS, KINDS
from tests.test_int8_linear import DTYPES, FUNCTIONS


def make(
    format: str = "int4", k: int = 96, n: int = 40, bias: bool = True, symmetric: bool = True, group_size: int = 32,
    **options: Any,
) -> Int4Linear:  # fmt: skip
    linear = nn.Linear(k, n, bias)
    return Int4Linear.from_float(linear, format, symmetric=symmetric, group_size=group_size, **options)


def like(module: Int4Linear, **options: Any) -> Int4Linear:
    """A new module of the same kind, holding zeros."""
    kind = {name: getattr(module, name) for name in ("format", "group_size", "symmetric", "activation")}
    return Int4Linear(module.in_features, module.out_features, module.bias is not None, **{**kind, **options})


def loaded(module: Int4Linear, state: dict[str, Any], **options: Any) -> Int4Linear:
    module.load_state_dict(state, **options)
    return module


def bias_of(module: Int4Linear) -> nn.Parameter:
    assert module.bias is not None
    return module.bias


def tensors(module: Int4Linear) -> dict[str, Tensor]:
    """Every value that the module's results depend on."""
    return {name: t.clone() for name, t in module.state_dict().items()}


# ---- from float and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_from_float(format: str, symmetric: bool, activation: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(97, 40, dtype=dtype).eval()
    before = {name: t.clone() for name, t in linear.state_dict().items()}
    module = Int4Linear.from_float(linear, format, activation, group_size=24, symmetric=symmetric)
    parts = ops.quantize_weight_int4(linear.weight, format, 24, symmetric)
    for got, want in zip((module.weight, module.weight_scale, module.weight_zero_point), parts, strict=True):
        assert got is want is None or torch.equal(got, want)  # type: ignore[arg-type]
    assert torch.equal(bias_of(module), linear.bias)
    assert bias_of(module).dtype == dtype
    assert not module.training
    assert module.bias is not linear.bias
    assert all(torch.equal(t, before[name]) for name, t in linear.state_dict().items())

    x = torch.randn(7, 97).to(dtype)
    expected, magnitude = int4_oracle.int4_linear(x, parts, linear.bias.detach(), format, 24, activation)
    with torch.no_grad():
        oracle.assert_close(module(x), expected, magnitude, dtype, terms=97)
        y = FUNCTIONS[activation](linear(x)).float()
        assert F.cosine_similarity(module(x).float(), y).min() > 0.98


def test_attributes() -> None:
    module = make("int4", symmetric=False, group_size=-1, activation="gelu", backend="reference")
    assert (module.in_features, module.out_features, module.format) == (96, 40, "int4")
    assert (module.group_size, module.symmetric, module.activation) == (96, False, "gelu")
    assert module.backend == "reference"
    assert like(module).group_size == 96
    assert Int4Linear(5, 3).group_size == 128


def test_a_new_module_is_zero(isa: str) -> None:
    for format, symmetric in KINDS:
        for k in (96, 7):
            module = Int4Linear(k, 20, format=format, symmetric=symmetric, group_size=32)
            assert torch.equal(module(torch.randn(3, k)), torch.zeros(3, 20))
            assert (module.to_float().weight == 0).all()  # type: ignore[union-attr]


def test_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, x = conv1d(40, 96), torch.randn(5, 96)
    nn.init.normal_(layer.bias)
    module = Int4Linear.from_float(layer, group_size=16)
    assert (module.in_features, module.out_features) == (96, 40)
    torch.testing.assert_close(module(x), layer(x), rtol=0, atol=0.1)


def test_what_is_pruned_stays_zero() -> None:
    linear = nn.Linear(96, 40)
    masked = MaskedLinear.from_linear(linear, torch.rand(40, 96) < 0.3)
    for format, symmetric in KINDS:
        module = Int4Linear.from_float(masked, format, symmetric=symmetric, group_size=16)
        assert (module.to_float().weight[~masked.mask] == 0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 3, 96), (2, 0, 96), (2, 3, 4, 96)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], backend: str) -> None:
    module, x = make(backend=backend), torch.randn(shape)
    with torch.no_grad():
        y = module(x)
        assert y.shape == (*shape[:-1], 40)
        rows = module(x.reshape(-1, 96)).reshape(y.shape)
    torch.testing.assert_close(y, rows, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 0), (1, 1), (0, 0)])
def test_smallest_layers(isa: str, k: int, n: int) -> None:
    for format, symmetric in KINDS:
        for group_size in (1, 128, -1):
            module = make(format, k, n, symmetric=symmetric, group_size=group_size)
            with torch.no_grad():
                assert module(torch.randn(3, k)).shape == (3, n)
                if k == 0:
                    assert torch.equal(module(torch.randn(3, k)), bias_of(module).expand(3, n))
            loaded(like(module), module.state_dict())
            copy.deepcopy(module).to("meta").to_empty(device="cpu")


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_to_float(activation: str, bias: bool) -> None:
    module = make(bias=bias, activation=activation, symmetric=False).eval()
    back = module.to_float()
    linear = back[0] if isinstance(back, nn.Sequential) else back
    assert type(linear) is nn.Linear
    assert not linear.training
    assert (linear.bias is None) == (not bias)
    assert (back is linear) == (activation == "none")
    parts = module.weight, module.weight_scale, module.weight_zero_point
    torch.testing.assert_close(
        linear.weight.double(), torch.from_numpy(int4_oracle.weight(parts, 96, "int4", 32)), rtol=1e-6, atol=0
    )
    x = torch.randn(5, 96)
    torch.testing.assert_close(module(x), back(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_to_float_has_the_dtype_of_the_bias(dtype: torch.dtype) -> None:
    assert make().to(dtype).to_float().weight.dtype == dtype


def test_from_float_of_a_float64_layer() -> None:
    linear, x = nn.Linear(96, 40, dtype=torch.float64), torch.randn(3, 96)
    module = Int4Linear.from_float(linear, group_size=16)
    torch.testing.assert_close(module(x), linear(x.double()).float(), rtol=0, atol=0.3)


def test_from_float_keeps_a_frozen_bias_frozen() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    assert not bias_of(Int4Linear.from_float(linear)).requires_grad


def bad_weight(value: float) -> nn.Linear:
    linear = nn.Linear(8, 4)
    linear.weight.data[2, 3] = value
    return linear


CONVERSION_ERRORS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "NaN": (lambda: bad_weight(float("nan")), {}, "row 2 of the weight holds NaN or Inf"),
    "Inf": (lambda: bad_weight(float("inf")), {}, "row 2 of the weight holds NaN or Inf"),
    "meta": (lambda: nn.Linear(8, 4, device="meta"), {}, "meta device"),
    "format": (lambda: nn.Linear(8, 4), {"format": "fp4"}, "format='fp4', expected one of int4, nf4"),
    "group size": (lambda: nn.Linear(8, 4), {"group_size": 0}, "group_size=0, expected 1 or more, or -1"),
    "symmetric": (lambda: nn.Linear(8, 4), {"format": "nf4", "symmetric": False}, "symmetric=False with format='nf4'"),
    "activation": (lambda: nn.Linear(8, 4), {"activation": "tanh"}, "activation='tanh', expected one of none"),
    "backend": (lambda: nn.Linear(8, 4), {"backend": "gpu"}, "backend='gpu', expected one of auto"),
    "not a linear": (lambda: nn.Conv2d(3, 4, 3), {}, "expected an nn.Linear, got Conv2d"),
    "no weight": (nn.ReLU, {}, "expected an nn.Linear, got ReLU"),
    "already int4": (make, {}, "expected a floating"),
}


@pytest.mark.parametrize("case", CONVERSION_ERRORS)
def test_conversion_errors(case: str) -> None:
    source, options, message = CONVERSION_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        Int4Linear.from_float(source(), **options)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_call_errors(backend: str) -> None:
    module = make(backend=backend)
    for x, message in (
        (torch.randn(2, 95), "x has K=95 but weight has K=96"),
        (torch.randn(2, 96).double(), "x has dtype torch.float64"),
        (torch.ones(2, 96, dtype=torch.int64), "x has dtype torch.int64"),
        (torch.tensor(1.0), "x is a scalar"),
        (torch.randn(2, 96, device="meta"), "x is on meta but weight is on cpu; move one"),
        (torch.randn(2, 96).to_sparse(), "x is torch.sparse_coo, expected"),
    ):
        with pytest.raises(ValueError, match=message):
            module(x)
        with pytest.raises(ValueError, match=message), torch.no_grad():
            module(x)
    module(torch.randn(2, 96))  # an error leaves nothing behind


def test_odd_k_is_not_taken_for_its_neighbour() -> None:
    """95 and 96 elements are as many bytes: only the layer knows which."""
    for module in (make(k=95), make(k=95, backend="reference").to("meta")):
        with pytest.raises(ValueError, match="x has K=96 but weight has K=95"):
            module(torch.randn(2, 96, device=module._weight.device))


def test_extra_repr(isa: str) -> None:
    text = "in_features=96, out_features=40, bias="
    module = make()
    native = f"backend=native:{ops.int4_kernel_name(module._weight)}"
    assert make().extra_repr() == f"{text}True, format=int4, group_size=32, {native}"
    shown = make(bias=False, symmetric=False, activation="gelu").extra_repr()
    assert shown == f"{text}False, format=int4, group_size=32, symmetric=False, activation=gelu, {native}"
    assert make("nf4", backend="reference").extra_repr() == f"{text}True, format=nf4, group_size=32, backend=reference"
    assert "backend=reference" in make().to("meta").extra_repr()


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(384, 384), (384, 1536), (1536, 384), (768, 3072)])
def test_one_copy_of_the_weight(isa: str, k: int, n: int) -> None:
    """Half a byte a weight and a scale of 4 bytes a group; the scales too are there once."""
    for symmetric, group_size, bits in ((True, 128, 4.25), (False, 64, 4.625)):
        module = make(k=k, n=n, symmetric=symmetric, group_size=group_size)
        most = 1.01 * bits / 8 * n * k + 4 * n + 64
        reload = lambda m=module: m.load_state_dict(m.state_dict())  # noqa: E731
        for change in (lambda m=module: m(torch.randn(2, k)), reload, module.half):
            change()
            assert held_bytes(module, EagerPlan) <= module.memory_bytes() <= most
        assert module.weight.shape == (n, k // 2)
        assert held_bytes(module, EagerPlan) <= most  # reading .weight keeps nothing
