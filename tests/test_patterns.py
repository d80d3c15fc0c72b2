"""Patterns: every mask prunes exactly the units with the lowest scores, against a loop that says what that means."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pycompress.pruning.patterns import Pattern, check_fraction, lowest

TEXTS = ["unstructured", "4x1", "1x4", "4x4", "16x16", "3x5", "row", "column", "2:4", "1:4", "3:7", "0:2", "4:4"]


def units_of(pattern, n, k):
    """Every unit as a list of (row, column), by the definition."""
    if pattern.kind == "row":
        return [[(i, j) for j in range(k)] for i in range(n)]
    if pattern.kind == "column":
        return [[(i, j) for i in range(n)] for j in range(k)]
    rows, columns = (1, pattern.keep[1]) if pattern.kind == "n:m" else pattern.block
    starts = itertools.product(range(0, n, rows), range(0, k, columns))
    return [[(i, j) for i in range(a, min(a + rows, n)) for j in range(b, min(b + columns, k))] for a, b in starts]


def oracle(pattern, scores, sparsity):
    """The mask: units sorted by (score, index), the first round(sparsity * units) pruned."""
    n, k = scores.shape
    mask = torch.ones(n, k, dtype=torch.bool)
    units = units_of(pattern, n, k)
    values = scores.double()

    def cut(unit):
        """N:M: what goes of a group: all but the N highest, of equal ones the first."""
        drop = max(len(unit) - pattern.keep[0], 0)
        return sorted(unit, key=lambda at: (float(values[at]), at))[:drop]

    gone = [cut(unit) if pattern.kind == "n:m" else unit for unit in units]
    losses = [sum(float(values[at]) for at in cells) for cells in gone]
    share = sparsity
    if pattern.kind == "n:m":
        share = sparsity / pattern.sparsity if pattern.sparsity else 0
    count = round(share * len(units))
    for index in sorted(range(len(units)), key=lambda u: (losses[u], u))[:count]:
        for at in gone[index]:
            mask[at] = False
    return mask


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", [(16, 16), (17, 19), (1, 1), (3, 50), (50, 3), (16, 0), (0, 5)])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_mask_is_that_of_the_definition(text, shape, fraction):
    pattern = Pattern.parse(text)
    # Few different scores, exact in any sum: ties everywhere.
    scores = torch.randint(0, 4, shape).float()
    sparsity = fraction if pattern.sparsity is None else fraction * pattern.sparsity
    mask = pattern.mask_from_scores(scores, sparsity)
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert torch.equal(mask, oracle(pattern, scores, sparsity))
    assert pattern.units(shape) == len(units_of(pattern, *shape))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 12),
    text=st.sampled_from(TEXTS),
    sparsity=st.floats(0, 1),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_sparsity(n, k, text, sparsity, levels, seed):
    pattern = Pattern.parse(text)
    scores = torch.randint(-levels, levels, (n, k), generator=torch.Generator().manual_seed(seed)).float()
    if pattern.sparsity is not None:
        sparsity *= pattern.sparsity
    assert torch.equal(pattern.mask_from_scores(scores, sparsity), oracle(pattern, scores, sparsity))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.777, 1.0])
@pytest.mark.parametrize("scores", [torch.zeros(31, 17), torch.randn(31, 17), torch.arange(31 * 17.0).view(31, 17)])
def test_unstructured_sparsity_is_exact(sparsity, scores):
    mask = Pattern.parse("unstructured").mask_from_scores(scores, sparsity)
    assert int((~mask).sum()) == round(sparsity * scores.numel())


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.1, 0.5, 0.55, 0.95, 1.0])
@pytest.mark.parametrize("levels", [1, 5, 1000])
def test_per_row_is_even_and_exact(sparsity, levels):
    scores = torch.randint(0, levels, (7, 11)).float()
    mask = Pattern.parse("unstructured").mask_from_scores(scores, sparsity, per_row=True)
    gone = (~mask).sum(1)
    assert int(gone.sum()) == round(sparsity * 77)
    assert int(gone.max() - gone.min()) <= 1
    for row in range(7):  # what goes is no higher than what stays
        if 0 < gone[row] < 11:
            ordered = sorted(range(11), key=lambda at: (float(scores[row, at]), at))
            assert (~mask[row]).nonzero().flatten().tolist() == sorted(ordered[: int(gone[row])])


def test_n_of_m_keeps_the_highest_of_every_group():
    scores = torch.randn(9, 10).abs()
    mask = Pattern.parse("2:4").mask_from_scores(scores)
    assert (mask[:, :8].view(9, 2, 4).sum(2) == 2).all()
    assert mask[:, 8:].all()  # a group of two is no more than 2
    assert torch.equal(mask[:, :4].nonzero()[:, 1].view(9, 2), scores[:, :4].topk(2, dim=1).indices.sort(dim=1).values)
    half = Pattern.parse("2:4").mask_from_scores(scores, 0.25)
    assert (mask <= half).all()  # the same weights, of some of the groups
    assert 0 < (~half).sum() < (~mask).sum()


def test_n_of_m_takes_no_more_than_it_prunes():
    with pytest.raises(ValueError, match=r"'2:4' prunes 0.5 of the weights; got sparsity=0.6"):
        Pattern.parse("2:4").mask_from_scores(torch.rand(4, 4), 0.6)


def test_bfloat16_scores_and_tiny_values():
    scores = torch.rand(8, 8).bfloat16()
    mask = Pattern.parse("2x2").mask_from_scores(scores, 0.5)
    assert torch.equal(mask, Pattern.parse("2x2").mask_from_scores(scores.double(), 0.5))
    tiny = torch.rand(8, 8, dtype=torch.float64) * 1e-300
    assert torch.equal(Pattern.parse("4x1").mask_from_scores(tiny, 0.5), oracle(Pattern.parse("4x1"), tiny, 0.5))


def test_spread_undoes_unit_scores():
    for text in ("unstructured", "3x2", "row", "column", "2:4"):
        pattern = Pattern.parse(text)
        units = pattern.units((7, 9))
        values = torch.arange(float(units))
        spread = pattern.spread(values, (7, 9))
        sizes = pattern.weights((7, 9))
        assert sizes.sum() == 63
        if pattern.kind != "n:m":
            assert torch.equal(pattern.unit_scores(spread).double(), values.double() * sizes)


@pytest.mark.parametrize("text", ["4:2", "0x4", "x4", "2:", "diagonal", "4x", "", "-1x4", "2:0", " 4x4", "4X4"])
def test_unknown_patterns(text):
    with pytest.raises(ValueError, match="pattern"):
        Pattern.parse(text)


def test_other_types_are_no_pattern():
    with pytest.raises(TypeError, match="pattern is a int"):
        Pattern.parse(4)
    pattern = Pattern.parse("4x4")
    assert Pattern.parse(pattern) is pattern


def test_a_layer_smaller_than_one_unit_says_which_dimension():
    message = r"'fc'.*'16x16' needs 16 outputs \(dimension 0 of the weight\).*has 10.*skip='fc'"
    with pytest.raises(ValueError, match=message):
        Pattern.parse("16x16").check((10, 64), "fc")
    with pytest.raises(ValueError, match=r"needs 4 inputs \(dimension 1 of the weight\), but the layer has 3"):
        Pattern.parse("2:4").check((10, 3))
    for text in ("16x16", "2:4", "row", "column", "unstructured"):
        Pattern.parse(text).check((0, 3))
        Pattern.parse(text).check((17, 19))


@pytest.mark.parametrize(
    "scores", [torch.rand(4), torch.ones(2, 2, dtype=torch.int64), [[1.0]], torch.tensor([[math.nan]])]
)
def test_bad_scores(scores):
    with pytest.raises(ValueError, match="the scores"):
        Pattern.parse("unstructured").mask_from_scores(scores, 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, math.inf, "half", True])
def test_bad_sparsity(sparsity):
    with pytest.raises(ValueError, match="expected a number from 0"):
        Pattern.parse("unstructured").mask_from_scores(torch.rand(2, 2), sparsity)
    with pytest.raises(ValueError, match="expected a number from 0"):
        check_fraction(sparsity, "sparsity")


def test_missing_sparsity_and_heads_of_one_layer():
    with pytest.raises(ValueError, match="'4x4' needs a sparsity"):
        Pattern.parse("4x4").mask_from_scores(torch.rand(4, 4))
    with pytest.raises(ValueError, match="spans several layers"):
        Pattern.parse("head").mask_from_scores(torch.rand(4, 4), 0.5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 31))
def test_lowest(values, count):
    scores = torch.tensor(values, dtype=torch.float32)
    chosen = lowest(scores, count)
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    assert chosen.nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["falling", "rising", "random"])
def test_lowest_of_many(dtype, order):
    scores = {"falling": -torch.arange(5e4), "rising": torch.arange(5e4), "random": torch.randn(50_000)}[order].to(
        dtype
    )
    scores = scores.clamp(-6e4, 6e4).requires_grad_()
    for count in (1, 20_000, 49_999):
        expected = torch.zeros(len(scores), dtype=torch.bool)
        expected[scores.sort(stable=True).indices[:count]] = True
        assert torch.equal(lowest(scores, count), expected)
