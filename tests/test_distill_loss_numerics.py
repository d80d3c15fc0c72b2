"""The operator where numbers are hard: masked, infinite, NaN and huge logits, the ends of the options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.distill_check import cases, check, each_token, every_engine, run
from tests.distill_oracle import DIVERGENCES, DTYPES, REDUCTIONS, Case

INF, NAN = float("inf"), float("nan")
WIDTHS = (5, 40, 300, 5001)  # short rows, one block, several


def make(t: int, v: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    labels = options.pop("labels", torch.randint(v, (t,)))
    return Case((3 * torch.randn(t, v)).to(dtype), (3 * torch.randn(t, v)).to(dtype), labels, **options)


# ---- masked classes -------------------------------------------------------------------------------------------------


MASKS = {
    "both": lambda a, b: (a, a),
    "student": lambda a, b: (a, a & False),
    "teacher": lambda a, b: (a & False, a),
    "student more": lambda a, b: (a | b, a),
    "teacher more": lambda a, b: (a, a | b),
    "mismatched": lambda a, b: (a, b.roll(1, 1)),
}


@cases
def masked_cases(masks: str, divergence: str) -> Iterator[Case]:
    for v in WIDTHS:
        for part in (0.02, 0.5, 1.0):
            t = 17 if v < 1000 else 2
            a, b = torch.rand(2, t, v) < part
            keep = torch.randint(v, (t,))
            a[torch.arange(t), keep] = b[torch.arange(t), keep] = False
            student, teacher = MASKS[masks](a, b)
            for alpha in (0.0, 0.5, 1.0):
                case = make(t, v, DTYPES[v % 3], divergence=divergence, alpha=alpha, teacher_grad=True, temperature=2.0)
                yield each_token(case.but(
                    student=case.student.masked_fill(student, -INF), teacher=case.teacher.masked_fill(teacher, -INF),
                    label_smoothing=0.1 if alpha == 0.5 else 0.0,
                ))  # fmt: skip


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masks", MASKS)
def test_masked_classes(engine: str, masks: str, divergence: str) -> None:
    """Infinite where mathematics says so, with a finite gradient; never NaN."""
    for known in masked_cases(masks, divergence):
        result = run(engine, known.case)
        assert not result.loss.isnan().any()
        assert result.grad.isfinite().all()
        check(known, result)


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_mass_decides_what_is_infinite(engine: str, divergence: str) -> None:
    """A class that only one side masks counts where the other has a normal float32 there, on every engine alike."""
    for v in (10, 300):
        for far, infinite in ((-80.0, True), (-87.0, True), (-87.5, False), (-95.0, False), (-1e4, False)):
            for temperature in (1.0, 0.5, 20.0):
                plain, masked = torch.zeros(2, 17, v)
                plain[:, 3], masked[:, 3] = far * temperature, -INF
                case = Case(plain, masked, None, temperature, 0.0, divergence, teacher_grad=True)
                case = each_token(case if divergence == "reverse_kl" else case.but(student=masked, teacher=plain))
                result = run(engine, case)
                check(case, result)
                assert (result.loss == INF).all() == (infinite and divergence != "jsd")


@every_engine
def test_label_on_a_masked_class(engine: str) -> None:
    for v in WIDTHS:
        case = each_token(make(16, v, alpha=1.0, label_smoothing=0.2))
        assert case.labels is not None
        student = case.student.clone()
        student[torch.arange(0, 16, 2), case.labels[::2]] = -INF
        result = run(engine, case.but(student=student))
        assert (result.loss[::2] == INF).all()
        assert result.loss[1::2].isfinite().all()
        check(case.but(student=student), result)


@every_engine
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_infinite_loss_of_a_batch(engine: str, reduction: str) -> None:
    """One infinite token makes the batch's loss infinite and leaves the gradients of all tokens finite and right."""
    case = make(20, 100, reduction=reduction)
    student = case.student.clone()
    student[7, 50] = -INF
    result = run(engine, case.but(student=student))
    assert result.loss == INF
    check(case.but(student=student), result)


@cases
def massless_cases(divergence: str, dtype: torch.dtype) -> Iterator[Case]:
    for v in WIDTHS:
        student, teacher = torch.full((4, v), -1e4), torch.full((4, v), -1e4)
        student[:, 0] = teacher[1:, -1] = teacher[0, 0] = 0
        teacher[3] = 0
        for temperature in (0.05, 1.0, 20.0):
            case = Case(student.to(dtype), teacher.to(dtype), torch.zeros(4, dtype=torch.int64), temperature)
            yield each_token(case.but(divergence=divergence, teacher_grad=True))


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_mass(engine: str, divergence: str, dtype: torch.dtype) -> None:
    """p = 0 and q = 0 by underflow, each where the other has all the mass."""
    for known in massless_cases(divergence, dtype):
        result = run(engine, known.case)
        assert result.loss.isfinite().all()
        check(known, result)


# ---- NaN, ignored tokens --------------------------------------------------------------------------------------------

BAD_ROWS = {"nan": (NAN, 1), "+inf": (INF, 1), "masked throughout": (-INF, None), "nan throughout": (NAN, None)}


def spoil(x: Tensor, row: int, bad: str) -> Tensor:
    value, count = BAD_ROWS[bad]
    x = x.clone()
    x[row, slice(None) if count is None else slice(x.shape[1] - 1, None)] = value
    return x


@every_engine
@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bad_row_gives_nan_there_only(engine: str, bad: str, where: str, divergence: str) -> None:
    for v in WIDTHS:
        t = 20 if v < 1000 else 3
        for alpha in (0.0, 0.5) if where == "teacher" else (0.0, 0.5, 1.0):
            case = make(t, v, DTYPES[v % 3], divergence=divergence, alpha=alpha, teacher_grad=alpha < 1)
            case = each_token(case.but(labels=torch.zeros(t, dtype=torch.int64)))
            clean = run(engine, case)
            row = t - 2
            dirty = case.but(**{where: spoil(getattr(case, where), row, bad)})
            result = run(engine, dirty)
            check(dirty, result)
            others = torch.arange(t) != row
            assert result.loss[row].isnan()
            assert result.grad[row].isnan().all()
            for got, want in ((result.loss, clean.loss), (result.grad, clean.grad)):
                torch.testing.assert_close(got[others], want[others], rtol=0, atol=0)
            summed = run(engine, dirty.but(reduction="mean", upstream=None))
            assert summed.loss.isnan()
            assert summed.grad[others].isfinite().all()


@every_engine
@pytest.mark.parametrize("how", ["label", "weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_values_in_an_ignored_row(engine: str, reduction: str, how: str) -> None:
    """An ignored token, and one with weight 0, gives 0 whatever its logits hold; the others never see it."""
    for v in WIDTHS:
        for bad in BAD_ROWS:
            case = make(18, v, reduction=reduction, teacher_grad=True)
            assert case.labels is not None
            if how == "label":
                case.labels[5] = case.labels[16] = -100
            else:
                weight = torch.rand(18) + 0.5
                weight[5] = weight[16] = 0
                case = case.but(token_weight=weight)
            if reduction == "none":
                case = each_token(case)
            clean = run(engine, case)
            dirty = case.but(student=spoil(case.student, 5, bad), teacher=spoil(case.teacher, 16, bad))
            result = run(engine, dirty)
            check(dirty, result)
            assert (result.grad[[5, 16]] == 0).all()
            torch.testing.assert_close(result.grad, clean.grad, rtol=0, atol=0)
            torch.testing.assert_close(result.loss, clean.loss, rtol=0, atol=0)


@every_engine
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ignored(engine: str, dtype: torch.dtype, reduction: str) -> None:
    for v in WIDTHS:
        case = Case(
            torch.full((17, v), NAN, dtype=dtype), torch.full((17, v), -INF, dtype=dtype), torch.full((17,), -100),
            reduction=reduction, teacher_grad=True,
        )  # fmt: skip
        cases = [case.but(upstream=torch.ones(17) if reduction == "none" else None)]
        cases.append(cases[0].but(labels=torch.zeros(17, dtype=torch.int64), token_weight=torch.zeros(17)))
        if reduction == "mean":
            cases += [case.but(num_items=n) for n in (0, 0.0, torch.tensor(0), 5)]
        for each in cases:
            result = run(engine, each)
            assert result.teacher_grad is not None
            for value in (result.loss, result.hard, result.soft, result.grad, result.teacher_grad):
                assert (value == 0).all()


# ---- large logits, temperatures ------------------------------------------------------------------------------------


@cases
def large_cases(divergence: str, temperature: float) -> Iterator[Case]:
    for v in (1, 10, 65, 2000):
        for dtype in DTYPES:
            t = 17 if v < 100 else 3
            two = 2e4 * torch.randint(0, 2, (2, t, v)) - 1e4
            for student, teacher in (
                (2e4 * torch.rand(2, t, v) - 1e4), two, (torch.randn(t, v) + 1e4, torch.randn(t, v) - 1e4),
            ):  # fmt: skip
                case = Case(student.to(dtype), teacher.to(dtype), torch.randint(v, (t,)), temperature, 0.5, divergence)
                yield each_token(case.but(teacher_grad=True, label_smoothing=0.1))


@every_engine
@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 7.0, 20.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits(engine: str, divergence: str, temperature: float) -> None:
    for known in large_cases(divergence, temperature):
        result = run(engine, known.case)
        assert result.loss.isfinite().all()
        assert result.grad.isfinite().all()
        check(known, result)


@cases
def equal_cases(dtype: torch.dtype, temperature: float) -> Iterator[Case]:
    for v in (1, 10, 64, 65, 1000, 30522):
        logits = (5 * torch.randn(17 if v < 100 else 2, v)).to(dtype)
        if v > 1:
            logits[1, ::2] = -INF
        for divergence in DIVERGENCES if v < 10_000 else ("forward_kl", "reverse_kl"):
            yield each_token(Case(logits, logits.clone(), None, temperature, 0.0, divergence, teacher_grad=True))


@every_engine
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits(engine: str, dtype: torch.dtype, temperature: float) -> None:
    """The divergence of equal distributions is exactly 0, and so is its gradient."""
    for known in equal_cases(dtype, temperature):
        result = run(engine, known.case)
        check(known, result)
        if known.case.divergence != "jsd":  # its mixture is rounded
            assert (result.loss == 0).all()
            assert (result.grad == 0).all()


@cases
def close_cases(divergence: str) -> Iterator[Case]:
    for v in (2, 10, 64, 1000, 30522):
        for step in (1e-5, 1e-4, 1e-3, 1e-2):
            student = 3 * torch.randn(33 if v < 100 else 2, v)
            yield each_token(
                Case(student, student + step * torch.randn_like(student), None, 1.0, 0.0, divergence)
            )  # fmt: skip


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_is_not_negative(engine: str, divergence: str) -> None:
    """Up to the rounding of numbers near 1, however close the distributions are."""
    for known in close_cases(divergence):
        result = run(engine, known.case)
        assert (result.loss >= -1e-6).all()
        check(known, result)


@cases
def sum_cases(divergence: str) -> Iterator[Case]:
    for v in (1, 10, 65, 1000, 30522):
        for temperature in (0.05, 1.0, 20.0):
            case = make(16 if v < 100 else 2, v, divergence=divergence, temperature=temperature, label_smoothing=0.1)
            yield case.but(teacher_grad=True, reduction="sum")


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_sum_to_zero(engine: str, divergence: str) -> None:
    """Over each row, as adding a constant to the logits changes nothing."""
    for known in sum_cases(divergence):
        result, want = run(engine, known.case), known.solution
        assert result.teacher_grad is not None
        for got, slack in ((result.grad, want.grad_slack), (result.teacher_grad, want.teacher_grad_slack)):
            assert (np.abs(got.double().numpy().sum(-1)) <= 2.0**-24 * 16 * np.asarray(slack).sum(-1)).all()


# ---- the ends of the options -----------------------------------------------------------------------------------------


def value(engine: str, case: Case) -> tuple[float, Tensor]:
    result = run(engine, case)
    return result.loss.item(), result.grad


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_alpha_is_continuous_at_its_ends(engine: str, divergence: str) -> None:
    for v in (10, 1000):
        case = make(17, v, divergence=divergence, temperature=3.0)
        for end, inside in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
            loss, grad = value(engine, case.but(alpha=end))
            near, near_grad = value(engine, case.but(alpha=inside))
            assert near == pytest.approx(loss, rel=1e-5)
            torch.testing.assert_close(near_grad, grad, rtol=1e-4, atol=1e-6)


@every_engine
def test_jsd_at_the_ends_of_beta(engine: str) -> None:
    """Exactly 0 at both; beside them beta KL(p, q) and (1 - beta) KL(q, p) are the leading terms."""
    for v in (10, 1000):
        case = make(17, v, alpha=0.0, divergence="jsd")
        case = case.but(student=case.student / 4, teacher=case.teacher / 4)
        for beta, limit in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
            loss, grad = value(engine, case.but(beta=beta))
            assert loss == 0
            assert (grad == 0).all()
            small = 1e-3
            near, near_grad = value(engine, case.but(beta=abs(beta - small)))
            expected, expected_grad = value(engine, case.but(divergence=limit))
            assert near / small == pytest.approx(expected, rel=0.02)
            assert (near_grad / small - expected_grad).norm() <= 0.02 * expected_grad.norm()
        for beta in (1e-30, 1e-9, 1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6, 1 - 2.0**-40):
            check(case.but(beta=beta, teacher_grad=True), run(engine, case.but(beta=beta, teacher_grad=True)))


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_at_its_ends(engine: str, divergence: str) -> None:
    """Hot: tau^2 D tends to half a variance (a quarter of it for jsd). Cold: to the largest logits."""
    for v in (3, 300):
        for temperature in (1e-3, 0.01, 0.05, 20.0, 100.0):
            case = each_token(make(17, v, divergence=divergence, temperature=temperature, alpha=0.0))
            check(case, run(engine, case))
        case = make(17, v, divergence=divergence, temperature=100.0, alpha=0.0, reduction="none")
        case = case.but(upstream=torch.ones(17))
        half = ((case.student - case.teacher).var(-1, unbiased=False) / (8 if divergence == "jsd" else 2)).double()
        torch.testing.assert_close(run(engine, case).loss.double(), half, rtol=0.1, atol=1e-3)


@every_engine
def test_smoothing_at_its_ends(engine: str) -> None:
    for v in (1, 10, 1000):
        case = make(17, v, alpha=1.0)
        for smoothing in (0.0, 1e-7, 0.5, 1 - 1e-7, 1.0):
            check(case.but(label_smoothing=smoothing), run(engine, case.but(label_smoothing=smoothing)))
