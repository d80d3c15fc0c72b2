"""Distillation loss in torch: the specification that every kernel is tested against. Any device, any strides.

Everything is written over rows ``(T, V)``, in float32, or in float64 for float64 logits. Loss and gradient are both
written out, so that the edge cases (masked classes, infinite divergences) have the gradient that the module docstring
of ``distill_loss.py`` promises and not the NaN that differentiating through them gives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pycompress.ops.distill_loss_call import MIRRORED, Call, Outputs, accumulator, divides_later
from pycompress.ops.distill_loss_values import items, tokens

# exp of less, relative to the row's largest logit, is no normal float32: the class has no mass, as if it were masked.
# One rule for every dtype and instruction set, for it decides what is infinite.
_LEAST = -126 * math.log(2)
# What a probability that is 1 less others is known to: the tail of a top-k teacher never counts as less.
_SMALLEST_TAIL = 2.0**-24


class Classes(NamedTuple):
    """Probabilities of the rows, 0 where a class has no mass, and their logarithms, -inf only where it is masked."""

    p: Tensor
    log: Tensor


def softmax(logits: Tensor, temperature: float = 1.0) -> Classes:
    """Over the rows. NaN throughout a row with NaN, +inf or nothing but -inf."""
    z = (logits - logits.amax(dim=1, keepdim=True)) / temperature
    log = z - z.exp().sum(dim=1, keepdim=True).log()
    return Classes(torch.where(z < _LEAST, 0.0, log.exp()), log)


# ---- the two terms: each gives (value of each row, its gradient to the student's logits) -------------------------


def hard_term(student: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy at temperature 1. Smoothing spreads over the classes that are not masked."""
    q = softmax(student)
    value = torch.zeros_like(q.log[:, 0])
    target = torch.zeros_like(student)
    if smoothing < 1:
        value = value - (1 - smoothing) * q.log.gather(1, labels[:, None])[:, 0]
        target.scatter_(1, labels[:, None], 1 - smoothing)
    if smoothing > 0:
        allowed = student != -math.inf
        share = smoothing / allowed.sum(dim=1, keepdim=True, dtype=student.dtype)
        value = value - (share * torch.where(allowed, q.log, 0.0)).sum(dim=1)
        target += share * allowed
    return value, q.p - target


def soft_term(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, beta: float
) -> tuple[Tensor, Tensor]:
    """``temperature**2 * D`` over the classes that both vocabularies have; the student's others have gradient 0."""
    shared = min(student.shape[1], teacher.shape[1])
    q = softmax(student[:, :shared], temperature)
    value, grad = _divergence(softmax(teacher[:, :shared], temperature), q, divergence, beta)
    grad = torch.nn.functional.pad(grad, (0, student.shape[1] - shared))
    return temperature**2 * value, temperature * grad


def soft_term_topk(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    logsumexp: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The same for a teacher of k classes: D over these and, as one more class, all the others together."""
    q, p = softmax(student, temperature), softmax(values, temperature)
    rest = torch.zeros_like(p.p[:, :1])
    if logsumexp is not None:
        p, rest = _with_tail(p, values, logsumexp, temperature)
    some = Classes(q.p.gather(1, indices), q.log.gather(1, indices))
    outside = torch.ones_like(student, dtype=torch.bool).scatter_(1, indices, False)
    if indices.shape[1] == student.shape[1]:  # nothing is left
        value, grad = _divergence(p, some, divergence, beta)
        return temperature**2 * value, temperature * torch.zeros_like(student).scatter_(1, indices, grad)

    log_others = torch.where(outside, q.log, -math.inf).logsumexp(dim=1, keepdim=True)
    log_others = torch.where(log_others == -math.inf, math.log(_SMALLEST_TAIL), log_others)
    value, grad = _divergence(
        Classes(torch.cat([p.p, rest], dim=1), torch.cat([p.log, rest.log()], dim=1)),
        Classes(torch.cat([some.p, log_others.exp()], dim=1), torch.cat([some.log, log_others], dim=1)),
        divergence,
        beta,
    )
    # The gradient of the others together goes to each by its share in them.
    share = torch.where(outside, (q.log - log_others).exp(), 0.0)
    return temperature**2 * value, temperature * (grad[:, -1:] * share).scatter(1, indices, grad[:, :-1])


def _with_tail(p: Classes, values: Tensor, logsumexp: Tensor, temperature: float) -> tuple[Classes, Tensor]:
    """The teacher's own probabilities of its k classes, and what is left outside, ``(T, 1)``."""
    bad = ~logsumexp.isfinite()[:, None] | p.log.isnan()  # also where all k values are masked
    log = torch.where(bad, math.nan, values / temperature - logsumexp[:, None])
    # Rounded logits and a rounded logsumexp may exceed 1 a little: the k classes then hold everything.
    total = log.exp().sum(dim=1, keepdim=True)
    log = log - total.clamp_min(1).log()
    mass = torch.where(p.p == 0, 0.0, log.exp())
    return Classes(mass, log), (1 - total).clamp_min(_SMALLEST_TAIL)


def _divergence(p: Classes, q: Classes, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """D of teacher p and student q, and its gradient to the logits (over the temperature) that q is the softmax of."""
    if divergence == "forward_kl":
        return _kl(p, q.log), q.p - p.p
    if divergence == "reverse_kl":
        # Where the teacher masks what the student does not, D is infinite; its finite part makes the gradient.
        ratio = torch.where((q.p == 0) | (p.log == -math.inf), 0.0, q.log - p.log)
        return _kl(q, p.log), q.p * (ratio - (q.p * ratio).sum(dim=1, keepdim=True))
    if beta in (0, 1):  # constantly 0: as every part of weight 0 it is not looked at
        return torch.zeros_like(q.p[:, 0]), torch.zeros_like(q.p)
    logm = torch.logaddexp(p.log + math.log(beta), q.log + math.log1p(-beta))
    ratio = torch.where(q.p == 0, 0.0, (1 - beta) * (q.log - logm))
    value = beta * _kl(p, logm) + (1 - beta) * _kl(q, logm)
    return value, q.p * (ratio - (q.p * ratio).sum(dim=1, keepdim=True))


def _kl(a: Classes, log_b: Tensor) -> Tensor:
    """KL(a | b) of each row: 0 log 0 = 0, and infinite where b masks what has mass in a."""
    return torch.where(a.p == 0, 0.0, a.p * (a.log - log_b)).sum(dim=1)


# ---- the loss -------------------------------------------------------------------------------------------------


def reference_distill_loss(call: Call) -> Outputs:
    """The formula in torch. Any device; the values are checked first."""
    valid, weight, labels = tokens(call)
    divisor = items(call, valid, weight)
    student, teacher = _rows(call.student, call), _rows(call.teacher, call)
    # What ignored tokens hold, NaN included, must not be seen.
    student = torch.where(valid[:, None], student, 0.0)
    teacher = torch.where(valid[:, None], teacher, 0.0)

    hard, grad_hard = _nothing(student)
    soft, grad_soft = _nothing(student)
    if call.alpha > 0:
        hard, grad_hard = hard_term(student, labels, call.label_smoothing)
    if call.alpha < 1:
        soft, grad_soft = _soft(call, student, teacher, valid)
    # In float64, where no alpha above 0 is rounded to 0, which times infinity would be NaN.
    loss = (call.alpha * hard.double() + (1 - call.alpha) * soft.double()).to(hard.dtype)
    scale = torch.where(divisor > 0, 1 / divisor, 0.0)

    def reduced(values: Tensor) -> Tensor:
        weighted = torch.where(valid, weight * values, 0.0)
        return weighted.reshape(call.student.shape[:-1]) if call.reduction == "none" else weighted.sum() * scale

    later = divides_later(call)
    row = torch.where(valid, weight, 0.0) * (1.0 if later else scale)

    def finished(grad: Tensor, logits: Tensor) -> Tensor:
        grad = torch.where(loss.isnan()[:, None], math.nan, grad) * row[:, None]
        return grad.to(logits.dtype).reshape(logits.shape)

    grad_student = grad_teacher = None
    if call.student_grad:
        grad_student = finished(call.alpha * grad_hard + (1 - call.alpha) * grad_soft, call.student)
    if call.teacher_grad:
        grad_teacher = torch.zeros_like(call.teacher)
        if call.alpha < 1:
            mirrored = MIRRORED[call.divergence], 1 - call.beta
            grad_teacher = (1 - call.alpha) * soft_term(teacher, student, call.temperature, *mirrored)[1]
            grad_teacher = finished(grad_teacher, call.teacher)
    grad_scale = scale.to(torch.float32) if later else None
    return Outputs(reduced(loss), reduced(hard), reduced(soft), grad_student, grad_teacher, grad_scale)


def _soft(call: Call, student: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    options = call.temperature, call.divergence, call.beta
    if call.topk_indices is None:
        return soft_term(student, teacher, *options)
    lse = call.topk_logsumexp
    if lse is not None:
        lse = torch.where(valid, lse.to(teacher).reshape(-1), 0.0)
    return soft_term_topk(student, teacher, call.topk_indices.to(torch.int64).reshape(teacher.shape), lse, *options)


def _nothing(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_zeros(logits.shape[0]), torch.zeros_like(logits)


def _rows(logits: Tensor, call: Call) -> Tensor:
    return logits.reshape(logits.shape[:-1].numel(), logits.shape[-1]).to(accumulator(call))
