"""The cost model itself: shapes, fitting, choosing, corrections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pycompress import cost_core, cost_model
from pycompress.cost_core import ANY_M, BUCKETS, DTYPES, FORMS, Fit, Shape, fit
from tests.cost_fakes import flat, model_of, seconds_of

SHAPE = Shape.random(768, 768, 0.8, "float32")


def pairs(choice):
    return list(zip(choice[::2], choice[1::2], strict=True))


# ---- shapes ----


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 8), (7, 13), (16, 16), (33, 70)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_shape_counts_blocks(n, k, sparsity):
    mask = torch.rand(n, k) >= sparsity
    padded = torch.zeros(-(-n // 4) * 4, -(-k // 4) * 4, dtype=torch.bool)
    padded[:n, :k] = mask
    bits = torch.zeros(n, -(-k // 8) * 8, dtype=torch.uint8)
    bits[:, :k] = mask
    bitmap = (bits.view(n, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    shape = Shape.of(bitmap, k, "int8")

    def blocks(r, c):
        return int(padded.reshape(padded.shape[0] // r, r, -1, c).any(3).any(1).sum())

    assert (shape.n, shape.k, shape.nnz) == (n, k, int(mask.sum()))
    assert (shape.columns, shape.units, shape.blocks) == (blocks(4, 1), blocks(1, 4), blocks(4, 4))
    assert shape.sparsity == pytest.approx(1 - mask.float().mean().item(), abs=1e-6)


def test_shape_of_nothing():
    shape = Shape.of(torch.zeros(0, 0, dtype=torch.uint8), 0, "float32")
    assert (shape.nnz, shape.sparsity) == (0, 0.0)
    assert cost_model.default_cost_model().choose(shape)[-2] == ANY_M


def test_shape_refuses():
    with pytest.raises(ValueError, match="dtype='float16', expected one of float32"):
        Shape.of(torch.zeros(1, 1, dtype=torch.uint8), 8, "float16")
    with pytest.raises(ValueError, match="meta device"):
        Shape.of(torch.zeros(1, 1, dtype=torch.uint8, device="meta"), 8, "int8")


def test_random_shape_is_what_a_random_mask_has():
    mask = torch.rand(512, 512) >= 0.8
    bitmap = (mask.view(512, -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    actual, expected = Shape.of(bitmap, 512, "int8"), Shape.random(512, 512, 0.8, "int8")
    for name in ("nnz", "columns", "units", "blocks"):
        assert getattr(actual, name) == pytest.approx(getattr(expected, name), rel=0.02)


# ---- fitting ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_fit_recovers_what_it_was_measured_from(dtype):
    """Within 10 % on shapes that were not measured, with 5 % of noise in the measurements."""
    model = model_of(dtype, noise=0.05)
    for n, k, s in [(384, 1536, 0.85), (1024, 1024, 0.6), (2304, 768, 0.95), (768, 2304, 0.45)]:
        shape = Shape.random(n, k, s, dtype)
        for form in FORMS:
            for m in (1, 8, 48, 64, 200, 512):
                assert model.predict(form, m, shape) == pytest.approx(seconds_of(form, m, shape), rel=0.25), (form, m)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.floats(0, 1e7), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.floats(1e-6, 1.0), min_size=6, max_size=6),
)
def test_coefficients_are_finite_and_not_negative(counts, seconds):
    found = fit([(1, (1.0, *c), t) for c, t in zip(counts, seconds, strict=False)])
    assert all(0 <= c < float("inf") for c in found.rows[0])
    assert sum(found.rows[0]) > 0


def test_prediction_between_and_beyond_the_measured_tokens():
    line = Fit((1, 16, 64), ((1e-6,), (4e-6,), (8e-6,)))
    assert line.predict(1, (1.0,)) == 1e-6
    assert line.predict(4, (1.0,)) == pytest.approx(2e-6)
    assert line.predict(32, (1.0,)) == pytest.approx(32e-6**0.5 * 1e-3)
    assert line.predict(128, (1.0,)) == pytest.approx(16e-6)


def test_unknown_form():
    with pytest.raises(ValueError, match="no figures for 'float32 csr'; there are bfloat16 bitmap"):
        cost_model.default_cost_model().predict("csr", 1, SHAPE)


# ---- choosing ----


def test_choice_covers_every_m_and_is_merged():
    model = flat(bitmap={1: 1e-6, 10**6: 1.0}, index=3e-6, dense=1.0)
    choice = model.choose(SHAPE)
    assert [code for _, code in pairs(choice)] == [0, 1]
    assert choice[-2] == ANY_M
    assert cost_model.describe_choice(choice).endswith(", index")
    for m in (1, 7, 100, 10**9):
        assert cost_model.form_at(choice, m) in FORMS


@pytest.mark.parametrize("best", FORMS)
def test_the_fastest_is_chosen(best):
    model = flat(**{form: 1e-6 if form == best else 2e-6 for form in FORMS})
    assert model.choose(SHAPE) == (ANY_M, FORMS.index(best))


def test_a_few_percent_spare_the_memory_of_dense():
    assert flat(bitmap=1.02e-6, index=5e-6, dense=1e-6).choose(SHAPE) == (ANY_M, 0)
    assert flat(bitmap=1.05e-6, index=5e-6, dense=1e-6).choose(SHAPE) == (ANY_M, 2)


def test_tokens_that_matter():
    model = flat(bitmap={1: 1e-6, 8: 8e-6, 10**6: 1.0}, index=5e-6, dense=1.0)
    assert model.choose(SHAPE, tokens=(1,)) == (ANY_M, 0)
    assert model.choose(SHAPE, tokens=(64, 128)) == (ANY_M, 1)
    assert model.choose(SHAPE, tokens=(1, 64)) == model.choose(SHAPE)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.floats(0.0, 1.0),
    st.integers(1, 5000),
)
def test_never_predicted_much_slower_than_the_best(dtype, n, k, sparsity, m):
    """Within a bucket the ends decide, so at these no other form is better than the choice by more than the slack."""
    model, shape = cost_model.default_cost_model(), Shape.random(n, k, sparsity, dtype)
    choice = model.choose(shape)
    assert [most for most, _ in pairs(choice)] == sorted({most for most, _ in pairs(choice)})
    high = next(b for b in BUCKETS if m <= b)
    if high < ANY_M:
        low = ([0, *BUCKETS])[BUCKETS.index(high)] + 1
        times = [{form: model.predict(form, end, shape) for form in FORMS} for end in (low, high)]
        losses = {form: max(t[form] / min(t.values()) for t in times) for form in FORMS}
        assert losses[cost_model.form_at(choice, high)] <= cost_core.SLACK * min(losses.values()) * (1 + 1e-9)


# ---- corrections ----


def test_a_measured_time_takes_the_place_of_the_prediction():
    model = flat(bitmap=1e-6, index=2e-6, dense=1.5e-6)
    model.correct("bitmap", 64, SHAPE, 4e-6)
    model.correct("bitmap", 512, SHAPE, 1e-6)
    assert model.predict("bitmap", 64, SHAPE) == pytest.approx(4e-6)
    assert model.predict("bitmap", 1, SHAPE) == pytest.approx(4e-6)
    assert model.predict("bitmap", 181, SHAPE) == pytest.approx(2e-6, rel=0.01)
    assert model.predict("bitmap", 64, SHAPE, corrected=False) == pytest.approx(1e-6)
    other = Shape.random(768, 768, 0.5, "float32")
    assert model.predict("bitmap", 64, other) == pytest.approx(1e-6)
    assert cost_model.form_at(model.choose(SHAPE), 64) == "dense"
    assert model.is_corrected("bitmap", 64, SHAPE)
    assert not model.is_corrected("index", 64, SHAPE)
