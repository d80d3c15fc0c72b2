"""The operator on every backend, form and instruction set, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import _native, ops
from pycompress.ops.sparse_linear_weight import bitmap_kernel_name, index_info
from tests.sparse_oracle import ANY_M, FORMS, WEIGHT_DTYPES, X_DTYPES, Layer, assert_close, block_mask, layer, pack

SHAPES = [
    (0, 8, 8), (1, 1, 1), (1, 300, 700), (15, 17, 31), (65, 33, 127), (3, 5, 5001), (7, 130, 64), (4, 9, 0), (9, 1, 1),
    (8, 64, 65), (70, 21, 300), (129, 48, 16),
]  # fmt: skip
BLOCKS = [(1, 1), (4, 1), (1, 4), (4, 4), (2, 1), (16, 16)]


def derived(made: Layer, k: int) -> dict[str, Tensor | None]:
    """The forms as a module holds them."""
    start = ops.row_starts(made.bitmap, k)
    dense = ops.sparse_to_dense(made.bitmap, made.values, k)
    return {
        "row_start": start,
        "index": ops.pack_index(made.bitmap, made.values, start, k),
        "dense": ops.pack_weight(dense) if made.scale is not None else dense,
    }


def run(x: Tensor, made: Layer, form: str, held: bool = True, **options: Any) -> Tensor:
    """In one form whatever M; held: derived forms are handed over, else made on the spot."""
    choice = (ANY_M, FORMS.index(form))
    forms = derived(made, x.shape[-1]) if held else {}
    return ops.sparse_linear(x, *made.args, choice=choice, backend="native", **forms, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_native_matches_float64(isa: str, dtype: torch.dtype, weight: torch.dtype, form: str) -> None:
    for m, n, k in SHAPES:
        x = torch.randn(m, k).to(dtype)
        for bias, held in ((True, True), (False, False)):
            made = layer(n, k, weight, bias=bias)
            assert_close(run(x, made, form, held), x, made, form=form)


@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_reference_matches_float64(dtype: torch.dtype, weight: torch.dtype) -> None:
    for m, n, k in SHAPES:
        x, made = torch.randn(m, k).to(dtype), layer(n, k, weight)
        assert_close(ops.sparse_linear(x, *made.args, backend="reference"), x, made)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_patterns(isa: str, block: tuple[int, int], weight: torch.dtype, form: str) -> None:
    """From a full to an empty weight; ragged blocks; M on both sides of a panel of tokens."""
    for sparsity in (0.0, 0.5, 0.9, 0.99, 1.0):
        for m in (3, 67):
            x, made = torch.randn(m, 67), layer(30, 67, weight, sparsity, block)
            assert made.mask.all() == (sparsity == 0)
            y = run(x, made, form)
            assert_close(y, x, made, form=form)
            if sparsity == 1.0:
                assert torch.equal(y, made.bias.expand(m, 30))


@pytest.mark.parametrize("form", ["bitmap", "index"])
@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
def test_uneven_rows(isa: str, weight: torch.dtype, form: str) -> None:
    """Empty rows beside full ones, single weights at either end, and a column that everyone keeps."""
    mask = block_mask(37, 130, 0.8)
    mask[8:, 64] = True
    mask[[0, 5, 6, 7, 36]] = False
    mask[[1, 20]] = True
    mask[5, 0] = mask[6, 129] = True
    made = layer(37, 130, weight, mask=mask)
    for m in (1, 8, 9, 63, 64, 65, 128):
        x = torch.randn(m, 130)
        y = run(x, made, form)
        assert_close(y, x, made)
        assert torch.equal(y[:, [0, 7, 36]], made.bias[[0, 7, 36]].expand(m, 3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
def test_activations(isa: str, weight: torch.dtype, activation: str, form: str) -> None:
    """K = 0 leaves act(bias): the whole range of the activation; then a product before it."""
    tails = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4])
    values = torch.cat([torch.linspace(-30, 30, 301), tails])
    empty = layer(len(values), 0, weight)._replace(bias=values)
    for dtype in X_DTYPES:
        x = torch.zeros(2, 0, dtype=dtype)
        assert_close(run(x, empty, form, activation=activation), x, empty, activation, form)
        for m in (5, 33):
            x, made = torch.randn(m, 50).to(dtype), layer(19, 50, weight)
            assert_close(run(x, made, form, activation=activation), x, made, activation, form)


@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("form", ["bitmap", "index"])
def test_every_tail(isa: str, form: str, weight: torch.dtype) -> None:
    """Every number of tokens in a tile with every number of outputs in a group, and every K in a byte."""
    for n in (1, 2, 3, 5, 16, 17):
        made = layer(n, 41, weight, 0.5)
        forms = derived(made, 41)
        for m in (*range(1, 18), 31, 33, 63, 65, 129):
            x = torch.randn(m, 41)
            choice = (ANY_M, FORMS.index(form))
            assert_close(ops.sparse_linear(x, *made.args, choice=choice, backend="native", **forms), x, made)
    for k in (*range(1, 10), *range(14, 19), *range(30, 35)):
        made = layer(9, k, weight, 0.4)
        for m in (4, 20):
            x = torch.randn(m, k)
            assert_close(run(x, made, form), x, made)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 5, 4096, 65473, 140000])
@pytest.mark.parametrize("signs", ["same", "opposite", "random"])
def test_integer_sums_are_exact(isa: str, k: int, signs: str, form: str) -> None:
    """x_scale and weight_scale are 1, so that y is the integer sum, at its extremes: where int16 or int32 wraps."""
    q = torch.full((3, k), 127.0)
    weight = torch.full((6, k), -127 if signs == "opposite" else 127, dtype=torch.int8)
    mask = torch.ones(6, k, dtype=torch.bool)
    if signs == "random":
        q = torch.randint(-127, 128, (3, k)).float()
        q[:, 0] = 127
        weight = torch.randint(-128, 128, (6, k), dtype=torch.int8)
        mask = block_mask(6, k, 0.3)
    made = Layer(weight, mask, *pack(weight, mask), torch.ones(6), None)
    expected = (q.numpy().astype(np.int64) @ (weight * mask).numpy().astype(np.int64).T).astype(np.float32)
    np.testing.assert_array_equal(run(q, made, form).numpy(), expected)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (1, 4), (4, 1)], ids=str)
def test_int8_agrees_with_the_dense_int8_layer(isa: str, block: tuple[int, int], activation: str) -> None:
    """The same integers, so nothing but the order of the float epilogue can differ."""
    made = layer(70, 200, torch.int8, 0.6, block)
    for m in (1, 7, 70):
        x = torch.randn(m, 200)
        dense = ops.int8_linear(x, made.weight * made.mask, made.scale, made.bias, activation=activation)
        for form in FORMS:
            torch.testing.assert_close(run(x, made, form, activation=activation), dense, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_bad_values_stay_in_their_row(isa: str, bad: float, weight: torch.dtype, form: str) -> None:
    """int8: NaN in that whole row of y; float: what keeps a weight there is not finite."""
    for dtype in X_DTYPES:
        for m in (5, 70):
            x, made = torch.randn(m, 100).to(dtype), layer(30, 100, weight)
            clean = run(x, made, form)
            x[4, 99] = bad
            y = run(x, made, form)
            if weight == torch.int8:
                assert y[4].isnan().all()
            else:
                kept = (made.weight * made.mask)[:, 99] != 0
                assert kept.any()
                assert not y[4][kept].isfinite().any()
            others = [i for i in range(m) if i != 4]
            torch.testing.assert_close(y[others], clean[others], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["bitmap", "index"])
@pytest.mark.parametrize("m", [4, 65])
def test_zero_tiny_and_huge_rows(isa: str, m: int, form: str) -> None:
    x = torch.randn(m, 50)
    x[0], x[1], x[2], x[3] = 0, 1e-45, 1e-38, 3e36
    for weight in WEIGHT_DTYPES:
        made = layer(40, 50, weight)
        y = run(x, made, form)
        assert torch.equal(y[0], made.bias)
        assert_close(y, x, made)


def views() -> dict[str, Tensor]:
    """By name, K = 70."""
    return {
        "transposed": torch.randn(70, 13).t(),
        "column step": torch.randn(13, 210)[:, ::3],
        "row step": torch.randn(26, 70)[::2],
        "slice of a batch": torch.randn(5, 9, 70)[:, 2:6],
        "batch second": torch.randn(9, 5, 70).transpose(0, 1),
        "expanded": torch.randn(1, 1, 70).expand(3, 4, 70),
        "expanded columns": torch.randn(6, 1).expand(6, 70),
        "three levels": torch.randn(3, 4, 5, 70)[:, 1:3, 1:4].transpose(0, 2),
        "one row": torch.randn(70),
        "prime strides": torch.as_strided(torch.randn(20000), (3, 7, 70), (1511, 67, 5)),
        "offset": torch.randn(13 * 70 + 1)[1:].view(13, 70),
        "many": torch.randn(70, 150).t(),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
def test_strides(isa: str, weight: torch.dtype, form: str) -> None:
    made = layer(33, 70, weight)
    exact = form != "dense" or weight == torch.int8  # torch's product adds in another order
    for dtype in X_DTYPES:
        for name, view in views().items():
            x = torch.empty_strided(view.shape, view.stride(), dtype=dtype)
            x = view.to(dtype) if "expanded" in name else x.copy_(view)
            y = run(x, made, form)
            assert y.shape == (*x.shape[:-1], 33)
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 0.02, "atol": 0.05}
            plain = run(x.contiguous(), made, form)
            torch.testing.assert_close(y, plain, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("form", ["bitmap", "index"])
@pytest.mark.parametrize("shape", [(1, 1000, 999), (5, 300, 1000), (200, 60, 300), (64, 700, 100)], ids=str)
def test_any_number_of_threads(isa: str, shape: tuple[int, int, int], form: str, weight: torch.dtype) -> None:
    """int8: bit for bit the same. Float sums may be split otherwise, where a thread has fewer tokens."""
    m, n, k = shape
    x, made, before = torch.randn(m, k), layer(n, k, weight, 0.9), torch.get_num_threads()
    forms, results = derived(made, k), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.sparse_linear(x, *made.args, choice=(ANY_M, FORMS.index(form)), **forms))
    finally:
        torch.set_num_threads(before)
    for y in results:
        assert_close(y, x, made)
        assert weight != torch.int8 or torch.equal(y, results[0])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 140), n=st.integers(0, 60), k=st.integers(0, 200), seed=st.integers(0, 2**31),
    dtype=st.sampled_from(X_DTYPES), weight=st.sampled_from(WEIGHT_DTYPES), sparsity=st.floats(0, 1),
    block=st.sampled_from(BLOCKS), bias=st.sampled_from((None, *X_DTYPES)), activation=st.sampled_from(ops.ACTIVATIONS),
    magnitude=st.integers(-3, 3), row_gap=st.integers(0, 9), column_step=st.integers(1, 3), form=st.sampled_from(FORMS),
)  # fmt: skip
def test_drawn(
    isa: str, m: int, n: int, k: int, seed: int, dtype: torch.dtype, weight: torch.dtype, sparsity: float,
    block: tuple[int, int], bias: torch.dtype | None, activation: str, magnitude: int, row_gap: int, column_step: int,
    form: str,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    made = layer(n, k, weight, sparsity, block)
    made = made._replace(bias=None if bias is None else made.bias.to(bias))
    x = (torch.randn(m, k * column_step + row_gap) * 10.0**magnitude).to(dtype)[:, : k * column_step : column_step]
    assert_close(run(x, made, form, activation=activation), x, made, activation, form)


# ---- forms ------------------------------------------------------------------------------------------------------


def test_choice_decides(isa: str) -> None:
    """Bit for bit what the form alone computes, at both sides of each limit."""
    made = layer(40, 100)
    forms = derived(made, 100)
    for choice in ((), (8, 0, ANY_M, 1), (3, 2, 10, 0, ANY_M, 1), (4, 0, 9, 2)):
        for m in (1, 3, 4, 8, 9, 10, 11, 100):
            pairs = list(zip(choice[::2], choice[1::2], strict=True)) or [(8, 0), (ANY_M, 1)]
            code = next((code for most, code in pairs if m <= most), pairs[-1][1])
            x = torch.randn(m, 100)
            y = ops.sparse_linear(x, *made.args, choice=choice, **forms)
            assert torch.equal(y, run(x, made, FORMS[code])), (choice, m)


def test_the_default_needs_nothing_derived(isa: str) -> None:
    made = layer(40, 100)
    for m in (1, 8, 9, 64):
        x = torch.randn(m, 100)
        assert_close(ops.sparse_linear(x, *made.args), x, made)


@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
def test_foreign_index_still_runs(isa: str, weight: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index made for another instruction set (in an exported program, say) gives the same result here."""
    x, made = torch.randn(70, 90), layer(33, 90, weight)
    forms = derived(made, 90)
    for other in _native.available_isas():
        monkeypatch.setenv("PYCOMPRESS_ISA", other)
        assert_close(ops.sparse_linear(x, *made.args, choice=(ANY_M, 1), **forms), x, made)


@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=str)
def test_kernel_names(isa: str, weight: torch.dtype) -> None:
    made = layer(40, 100, weight)
    info = index_info(derived(made, 100)["index"])
    assert (info["n"], info["k"], info["nnz"]) == (40, 100, made.values.numel())
    assert ops.sparse_kernel_names(weight)[0] == bitmap_kernel_name(weight)
    for name in (info["kernel"], *ops.sparse_kernel_names(weight)):
        assert name.startswith("sparse_linear_")
