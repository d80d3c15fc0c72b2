"""The operator on every backend and instruction set, against float64: shapes, options, dtypes, strides, threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.distill_check import (
    ENGINES,
    assert_close,
    cases,
    check,
    check_all,
    each_token,
    every_engine,
    run,
    threads,
    truth,
)
from tests.distill_oracle import DIVERGENCES, DTYPES, REDUCTIONS, Case, compose, solve

# Short rows are taken several at a time and long ones in blocks: around each of those sizes, and far beyond.
SHORT = [(t, v) for v in (1, 2, 10, 17, 33, 63, 64, 65) for t in (1, 15, 16, 17, 33)]
LONG = [(3, 127), (17, 128), (2, 129), (5, 1000), (1, 4095), (2, 4096), (3, 4097), (3, 5001), (2, 30522), (1, 200_000)]


def make(t: int, v: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Random logits, and labels of which some are ignored."""
    student, teacher = (3 * torch.randn(2, t, v)).to(dtype)
    labels = torch.randint(v, (t,))
    labels[2::5] = -100
    return Case(student, teacher, options.pop("labels", labels), **options)


@cases
def dealt(t: int, v: int, dtype: torch.dtype) -> Iterator[Case]:
    """Options drawn at random: over all the shapes every pair of them is met many times."""
    r = random.Random(f"{t} {v} {dtype}")
    for divergence in DIVERGENCES if v > 5000 else DIVERGENCES * 2:
        reduction = r.choice(REDUCTIONS)
        case = make(
            t, v, dtype, temperature=r.choice((0.5, 1.0, 2.0, 3.0, 4.0)), alpha=r.choice((0.0, 0.25, 0.5, 1.0)),
            divergence=divergence, beta=r.choice((0.1, 0.5, 0.9)), label_smoothing=r.choice((0.0, 0.0, 0.1)),
            reduction=reduction, num_items=r.choice((None, 7.5)) if reduction == "mean" else None,
            token_weight=r.choice((None, torch.rand(t) * (torch.rand(t) > 0.2))), teacher_grad=r.random() < 0.3,
        )  # fmt: skip
        yield each_token(case) if reduction == "none" else case


@every_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHORT, *LONG], ids=str)
def test_matches_float64(engine: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_all(engine, dealt(*shape, dtype))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocabularies", [(40, 40), (40, 30), (30, 40)], ids=str)
def test_oracle_agrees_with_autograd(divergence: str, vocabularies: tuple[int, int]) -> None:
    """The truth itself: its gradients are formulas, these are autograd's in float64."""
    student, teacher = (torch.randn(6, v, dtype=torch.float64) for v in vocabularies)
    for alpha in (0.0, 0.3, 1.0):
        case = Case(student, teacher, torch.tensor([0, 3, -100, 5, 7, 29]), 1.7, alpha, divergence, 0.3)
        case = case.but(teacher_grad=True, label_smoothing=0.2)
        want = solve(case)
        loss, grad, teacher_grad = compose(case, torch.float64, want.factor)
        np.testing.assert_allclose((loss * want.each).sum(), want.loss, rtol=1e-12)
        np.testing.assert_allclose(grad, want.grad, atol=1e-13)
        if alpha < 1:
            np.testing.assert_allclose(teacher_grad, want.teacher_grad, atol=1e-13)


@every_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_worse_than_torch_in_the_same_dtype(engine: str, divergence: str, dtype: torch.dtype) -> None:
    """The largest error of the loss and of the gradient, where torch computes in the logits' dtype throughout."""
    for t, v in ((16, 10), (4, 3000)):
        case = make(t, v, dtype, divergence=divergence, temperature=2.0, reduction="none", upstream=torch.ones(t))
        want, result = solve(case), run(engine, case)
        loss, grad, _ = compose(case, dtype, want.factor)
        few = 2.0**-22  # a few roundings of float32, where torch may be lucky
        assert_close(result.loss, want.loss, np.abs(loss - want.loss).max() + few * (1 + want.loss), "loss")
        assert_close(result.grad, want.grad, np.full((t, v), np.abs(grad - want.grad).max() + few), "grad")


@cases
def vocabulary_cases(vs: int, vt: int, divergence: str) -> Iterator[Case]:
    for alpha in (0.0, 0.5, 1.0):
        for teacher_grad in (False, True):
            case = make(17, max(vs, vt), divergence=divergence, alpha=alpha, temperature=1.5, teacher_grad=teacher_grad)
            labels = torch.arange(17) % vs
            labels[0] = vs - 1
            yield case.but(student=case.student[:, :vs], teacher=case.teacher[:, :vt], labels=labels)


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocabularies", [(50, 64), (64, 50), (1000, 1003), (9000, 5000), (3, 300), (300, 3)], ids=str)
def test_vocabularies_differ(engine: str, vocabularies: tuple[int, int], divergence: str) -> None:
    """Both are renormalised over the shorter one; the hard term, and its gradient, take all of the student's."""
    check_all(engine, vocabulary_cases(*vocabularies, divergence))


@cases
def reduction_cases(reduction: str, labelled: str, weighted: bool) -> Iterator[Case]:
    items = (None, 12, 2.5, torch.tensor(9), torch.tensor(3.5)) if reduction == "mean" else (None,)
    for num_items in items:
        for v in (40, 300):
            case = make(20, v, reduction=reduction, num_items=num_items)
            if labelled != "ignored":
                labels = None if labelled == "none" else torch.randint(v, (20,))
                case = case.but(labels=labels, alpha=0.0 if labels is None else 0.5)
            if weighted:
                case = case.but(token_weight=torch.rand(20) * (torch.rand(20) < 0.8))
            yield each_token(case) if reduction == "none" else case


@every_engine
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labelled", ["labels", "none", "ignored"])
@pytest.mark.parametrize("weighted", [True, False])
def test_reductions(engine: str, reduction: str, labelled: str, weighted: bool) -> None:
    """The weighted mean divides by the valid tokens' weights, num_items replaces that, none keeps the shape."""
    for known in reduction_cases(reduction, labelled, weighted):
        result = run(engine, known.case)
        assert result.loss.shape == ((20,) if reduction == "none" else ())
        check(known, result)


@every_engine
def test_labels_are_a_mask_where_alpha_is_zero(engine: str) -> None:
    case = make(15, 30, alpha=0.0, ignore_index=-1, labels=torch.tensor([3, -1, 5] * 5))
    result = run(engine, case)
    check(case, result)
    assert (result.grad[1::3] == 0).all()
    assert result.hard == 0


@every_engine
def test_ignore_index_may_be_a_class(engine: str) -> None:
    case = make(33, 10, ignore_index=4, labels=torch.arange(33) % 10)
    check(case, run(engine, case))


@every_engine
@pytest.mark.parametrize("pair", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_dtypes_may_differ(engine: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Each gradient has the dtype of its logits; labels and weights may be of other dtypes too."""
    for v in (50, 500):
        case = make(7, v, teacher_grad=True, temperature=2.0, token_weight=torch.rand(7).half())
        labels = case.labels.int() if case.labels is not None else None
        case = case.but(student=case.student.to(pair[0]), teacher=case.teacher.to(pair[1]), labels=labels)
        check(case, run(engine, case))


VIEWS = {
    "transposed": lambda v: torch.randn(v, 13).t(),
    "column step": lambda v: torch.randn(13, 3 * v)[:, ::3],
    "row step": lambda v: torch.randn(26, v)[::2],
    "slice of columns": lambda v: torch.randn(13, v + 30)[:, 7 : v + 7],
    "slice of a batch": lambda v: torch.randn(5, 9, v)[:, 2:6],
    "shifted by one": lambda v: torch.randn(4, 6, v)[:, :-1],
    "batch second": lambda v: torch.randn(9, 5, v).transpose(0, 1),
    "vocabulary second": lambda v: torch.randn(3, v, 5).transpose(1, 2),
    "expanded": lambda v: torch.randn(1, 1, v).expand(3, 4, v),
    "expanded columns": lambda v: torch.randn(6, 1).expand(6, v),
    "three levels": lambda v: torch.randn(3, 4, 5, v)[:, 1:3, 1:4].transpose(0, 2),
    "four dimensions": lambda v: torch.randn(2, 3, 2, v),
    "one row": lambda v: torch.randn(v),
    "prime strides": lambda v: torch.as_strided(torch.randn(40000), (3, 7, v), (1511, 67, 5)),
    "offset": lambda v: torch.randn(13 * v + 1)[1:].view(13, v),
}


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same strides, expanded ones included."""
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


@cases
def strided_cases(view: str, dtype: torch.dtype) -> Iterator[Case]:
    for v, whose in ((40, "student"), (40, "teacher"), (200, "both"), (5001, "both")):
        student, teacher = (in_dtype(VIEWS[view](v), dtype) for _ in range(2))
        student = student.contiguous() if whose == "teacher" else student
        teacher = teacher.contiguous() if whose == "student" else teacher
        case = Case(student, teacher, torch.randint(v, student.shape[:-1]), temperature=2.0, teacher_grad=v > 40)
        yield each_token(case) if v < 1000 else case


@every_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(engine: str, view: str, dtype: torch.dtype) -> None:
    for known in strided_cases(view, dtype):
        before = known.case.student.clone(), known.case.teacher.clone()
        result = run(engine, known.case)
        check(known, result)
        assert result.loss.shape in (known.case.student.shape[:-1], ())
        assert torch.equal(known.case.student, before[0])
        assert torch.equal(known.case.teacher, before[1])


@every_engine
@pytest.mark.parametrize("shape", [(0, 10), (0, 5000), (2, 0, 40), (0, 0, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens(engine: str, shape: tuple[int, ...], reduction: str) -> None:
    case = Case(torch.randn(shape), torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.int64), reduction=reduction)
    result = run(engine, case.but(upstream=torch.ones(shape[:-1]) if reduction == "none" else None))
    assert result.grad.shape == shape
    assert result.loss.shape == (shape[:-1] if reduction == "none" else ())
    assert result.loss.sum() == 0


@every_engine
@pytest.mark.parametrize("shape", [(1, 200_000), (3, 40_000), (33, 40), (1000, 10), (70, 1000)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_threads_agree(engine: str, shape: tuple[int, int], divergence: str) -> None:
    """A row may be split between threads: the sums are added in another order, and no more than that differs."""
    case = make(*shape, divergence=divergence, temperature=2.0)
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(run(engine, case))
    for other in results[1:]:
        for part in ("loss", "hard", "soft"):
            torch.testing.assert_close(getattr(other, part), getattr(results[0], part), rtol=2e-6, atol=0)
        assert (other.grad - results[0].grad).abs().max() <= 2e-6 * results[0].grad.abs().max()


@every_engine
@pytest.mark.parametrize("weighted", [True, False])
def test_micro_batches_add_up(engine: str, weighted: bool) -> None:
    """With num_items each part of a batch contributes what it contributes to the whole."""
    for dtype in DTYPES:
        weight = torch.rand(40) if weighted else torch.ones(40)
        whole = make(40, 300, dtype, divergence="jsd", token_weight=weight if weighted else None)
        assert whole.labels is not None
        total, parts = run(engine, whole), []
        items = float(weight[whole.labels != -100].double().sum())
        for rows in (slice(0, 7), slice(7, 8), slice(8, 40)):
            part = whole.but(student=whole.student[rows], teacher=whole.teacher[rows], labels=whole.labels[rows])
            part = part.but(num_items=items, token_weight=weight[rows] if weighted else None)
            parts.append(run(engine, part))
        for name in ("loss", "hard", "soft"):
            together = torch.stack([getattr(p, name) for p in parts]).sum()
            torch.testing.assert_close(together, getattr(total, name), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.cat([p.grad for p in parts]), total.grad, rtol=1e-6, atol=1e-9)


# What a drawn problem is made of, but its size: an executor of GPU kernels bears less.
DRAWN = {
    "teacher_more": st.integers(-20, 20), "seed": st.integers(0, 2**31), "dtype": st.sampled_from(DTYPES),
    "teacher_dtype": st.sampled_from(DTYPES), "divergence": st.sampled_from(DIVERGENCES),
    "temperature": st.floats(0.05, 20), "alpha": st.floats(0, 1), "beta": st.floats(0, 1),
    "smoothing": st.floats(0, 1), "reduction": st.sampled_from(REDUCTIONS), "weighted": st.booleans(),
    "teacher_grad": st.booleans(), "magnitude": st.integers(-2, 3), "masked": st.sampled_from((0.0, 0.0, 0.3)),
    "row_gap": st.integers(0, 9), "column_step": st.integers(1, 3),
}  # fmt: skip


def drawn_case(
    t: int, v: int, teacher_more: int, seed: int, dtype: torch.dtype, teacher_dtype: torch.dtype, divergence: str,
    temperature: float, alpha: float, beta: float, smoothing: float, reduction: str, weighted: bool,
    teacher_grad: bool, magnitude: int, masked: float, row_gap: int, column_step: int,
) -> Case:  # fmt: skip
    torch.manual_seed(seed)

    def logits(width: int, to: torch.dtype) -> Tensor:
        x = torch.randn(t, width * column_step + row_gap) * 10.0**magnitude
        x[torch.rand_like(x) < masked] = -torch.inf
        x[:, 0] = 0  # so that no row is masked throughout
        return x.to(to)[:, : width * column_step : column_step]

    labels = torch.randint(v, (t,))
    labels[torch.rand(t) < 0.2] = -100
    return Case(
        logits(v, dtype), logits(max(1, v + teacher_more), teacher_dtype), labels, temperature, alpha, divergence, beta,
        label_smoothing=smoothing, reduction=reduction, token_weight=torch.rand(t) if weighted else None,
        teacher_grad=teacher_grad, upstream=torch.randn(t) if reduction == "none" else None,
    )  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(t=st.integers(0, 40), v=st.integers(1, 150), **DRAWN)
@example(  # all of the weight goes to smoothing, and the label is masked
    t=1, v=3, teacher_more=0, seed=0, dtype=torch.float32, teacher_dtype=torch.float32, divergence="forward_kl",
    temperature=1.0, alpha=1.0, beta=0.0, smoothing=1.0, reduction="mean", weighted=False, teacher_grad=False,
    magnitude=0, masked=0.3, row_gap=0, column_step=1,
)  # fmt: skip
def test_drawn(**problem: Any) -> None:
    case = drawn_case(**problem)
    known = truth(case)
    for engine in ENGINES:
        check(known, run(engine, case))
