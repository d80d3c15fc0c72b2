"""``linear_distill_loss`` once more in float64, and in torch as anyone would write it; no code of the package.

Both make whole logits. :func:`truth` then has the loss and its gradient from ``distill_oracle.solve``, :func:`composed`
from ``distill_oracle.compose``, in the dtype of the inputs, so that its error is what torch costs in that dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import distill_oracle

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NAMES = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
# Options of the losses on logits; the others are the heads'.
_OF_LOSS = (
    "temperature", "alpha", "divergence", "beta", "ignore_index", "label_smoothing", "reduction", "token_weight",
    "num_items",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One call. ``upstream``: the gradient that reaches the loss, one number, or one a token for ``"none"``."""

    tensors: dict[str, Tensor]  # by NAMES; biases may lack
    labels: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    upstream: Tensor | None = None

    def but(self, **options: Any) -> Problem:
        return replace(self, options={**self.options, **options})


@dataclass
class Answer:
    """``grads``: by the student's hidden states, weight and bias (of zeros, where there is none)."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    grads: dict[str, Tensor]


def problem(
    tokens: tuple[int, ...] = (23,),
    classes: int = 61,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    *,
    teacher_classes: int | None = None,
    teacher_width: int | None = None,
    bias: bool = True,
    ignored: int = 4,
    **options: Any,
) -> Problem:
    """Random heads whose logits have a spread of about 2; every ``ignored``-th token is (0: none)."""
    teacher_classes, teacher_width = teacher_classes or classes, teacher_width or width
    tensors = {
        "student_hidden": torch.randn(*tokens, width),
        "student_weight": torch.randn(classes, width) * 2 / width**0.5,
        "teacher_hidden": torch.randn(*tokens, teacher_width),
        "teacher_weight": torch.randn(teacher_classes, teacher_width) * 2 / teacher_width**0.5,
    }
    if bias:
        tensors |= {"student_bias": torch.randn(classes), "teacher_bias": torch.randn(teacher_classes)}
    labels = torch.randint(0, classes, tokens)
    if ignored:
        labels.view(-1)[::ignored] = -100
    return Problem({name: t.to(dtype) for name, t in tensors.items()}, labels, options)


def _logits(of: Problem, tensors: dict[str, Tensor], who: str) -> Tensor:
    logits = F.linear(tensors[f"{who}_hidden"], tensors[f"{who}_weight"], tensors.get(f"{who}_bias"))
    logits = logits * of.options.get(f"{who}_logit_scale", 1.0)
    cap = of.options.get(f"{who}_softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _case(of: Problem, student: Tensor, teacher: Tensor) -> distill_oracle.Case:
    options = {name: value for name, value in of.options.items() if name in _OF_LOSS}
    return distill_oracle.Case(student.detach(), teacher.detach(), of.labels, upstream=of.upstream, **options)


def _leaves(of: Problem, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype or t.dtype).requires_grad_(name.startswith("student"))
        for name, t in of.tensors.items()
    }


def _gradients(of: Problem, leaves: dict[str, Tensor], student: Tensor, grad: np.ndarray) -> dict[str, Tensor]:
    student.backward(torch.from_numpy(grad).to(student.dtype).reshape(student.shape))
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def truth(of: Problem) -> tuple[Answer, distill_oracle.Solution]:
    leaves = _leaves(of, torch.float64)
    student, teacher = _logits(of, leaves, "student"), _logits(of, leaves, "teacher")
    found = distill_oracle.solve(_case(of, student, teacher))
    loss, hard, soft = (torch.from_numpy(np.asarray(v)) for v in (found.loss, found.hard, found.soft))
    return Answer(loss, hard, soft, _gradients(of, leaves, student, found.grad)), found


def composed(of: Problem, solution: distill_oracle.Solution) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Losses a token in float32 of logits in the inputs' dtype, and the gradients."""
    leaves = _leaves(of, None)
    student, teacher = _logits(of, leaves, "student"), _logits(of, leaves, "teacher")
    loss, grad, _ = distill_oracle.compose(_case(of, student, teacher), torch.float32, solution.factor)
    return loss, _gradients(of, leaves, student, grad)
