"""The operator's weight: bitmap and values, damage, and every error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import ops
from pycompress.nn import SparseLinear
from pycompress.ops.sparse_linear import pick
from pycompress.ops.sparse_linear_reference import Call
from tests.sparse_oracle import ANY_M, WEIGHT_DTYPES, layer
from tests.test_sparse_linear import derived
from tests.test_sparse_linear_module import FixedModel

# ---- bitmap and values ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 20), k=st.integers(0, 70), sparsity=st.floats(0, 1), dtype=st.sampled_from(WEIGHT_DTYPES))
def test_bitmap_round_trip(n: int, k: int, sparsity: float, dtype: torch.dtype) -> None:
    made = layer(n, k, dtype, sparsity)
    bitmap, values = ops.sparse_from_dense(made.weight, made.mask)
    assert torch.equal(bitmap, made.bitmap)
    assert torch.equal(values, made.values)
    assert values.dtype == dtype
    assert torch.equal(ops.sparse_to_dense(bitmap, values, k), torch.where(made.mask, made.weight, 0))
    starts = ops.row_starts(bitmap, k)
    assert starts.dtype == torch.int64
    assert torch.equal(starts, torch.cat([torch.zeros(1, dtype=torch.int64), made.mask.sum(1).cumsum(0)]))


DAMAGE: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], str]] = {
    "count": (lambda b, v: (b, v[1:]), "the bitmap keeps .* weights but there are"),
    "more": (lambda b, v: (b, torch.cat([v, v[:1]])), "the bitmap keeps .* weights but there are"),
    "bit": (lambda b, v: (b ^ 2, v), "the bitmap keeps .* weights but there are"),
    "stray": (lambda b, v: (b | torch.tensor([0, 0, 128], dtype=torch.uint8), v), "K=21"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_damaged_weight_is_refused(damage: str, backend: str) -> None:
    change, message = DAMAGE[damage]
    made = layer(5, 21, mask=torch.arange(105).view(5, 21) % 3 == 0)
    bitmap, values = change(made.bitmap, made.values)
    with pytest.raises(ValueError, match=message):
        ops.validate_sparse(bitmap, values, 5, 21)
    with pytest.raises(ValueError, match=message):
        ops.sparse_to_dense(bitmap, values, 21)
    for m in (1, 20):
        with pytest.raises(ValueError, match=message):
            ops.sparse_linear(torch.randn(m, 21), bitmap, values, backend=backend)


@pytest.mark.parametrize("byte", range(0, 72, 3))
def test_a_damaged_index_is_refused(byte: int) -> None:
    made = layer(20, 30)
    forms = derived(made, 30)
    forms["index"][byte] += 1
    with pytest.raises(ValueError, match=r"sparse_linear: .*index"):
        ops.sparse_linear(torch.randn(20, 30), *made.args, choice=(ANY_M, 1), **forms)
    for size in (0, 64, 130):
        forms = derived(made, 30)
        forms["index"] = forms["index"][:size].clone()
        with pytest.raises(ValueError, match=r"sparse_linear: .*index"):
            ops.sparse_linear(torch.randn(20, 30), *made.args, choice=(ANY_M, 1), **forms)


def test_the_index_of_another_weight_is_refused() -> None:
    made = layer(20, 30)
    for n, k in ((21, 30), (20, 31), (20, 30)):
        other = derived(layer(n, k, sparsity=0.1), k)["index"]
        with pytest.raises(ValueError, match="sparse_linear: "):
            ops.sparse_linear(torch.randn(9, 30), *made.args, choice=(ANY_M, 1), index=other)
    other = derived(layer(20, 30, torch.int8), 30)["index"]
    with pytest.raises(ValueError, match="sparse_linear: "):
        ops.sparse_linear(torch.randn(9, 30), *made.args, choice=(ANY_M, 1), index=other)


def test_a_misaligned_index_is_copied() -> None:
    made, x = layer(20, 30), torch.randn(9, 30)
    forms = derived(made, 30)
    expected = ops.sparse_linear(x, *made.args, choice=(ANY_M, 1), **forms)
    forms["index"] = torch.empty(forms["index"].numel() + 1, dtype=torch.uint8)[1:].copy_(forms["index"])
    assert torch.equal(ops.sparse_linear(x, *made.args, choice=(ANY_M, 1), **forms), expected)


# ---- errors -----------------------------------------------------------------------------------------------------

X, B, V, S = torch.randn(2, 96), torch.zeros(8, 12, dtype=torch.uint8), torch.zeros(0), torch.ones(8)
Q, FEW = torch.zeros(0, dtype=torch.int8), torch.zeros(3, dtype=torch.uint8)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "K": ((torch.randn(2, 97), B, V), {}, "x has K=97 but bitmap has 12 bytes a row, which is K=89 to 96"),
    "x dtype": ((X.double(), B, V), {}, "x has dtype torch.float64, expected float32, bfloat16 or float16"),
    "x scalar": ((torch.tensor(1.0), B, V), {}, "x is a scalar"),
    "bitmap dtype": ((X, B.to(torch.int8), V), {}, "bitmap has torch.int8"),
    "bitmap shape": ((X, B[0], V), {}, r"bitmap has torch.uint8 \(12,\)"),
    "values dtype": ((X, B, V.double()), {}, "values have torch.float64"),
    "values shape": ((X, B, V[None]), {}, r"values have torch.float32 \(1, 0\)"),
    "no scale": ((X, B, Q), {}, "weight_scale is missing; int8 values need one"),
    "scale": ((X, B, V, S), {}, "weight_scale is given; int8 values need one, others take none"),
    "scale shape": ((X, B, Q, torch.ones(9)), {}, r"weight_scale has torch.float32 \(9,\), expected .*\(8,\)"),
    "scale dtype": ((X, B, Q, S.double()), {}, "weight_scale has torch.float64"),
    "bias shape": ((X, B, V, None, torch.zeros(9)), {}, r"bias has torch.float32 \(9,\)"),
    "bias dtype": ((X, B, V, None, S.int()), {}, "bias has torch.int32"),
    "device": ((X, B, V.to("meta")), {}, "x is on cpu but values is on meta; move one"),
    "row_start": ((X, B, V), {"row_start": torch.zeros(8)}, r"row_start has torch.float32 \(8,\)"),
    "index": ((X, B, V), {"index": S}, "index has torch.float32 .*, expected the result of pack_index"),
    "dense": ((X, B, V), {"dense": torch.zeros(8, 95)}, r"dense has torch.float32 \(8, 95\), expected .*\(8, 96\)"),
    "dense int8": ((X, B, Q, S), {"dense": torch.zeros(8, 96)}, "expected the result of pack_weight"),
    "choice odd": ((X, B, V), {"choice": (8, 0, 9)}, r"choice=\[8, 0, 9\], expected pairs"),
    "choice code": ((X, B, V), {"choice": (8, 3)}, r"choice=\[8, 3\], expected pairs"),
    "choice order": ((X, B, V), {"choice": (8, 0, 8, 1)}, "ascending"),
    "activation": ((X, B, V), {"activation": "tanh"}, "activation='tanh', expected one of none, relu"),
    "backend": ((X, B, V), {"backend": "hip"}, "backend='hip', expected one of auto, native, cuda, triton, reference"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    args, kwargs, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as raised:
        ops.sparse_linear(*args, **kwargs)
    assert "sparse_linear" in str(raised.value)


def test_from_dense_errors() -> None:
    for weight, mask, message in (
        (torch.zeros(2, 3).double(), torch.ones(2, 3).bool(), "torch.float64"),
        (torch.zeros(6), torch.ones(6).bool(), r"\(6,\)"),
        (torch.zeros(2, 3), torch.ones(2, 3), "the mask is torch.float32"),
        (torch.zeros(2, 3), torch.ones(3, 2).bool(), r"\(3, 2\), expected torch.bool \(2, 3\)"),
        (torch.zeros(2, 3), torch.ones(2, 3, device="meta").bool(), "the mask on meta"),
    ):
        with pytest.raises(ValueError, match=f"sparse_from_dense: .*{message}"):
            ops.sparse_from_dense(weight, mask)


def test_named_backend_never_falls_back() -> None:
    meta = [t.to("meta") for t in (X, B, V)]
    with pytest.raises(ValueError, match="backend='native' cannot run this: x is on meta"):
        pick("native", Call(*meta, None, None, None, None, None, (), "none"))


def test_a_weight_without_an_index_form() -> None:
    """More columns than a list can name: bitmap where the index form was asked for, dense where auto chose it."""
    linear, x = torch.nn.Linear(66000, 2), torch.randn(20, 66000)
    linear.weight.data[:, 1:] *= torch.rand(2, 65999) > 0.9
    bitmap, values = ops.sparse_from_dense(linear.weight.detach(), linear.weight != 0)
    assert ops.pack_index(bitmap, values, ops.row_starts(bitmap, 66000), 66000) is None
    for options, choice, forms in (
        ({"format": "index"}, (ANY_M, 0), ("bitmap",)),
        ({"cost_model": FixedModel(8, 0, ANY_M, 1)}, (8, 0, ANY_M, 2), ("bitmap", "dense")),
    ):
        module = SparseLinear.from_dense(linear, **options)
        assert (module.choice, module.forms()) == (choice, forms)
        torch.testing.assert_close(module(x), linear(x), rtol=1e-4, atol=1e-4)
