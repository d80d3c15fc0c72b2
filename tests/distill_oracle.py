"""The distillation loss once more, in numpy and float64, sharing no code with the package.

:func:`solve` is the truth: loss, parts and gradients, infinite and masked classes included. :func:`compose` is the same
in torch as anyone would write it, whose error is part of the budget. ``distill_check.py`` compares the package
with both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call. ``upstream`` is the gradient that reaches the loss: one number, or one a token for ``"none"``."""

    student: Tensor
    teacher: Any  # a Tensor, or values, indices and logsumexp
    labels: Tensor | None = None
    temperature: float = 1.0
    alpha: float = 0.5
    divergence: str = "forward_kl"
    beta: float = 0.5
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    token_weight: Tensor | None = None
    num_items: float | Tensor | None = None
    teacher_grad: bool = False
    upstream: Tensor | None = field(default=None, compare=False)

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def options(self) -> dict[str, Any]:
        names = (
            "temperature", "alpha", "divergence", "beta", "ignore_index", "label_smoothing", "reduction",
            "token_weight", "num_items", "teacher_grad",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass
class Solution:
    """What a call gives, ``loss``, ``hard``, ``soft`` reduced. ``*_slack``: the magnitudes that met in each number."""

    loss: np.ndarray
    hard: np.ndarray
    soft: np.ndarray
    grad: np.ndarray
    teacher_grad: np.ndarray | None
    loss_slack: np.ndarray
    hard_slack: np.ndarray
    soft_slack: np.ndarray
    grad_slack: np.ndarray
    teacher_grad_slack: np.ndarray | None
    each: np.ndarray  # what multiplies each token's loss
    factor: np.ndarray  # and its row in the gradient


def as_double(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).reshape(-1, x.shape[-1]).numpy()


def log_softmax(z: np.ndarray) -> np.ndarray:
    """NaN throughout a row that holds NaN, +inf or nothing but -inf."""
    below = z - z.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def has_mass(log: np.ndarray) -> np.ndarray:
    """Whether a class's power of two, relative to the row's largest, is a normal float32; below, it is as if masked."""
    return log - log.max(-1, keepdims=True) >= -126 * math.log(2)


def kl_terms(p: np.ndarray, lp: np.ndarray, lq: np.ndarray) -> np.ndarray:
    """p log(p / q): infinite where p has mass and q is masked, 0 where p has none."""
    terms = np.where((lp == -np.inf) | (lq == -np.inf) & ~has_mass(lp) & ~np.isnan(lp), 0.0, p * (lp - lq))
    return np.where((lq == -np.inf) & has_mass(lp), np.inf, terms)


def size(log: np.ndarray) -> np.ndarray:
    """1 + |log|, how many roundings a float32 logarithm or its exponential carries; masked classes carry none."""
    return np.where(np.isinf(log), 0.0, 1 + np.abs(log))


# A float32 probability below 2^-126 may be taken for 0: this much, in a slack that is multiplied by some 2^-24.
FLUSHED = 2.0**-102


@dataclass
class Divergence:
    value: np.ndarray  # (T, 1)
    slack: np.ndarray
    grad: np.ndarray  # (T, C): by the logits whose log-softmax lq is
    grad_slack: np.ndarray


def nothing(rows: int, width: int) -> Divergence:
    return Divergence(*(np.zeros((rows, n)) for n in (1, 1, width, width)))


def diverge(lp: np.ndarray, lq: np.ndarray, divergence: str, beta: float) -> Divergence:
    """The divergence of classes with logarithms lp (teacher) and lq (student)."""
    if divergence == "jsd" and beta in (0, 1):
        return nothing(*lq.shape)  # a part that is not computed
    p, q = np.exp(lp), np.exp(lq)
    if divergence == "forward_kl":
        value = kl_terms(p, lp, lq).sum(-1, keepdims=True)
        slack = (p * size(lp) * (size(lp) + size(lq))).sum(-1, keepdims=True)
        return Divergence(value, slack, q - p, q * size(lq) + p * size(lp))
    if divergence == "reverse_kl":
        value = kl_terms(q, lq, lp).sum(-1, keepdims=True)
        ratio = np.where((lp == -np.inf) | (lq == -np.inf), 0.0, lq - lp)
        each = size(lq) + size(lp)
        slack = (q * size(lq) * each).sum(-1, keepdims=True)
    else:
        mixed = np.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
        value = beta * kl_terms(p, lp, mixed).sum(-1, keepdims=True)
        value += (1 - beta) * kl_terms(q, lq, mixed).sum(-1, keepdims=True)
        ratio = np.where(lq == -np.inf, 0.0, (1 - beta) * (lq - mixed))
        each = size(lq) * (1 + np.abs(ratio))
        slack = (beta * p * size(lp) ** 2 + (1 - beta) * q * size(lq) ** 2).sum(-1, keepdims=True)
    mean = (q * ratio).sum(-1, keepdims=True)
    met = size(lq) * (np.abs(ratio) + np.abs(mean)) + each + slack
    return Divergence(value, slack, q * (ratio - mean), (q + FLUSHED) * np.where(lq == -np.inf, 0, met))


RESOLUTION = 2.0**-24  # a mass outside the k classes below it counts as this much: float32 cannot tell it from a mask


def diverge_top_k(case: Case, lq: np.ndarray) -> Divergence:
    """The teacher's k classes; the rest is one class more, with the mass that the logsumexp leaves, or without any."""
    values, indices = as_double(case.teacher.values), case.teacher.indices.reshape(-1, case.teacher.values.shape[-1])
    index, (rows, v) = indices.numpy(), lq.shape
    outside = np.ones((rows, v), bool)
    np.put_along_axis(outside, index, False, 1)
    if case.teacher.logsumexp is None:  # no mass outside: as a dense teacher that masks it
        lp = np.full((rows, v), -np.inf)
        np.put_along_axis(lp, index, log_softmax(values / case.temperature), 1)
        return diverge(lp, lq, case.divergence, case.beta)
    total = as_double(case.teacher.logsumexp[..., None])
    lp = values / case.temperature - np.where(np.isfinite(total), total, np.nan)
    lp = lp - np.maximum(np.log(np.exp(lp).sum(-1, keepdims=True)), 0)  # more than 1 is rounding
    lq_k, rest_student = np.take_along_axis(lq, index, 1), np.exp(np.where(outside, lq, -np.inf)).sum(-1, keepdims=True)
    if not outside.any():
        some = diverge(lp, lq_k, case.divergence, case.beta)
        some.grad, some.grad_slack = (np.pad(x, ((0, 0), (0, 1))) for x in (some.grad, some.grad_slack))
        odds: Any = 0.0
    else:
        rest = np.maximum(1 - np.exp(lp).sum(-1, keepdims=True), RESOLUTION)
        q = np.maximum(rest_student, RESOLUTION)
        log_p, log_q = np.concatenate([lp, np.log(rest)], 1), np.concatenate([lq_k, np.log(q)], 1)
        some = diverge(log_p, log_q, case.divergence, case.beta)
        odds = rest / q + q / rest
    # Both masses are differences of numbers near 1: what these are off by counts, and more the smaller the masses are.
    loose = (1 + np.abs(total) + np.abs(lp).min(-1, keepdims=True)) * (1 + odds)
    share = np.where(outside & (lq != -np.inf), np.exp(lq) / np.maximum(rest_student, 1e-300), 0.0)
    grad, grad_slack = some.grad[:, -1:] * share, (some.grad_slack[:, -1:] + loose) * share
    np.put_along_axis(grad, index, some.grad[:, :-1], 1)
    near = (np.exp(lp) + np.exp(lq_k)) * np.where(np.isinf(lq_k), 0.0, loose)
    np.put_along_axis(grad_slack, index, some.grad_slack[:, :-1] + near, 1)
    return Divergence(some.value, some.slack + loose, grad, grad_slack)


def hard_term(case: Case, z: np.ndarray, label: np.ndarray) -> Divergence:
    lq, smoothing = log_softmax(z), case.label_smoothing
    at = np.clip(label, 0, z.shape[1] - 1)[:, None]
    log = np.take_along_axis(lq, at, 1)
    allowed = z != -np.inf
    count = np.maximum(allowed.sum(-1, keepdims=True), 1)
    spread = np.where(allowed, -lq, 0.0).sum(-1, keepdims=True) / count
    # A part whose weight is 0 is not computed: 0 times the infinite loss of a masked label is 0.
    value = (-(1 - smoothing) * log if smoothing < 1 else 0.0) + smoothing * spread
    value = np.where((log == -np.inf) & (smoothing < 1), np.inf, value)
    target = smoothing * allowed / count
    np.put_along_axis(target, at, np.take_along_axis(target, at, 1) + 1 - smoothing, 1)
    q = np.exp(lq)
    return Divergence(value, size(log) + smoothing * np.abs(spread), q - target, q * size(lq) + target)


def scaled(part: Divergence, by_value: float, by_grad: float, width: int) -> Divergence:
    """Multiplied, and widened with classes that take no part."""
    extra = ((0, 0), (0, width - part.grad.shape[1]))
    return Divergence(
        by_value * part.value, by_value * part.slack, np.pad(by_grad * part.grad, extra),
        np.pad(by_grad * part.grad_slack, extra),
    )  # fmt: skip


def solve(case: Case) -> Solution:
    with np.errstate(all="ignore"):
        return _solve(case)


def _solve(case: Case) -> Solution:
    tau, alpha, z = case.temperature, case.alpha, as_double(case.student)
    rows, width = z.shape
    none = nothing(rows, width)
    label = np.zeros(rows, np.int64) if case.labels is None else case.labels.reshape(-1).to(torch.int64).numpy()
    valid = np.ones(rows, bool) if case.labels is None else label != case.ignore_index
    hard, soft, teacher = none, none, None
    if alpha > 0:
        hard = hard_term(case, z, label)
    dense = isinstance(case.teacher, Tensor)
    if alpha < 1 and not dense:
        soft = scaled(diverge_top_k(case, log_softmax(z / tau)), tau**2, tau, width)
    elif alpha < 1:
        t = as_double(case.teacher)
        both = min(width, t.shape[1])
        lp, lq = log_softmax(t[:, :both] / tau), log_softmax(z[:, :both] / tau)
        soft = scaled(diverge(lp, lq, case.divergence, case.beta), tau**2, tau, width)
        swapped = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl", "jsd": "jsd"}[case.divergence]
        teacher = scaled(diverge(lq, lp, swapped, 1 - case.beta), tau**2, tau, t.shape[1])
    elif dense:
        teacher = nothing(rows, case.teacher.shape[-1])

    weight = np.ones(rows) if case.token_weight is None else as_double(case.token_weight.reshape(-1, 1))[:, 0]
    weight = np.where(valid, weight, 0.0)
    total = float(case.num_items) if case.num_items is not None else weight.sum()
    each = weight / total if case.reduction == "mean" and weight.sum() > 0 else weight
    used = (each > 0)[:, None]

    def reduce(value: np.ndarray) -> np.ndarray:
        tokens = np.where(used, value, 0.0)[:, 0] * each
        return tokens.reshape(case.student.shape[:-1]) if case.reduction == "none" else tokens.sum()

    factor = each if case.upstream is None else each * case.upstream.double().reshape(-1).numpy()

    def weigh(grad: np.ndarray) -> np.ndarray:
        return np.where(used, grad, 0.0) * factor[:, None]

    def mix(name: str) -> np.ndarray:
        a, b = getattr(hard, name), getattr(soft, name)
        return (alpha * a if alpha > 0 else 0.0) + ((1 - alpha) * b if alpha < 1 else 0.0)

    show = teacher is not None and case.teacher_grad
    return Solution(
        loss=reduce(mix("value")), hard=reduce(hard.value), soft=reduce(soft.value), grad=weigh(mix("grad")),
        teacher_grad=weigh((1 - alpha) * teacher.grad) if show else None,
        loss_slack=reduce(mix("slack")), hard_slack=reduce(hard.slack), soft_slack=reduce(soft.slack),
        grad_slack=np.abs(weigh(mix("grad_slack"))),
        teacher_grad_slack=np.abs(weigh((1 - alpha) * teacher.grad_slack)) if show else None,
        each=each, factor=factor,
    )  # fmt: skip


# ---- torch, as anyone would write it ------------------------------------------------------------------------------


def compose(case: Case, dtype: torch.dtype, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Losses a token, and the gradients where each is multiplied by its ``factor``. Dense teachers only."""
    student, teacher = (x.detach().to(dtype).reshape(-1, x.shape[-1]) for x in (case.student, case.teacher))
    student, teacher = student.requires_grad_(), teacher.requires_grad_(case.teacher_grad)
    tau, both = case.temperature, min(student.shape[1], teacher.shape[1])
    loss = torch.zeros(len(student), dtype=dtype)
    if case.alpha > 0 and case.labels is not None:
        labels = case.labels.reshape(-1).to(torch.int64)
        options: dict[str, Any] = {"ignore_index": case.ignore_index, "label_smoothing": case.label_smoothing}
        loss = loss + case.alpha * F.cross_entropy(student, labels, reduction="none", **options)
    if case.alpha < 1:
        lq = F.log_softmax(student[:, :both] / tau, dim=-1)
        lp = F.log_softmax(teacher[:, :both] / tau, dim=-1)
        if case.divergence == "forward_kl":
            d = F.kl_div(lq, lp, reduction="none", log_target=True).sum(-1)
        elif case.divergence == "reverse_kl":
            d = F.kl_div(lp, lq, reduction="none", log_target=True).sum(-1)
        elif case.beta in (0, 1):
            d = 0 * lq.sum(-1)
        else:
            lm = torch.logaddexp(lp + math.log(case.beta), lq + math.log1p(-case.beta))
            d = case.beta * F.kl_div(lm, lp, reduction="none", log_target=True).sum(-1)
            d = d + (1 - case.beta) * F.kl_div(lm, lq, reduction="none", log_target=True).sum(-1)
        loss = loss + (1 - case.alpha) * tau**2 * d
    if loss.requires_grad:
        (loss * torch.from_numpy(factor).to(dtype)).sum().backward()
    grads = [None if x.grad is None else x.grad.double().numpy() for x in (student, teacher)]
    return loss.detach().double().numpy(), np.zeros(student.shape) if grads[0] is None else grads[0], grads[1]
