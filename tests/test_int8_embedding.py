"""The operators ``int8_embedding`` and ``int8_embedding_bag``: every backend and instruction set against float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pycompress import _native, ops
from pycompress.ops.int8_embedding import pick_rows
from pycompress.ops.int8_embedding_reference import Lookup
from tests.oracle import ROUNDOFF

ROWS, BAG = torch.ops.pycompress.int8_embedding.default, torch.ops.pycompress.int8_embedding_bag.default
BACKENDS = ("native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int64, torch.int32)


def table(v: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, (v, d), dtype=torch.int8), torch.rand(v) * 0.1 + 0.001


def exact_rows(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.double() * scale.double()[:, None]


def oracle_bag(
    rows: np.ndarray, bags: list[list[int]], weights: list[list[float]] | None, mode: str, padding: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The float64 result and the sum of the magnitudes that met in it, bag by bag."""
    result = np.zeros((len(bags), rows.shape[1]))
    magnitude = np.zeros_like(result)
    for b, bag in enumerate(bags):
        kept = [(i, 1.0 if weights is None else weights[b][j]) for j, i in enumerate(bag) if i != padding]
        if not kept:
            continue
        terms = np.stack([rows[i] * w for i, w in kept])
        magnitude[b] = np.abs(terms).sum(0)
        result[b] = {"sum": terms.sum(0), "mean": terms.mean(0), "max": terms.max(0)}[mode]
    return result, magnitude


def assert_close(y: Tensor, expected: np.ndarray, magnitude: np.ndarray, dtype: torch.dtype) -> None:
    assert y.dtype == dtype
    assert tuple(y.shape) == expected.shape
    allowed = 2.0**-24 * 16 * magnitude + 2 * ROUNDOFF[dtype] * np.abs(expected) + 2.0**-25
    excess = np.abs(y.double().numpy() - expected) - allowed
    assert excess.size == 0 or excess.max() <= 0, f"worst at {np.unravel_index(excess.argmax(), excess.shape)}"


# ---- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 16, 33, 64, 100, 384])
def test_rows(isa: str, d: int, dtype: torch.dtype) -> None:
    """Every backend gives the product of int8 and scale, rounded once: equal to the last bit."""
    weight, scale = table(50, d)
    for shape in ((), (1,), (3, 5), (2, 0, 3), (2, 1, 3, 2)):
        indices = torch.randint(0, 50, shape)
        expected = (weight.float() * scale[:, None])[indices].to(dtype)
        for backend in BACKENDS:
            for kind in INDICES:
                y = ops.int8_embedding(indices.to(kind), weight, scale, dtype=dtype, backend=backend)
                assert y.dtype == dtype
                assert torch.equal(y, expected), (backend, kind)
    assert ops.embedding_kernel_name().removeprefix("int8_embedding_") in ("scalar", "avx2", "avx512")


def test_rows_of_strided_indices_and_many_threads(isa: str) -> None:
    weight, scale = table(300, 130)
    indices = torch.randint(0, 300, (64, 90)).t()[::3]
    expected = (weight.float() * scale[:, None])[indices]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.int8_embedding(indices, weight, scale), expected)
    finally:
        torch.set_num_threads(before)


def test_empty_tables() -> None:
    for v, d in ((0, 4), (4, 0), (0, 0)):
        weight, scale = table(v, d)
        for backend in BACKENDS:
            empty = torch.zeros(0, dtype=torch.int64)
            assert ops.int8_embedding(empty, weight, scale, backend=backend).shape == (0, d)
            assert ops.int8_embedding_bag(empty, weight, scale, empty, backend=backend).shape == (0, d)
            with pytest.raises(IndexError, match=f"V={v} rows"):
                ops.int8_embedding(torch.tensor([4]), weight, scale, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_no_bags_of_some_indices(mode: str, backend: str) -> None:
    weight, scale = table(5, 3)
    starts, indices = torch.zeros(0, dtype=torch.int64), torch.tensor([1, 2])
    y = ops.int8_embedding_bag(indices, weight, scale, starts, mode=mode, dtype=torch.float16, backend=backend)
    assert (y.shape, y.dtype) == ((0, 3), torch.float16)
    with pytest.raises(IndexError, match="index 5"):
        ops.int8_embedding_bag(indices + 3, weight, scale, starts, mode=mode, backend=backend)


# ---- bags -------------------------------------------------------------------------------------------------------

BAGS = [[], [3, 3, 7], [], [0], list(range(20)) * 3, [5, 5], []]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 5])
def test_bags(isa: str, mode: str, dtype: torch.dtype, padding: int | None) -> None:
    for d in (1, 15, 16, 129):
        weight, scale = table(20, d)
        rows = exact_rows(weight, scale).numpy()
        weights = [[float(np.float32(1.5 - 0.3 * j)) for j in range(len(bag))] for bag in BAGS]
        for given_weights in (None, weights) if mode == "sum" else (None,):
            expected, magnitude = oracle_bag(rows, BAGS, given_weights, mode, padding)
            flat = torch.tensor([i for bag in BAGS for i in bag])
            starts = torch.tensor([0, *np.cumsum([len(bag) for bag in BAGS])])
            samples = None if given_weights is None else torch.tensor([w for bag in weights for w in bag])
            for backend in BACKENDS:
                for kind, last in ((torch.int64, False), (torch.int32, True)):
                    y = ops.int8_embedding_bag(
                        flat.to(kind),
                        weight,
                        scale,
                        (starts if last else starts[:-1]).to(kind),
                        mode=mode,
                        dtype=dtype,
                        per_sample_weights=samples,
                        include_last_offset=last,
                        padding_idx=padding,
                        backend=backend,
                    )
                    assert_close(y, expected, magnitude, dtype)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bags_of_equal_size_are_torchs(mode: str, backend: str) -> None:
    weight, scale = table(40, 33)
    dense = exact_rows(weight, scale)
    assert (ops.int8_embedding_bag(torch.zeros(3, 0).int(), weight, scale, mode=mode, backend=backend) == 0).all()
    for shape in ((6, 5), (6, 1), (0, 5)):
        indices = torch.randint(0, 40, shape)
        for padding in (None, 0, 39):
            y = ops.int8_embedding_bag(indices, weight, scale, mode=mode, padding_idx=padding, backend=backend)
            expected = F.embedding_bag(indices, dense, mode=mode, padding_idx=padding)
            torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_shares_of_unequal_bags(mode: str) -> None:
    """The bits do not depend on the number of threads, wherever the shares of the threads end."""
    weight, scale = table(200, 96)
    flat, offsets = torch.randint(0, 200, (5000,)), torch.tensor([0, 0, 4000, 4000, 4001, 4001, 4990, 5000, 5000])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.int8_embedding_bag(flat, weight, scale, offsets, mode=mode))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert (results[0][[0, 2, 4, 7, 8]] == 0).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bags(data: st.DataObject) -> None:
    v, d = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 70))
    bags = data.draw(st.lists(st.lists(st.integers(0, v - 1), max_size=9), max_size=6))
    mode = data.draw(st.sampled_from(("sum", "mean", "max")))
    padding = data.draw(st.none() | st.integers(0, v - 1))
    kind, offset_kind = data.draw(st.sampled_from(INDICES)), data.draw(st.sampled_from(INDICES))
    torch.manual_seed(d)
    weight, scale = table(v, d)
    flat = torch.tensor([i for bag in bags for i in bag], dtype=kind)
    offsets = torch.tensor([0, *np.cumsum([len(bag) for bag in bags])][:-1], dtype=offset_kind)
    expected, magnitude = oracle_bag(exact_rows(weight, scale).numpy(), bags, None, mode, padding)
    for backend in BACKENDS:
        y = ops.int8_embedding_bag(flat, weight, scale, offsets, mode=mode, padding_idx=padding, backend=backend)
        assert_close(y, expected, magnitude, torch.float32)


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", INDICES, ids=str)
def test_index_errors(isa: str, backend: str, kind: torch.dtype) -> None:
    weight, scale = table(10, 20)
    bad = [-1, 10, -(2**31), 2**31 - 1, *([2**40, -(2**63)] if kind == torch.int64 else [])]
    for value in bad:
        indices = torch.zeros(2, 6, dtype=kind)
        indices[1, 2] = value
        message = re.escape(f"int8_embedding: index {value} (at position 8) is out of range for a table of V=10 rows")
        with pytest.raises(IndexError, match=message):
            ops.int8_embedding(indices, weight, scale, backend=backend)
        for mode in ("sum", "mean", "max"):  # also where the index is the one left out
            with pytest.raises(IndexError, match=message):
                ops.int8_embedding_bag(indices, weight, scale, mode=mode, padding_idx=0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_errors(backend: str) -> None:
    weight, scale = table(10, 4)
    flat = torch.tensor([1, 2, 3, 4])
    for offsets, last, message in (
        ([1, 2], False, "offsets[0]=1, expected 0"),
        ([0, 3, 2], False, "offsets[2]=2 is less than the one before it, 3"),
        ([0, -1], False, "offsets[1]=-1 is less than the one before it, 0"),
        ([0, 2, 7], False, "offsets[2]=7 is beyond the 4 indices"),
        ([0, 2, 3], True, "the last offset is 3, expected 4"),
        ([], True, "offsets are empty"),
    ):
        starts = torch.tensor(offsets, dtype=torch.int64)
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.int8_embedding_bag(flat, weight, scale, starts, include_last_offset=last, backend=backend)


def test_argument_errors() -> None:
    weight, scale = table(10, 4)
    one, flat = torch.tensor([1]), torch.tensor([1, 2])
    start, ones = torch.tensor([0]), torch.ones(2)
    for message, call in (
        ("the indices are torch.float32", lambda: ops.int8_embedding(torch.ones(2), weight, scale)),
        ("weight has torch.float32", lambda: ops.int8_embedding(one, weight.float(), scale)),
        ("weight has torch.int8 (4, 10)", lambda: ops.int8_embedding(one, weight.t(), scale)),
        ("weight_scale has torch.float32 (9,)", lambda: ops.int8_embedding(one, weight, scale[:9])),
        ("dtype=torch.float64", lambda: ops.int8_embedding(one, weight, scale, dtype=torch.float64)),
        ("backend='cuda', expected one of auto", lambda: ops.int8_embedding(one, weight, scale, backend="cuda")),
        ("x is on cpu but weight is on meta", lambda: ops.int8_embedding(one, weight.to("meta"), scale)),
        ("1-D indices need offsets", lambda: ops.int8_embedding_bag(flat, weight, scale)),
        ("take none", lambda: ops.int8_embedding_bag(flat[None], weight, scale, start)),
        ("expected (count,) with offsets", lambda: ops.int8_embedding_bag(flat[None, None], weight, scale)),
        ("mode='min', expected one of sum", lambda: ops.int8_embedding_bag(flat, weight, scale, start, mode="min")),
        ("they belong to mode='sum'",
         lambda: ops.int8_embedding_bag(flat, weight, scale, start, per_sample_weights=ones)),
        ("torch.float32 (1,), expected",
         lambda: ops.int8_embedding_bag(flat, weight, scale, start, mode="sum", per_sample_weights=ones[:1])),
        ("torch.int64 (2,), expected",
         lambda: ops.int8_embedding_bag(flat, weight, scale, start, mode="sum", per_sample_weights=flat)),
        ("offsets are torch.float32", lambda: ops.int8_embedding_bag(flat, weight, scale, ones)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_native_refuses_another_device() -> None:
    weight, scale = (t.to("meta") for t in table(4, 4))
    call = Lookup(weight, scale, torch.zeros(1, dtype=torch.int64, device="meta"), torch.float32)
    with pytest.raises(ValueError, match="the indices are on meta, the native kernels run on the CPU"):
        pick_rows("native", call)
    assert pick_rows("auto", call).name == "reference"


# ---- torch ------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    weight, scale = table(30, 20)
    indices, offsets = torch.randint(0, 30, (12,)), torch.tensor([0, 0, 5, 12])
    torch.library.opcheck(ROWS, (weight, scale, indices.reshape(3, 4), torch.bfloat16))
    samples = torch.randn(12, requires_grad=True)
    torch.library.opcheck(BAG, (weight, scale, indices, offsets, "sum", torch.float32, samples, True, 3))
    torch.library.opcheck(BAG, (weight, scale, indices.reshape(3, 4), None, "max", torch.float16, None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_gradient_of_the_sample_weights(backend: str, kind: torch.dtype) -> None:
    weight, scale = table(30, 20)
    indices, dense = torch.randint(0, 30, (12,)), exact_rows(weight, scale).float()
    grad = torch.randn(4, 20)
    for offsets, last in ((torch.tensor([0, 0, 5, 11]), False), (torch.tensor([0, 3, 3, 5, 12]), True)):
        samples = torch.randn(12).to(kind).requires_grad_()
        y = ops.int8_embedding_bag(
            indices, weight, scale, offsets, mode="sum", per_sample_weights=samples, include_last_offset=last,
            padding_idx=int(indices[4]), backend=backend,
        )  # fmt: skip
        (got,) = torch.autograd.grad(y, samples, grad)
        exact = samples.detach().float().requires_grad_()
        expected = F.embedding_bag(
            indices, dense, offsets, mode="sum", per_sample_weights=exact, include_last_offset=last,
            padding_idx=int(indices[4]),
        )  # fmt: skip
        (want,) = torch.autograd.grad(expected, exact, grad)
        assert got.dtype == kind
        torch.testing.assert_close(got.float(), want, rtol=ROUNDOFF[kind] * 4 + 1e-5, atol=1e-5)
        assert got[4] == 0
    square = indices.reshape(3, 4)
    samples = torch.randn(3, 4, requires_grad=True)
    y = ops.int8_embedding_bag(square, weight, scale, mode="sum", per_sample_weights=samples, backend=backend)
    (got,) = torch.autograd.grad(y, samples, grad[:3])
    torch.testing.assert_close(got, (dense[square] * grad[:3, None]).sum(-1), rtol=1e-5, atol=1e-5)


def test_isas_are_those_of_the_machine() -> None:
    names = {"avx512vnni": "avx512", "avx512": "avx512", "avxvnni": "avx2", "avx2": "avx2", "scalar": "scalar"}
    assert ops.embedding_kernel_name() == f"int8_embedding_{names[_native.selected_isa()]}"
