"""Runs the distillation loss on every backend and instruction set, and compares it with ``distill_oracle.py``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pycompress import _native, ops
from tests.distill_oracle import Case, Solution, compose, solve

# What a call may run on: the formula in torch, or the native kernel of an instruction set.
ENGINES = ("reference", *_native.available_isas())
every_engine = pytest.mark.parametrize("engine", ENGINES)

# The table of tolerances: unit roundoff by dtype (half the gap between 1 and the next number), and what may be flushed
# to zero. Losses and everything between are float32, and so is their part of it.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@contextmanager
def forced(engine: str) -> Iterator[str]:
    """The backend's name, with PYCOMPRESS_ISA set where the engine is an instruction set."""
    before = os.environ.get("PYCOMPRESS_ISA")
    if engine != "reference":
        os.environ["PYCOMPRESS_ISA"] = engine
    try:
        yield "reference" if engine == "reference" else "native"
    finally:
        os.environ.pop("PYCOMPRESS_ISA", None)
        if before is not None:
            os.environ["PYCOMPRESS_ISA"] = before


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Result:
    loss: Tensor
    hard: Tensor
    soft: Tensor
    grad: Tensor
    teacher_grad: Tensor | None


def run(engine: str, case: Case) -> Result:
    """Forward and backward on leaves that have the strides of the case's tensors."""
    if engine == "reference":
        with threads(1):
            return _run(engine, case)
    return _run(engine, case)


def _run(engine: str, case: Case) -> Result:
    student, teacher = case.student.detach().requires_grad_(), case.teacher
    if isinstance(teacher, Tensor):
        teacher = teacher.detach().requires_grad_(case.teacher_grad)
    with forced(engine) as backend:
        parts = ops.distill_loss(student, teacher, case.labels, **case.options(), return_parts=True, backend=backend)
        parts.loss.backward(case.upstream)
    assert student.grad is not None
    return Result(*parts, student.grad, teacher.grad if isinstance(teacher, Tensor) else None)


def same_special(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    """NaN, inf and -inf in the same places."""
    with np.errstate(invalid="ignore"):
        same = np.isfinite(got) & np.isfinite(expected) | (got == expected) | np.isnan(got) & np.isnan(expected)
    if not same.all():
        at = np.unravel_index(np.argmin(same), same.shape)
        where = tuple(map(int, at))
        raise AssertionError(f"{what} at {where}: got {got[at]!r}, expected {expected[at]!r}; {(~same).sum()} differ")


def each_token(case: Case) -> Case:
    """A value a token, with gradients of either sign from above."""
    tokens = case.student.shape[:-1]
    return case.but(reduction="none", num_items=None, upstream=torch.randn(tokens) + 0.1)


def assert_close(got: Tensor, expected: np.ndarray, allowed: np.ndarray, what: str) -> None:
    """|got - expected| <= allowed everywhere; the message names the worst element."""
    values = got.detach().double().numpy().reshape(expected.shape)
    if values.size == 0:
        return
    same_special(values, expected, what)
    with np.errstate(all="ignore"):
        excess = np.where(np.isfinite(expected), np.abs(values - expected) / allowed, 0.0)
    at = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[at] <= 1, (
        f"{what}: worst at {tuple(map(int, at))}: got {values[at]!r}, expected {expected[at]!r}, "
        f"{excess[at]:.2f} x the error allowed ({allowed[at]:.3g})"
    )


def roundings(classes: int) -> float:
    """Of float32 in units of its roundoff: exp (2e-7), a few products, and a sum of so many terms one by one."""
    return 12 + math.sqrt(classes)


@dataclass
class Truth:
    """The float64 solution of a case, and by how much torch's float32 composition misses it, a row."""

    case: Case
    solution: Solution
    loss: np.ndarray
    grad: np.ndarray
    teacher_grad: np.ndarray


def truth(case: Case) -> Truth:
    """The composition is float32 whatever the logits' dtype, as the package is, which is the stricter budget."""
    want = solve(case)
    rows = len(want.grad)
    missed = [np.zeros(rows), np.zeros((rows, 1)), np.zeros((rows, 1))]
    if isinstance(case.teacher, Tensor) and rows:
        with threads(1):  # small tensors: a team would only wait for its members
            loss, grad, teacher_grad = compose(case, torch.float32, want.factor)
        tokens = solve(case.but(reduction="none", num_items=None, token_weight=None)).loss.reshape(-1)
        with np.errstate(all="ignore"):
            missed[0] = np.abs(loss - tokens) * want.each
            missed[1] = np.abs(grad - want.grad).max(-1, keepdims=True)
            if teacher_grad is not None and want.teacher_grad is not None:
                missed[2] = np.abs(teacher_grad - want.teacher_grad).max(-1, keepdims=True)
    return Truth(case, want, *(np.nan_to_num(m, nan=0, posinf=0, neginf=0) for m in missed))


def cases(build: Callable[..., Iterator[Case]]) -> Callable[..., list[Truth]]:
    """What a generator of cases yields, with the truth of each: worked out once for all engines, which vary fastest."""

    @lru_cache(maxsize=1)
    @wraps(build)
    def solved(*args: Any) -> list[Truth]:
        torch.manual_seed(0)
        return [truth(case) for case in build(*args)]

    return solved


def check_all(engine: str, known: list[Truth]) -> None:
    for each in known:
        check(each, run(engine, each.case))


def check(against: Case | Truth, result: Result) -> None:
    """Every number within torch's error in its row, plus the roundings of float32 and of the gradient's dtype."""
    known = truth(against) if isinstance(against, Case) else against
    case, want = known.case, known.solution
    assert result.loss.dtype == result.hard.dtype == result.soft.dtype == torch.float32
    assert result.grad.dtype == case.student.dtype
    assert result.grad.shape == case.student.shape
    unit = ROUNDOFF[torch.float32] * roundings(case.student.shape[-1])
    for name in ("loss", "hard", "soft"):
        expected, slack = np.asarray(getattr(want, name)), np.asarray(getattr(want, f"{name}_slack"))
        missed = known.loss.reshape(expected.shape) if case.reduction == "none" else known.loss.sum()
        own = missed if name == "loss" else 0.0
        assert_close(getattr(result, name), expected, own + unit * slack + 2.0**-126, name)
    check_grad("grad", result.grad, want.grad, known.grad + unit * want.grad_slack)
    if want.teacher_grad is not None and want.teacher_grad_slack is not None:
        assert result.teacher_grad is not None
        assert result.teacher_grad.dtype == case.teacher.dtype
        allowed = known.teacher_grad + unit * want.teacher_grad_slack
        check_grad("teacher_grad", result.teacher_grad, want.teacher_grad, allowed)


def check_grad(name: str, got: Tensor, expected: np.ndarray, allowed: np.ndarray) -> None:
    """A gradient is rounded to its dtype twice: when it is stored, and when what arrives from above multiplies it."""
    rounding = 2 * ROUNDOFF[got.dtype] * np.abs(expected) + 2 * SMALLEST[got.dtype]
    assert_close(got, expected, allowed + rounding, name)
