"""``DistillationLoss``: a student's loss against labels and a teacher, as a module."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from pycompress import ops
from pycompress.ops.distill_loss import check_backend
from pycompress.ops.distill_loss_call import check_options


class DistillationLoss(nn.Module):
    """``alpha * cross_entropy + (1 - alpha) * temperature^2 * D(teacher, student)``; see :func:`ops.distill_loss`.

    Args:
        temperature: softens both distributions of the soft term; positive.
        alpha: weight of the hard term (the labels), 0 to 1; 0 needs no labels.
        divergence: ``"forward_kl"`` (Hinton et al. 2015), ``"reverse_kl"`` or ``"jsd"`` (Agarwal et al. 2024).
        beta: for jsd, the teacher's share in the mixture. At 0 and 1 the divergence is 0 everywhere.
        ignore_index: the label of tokens that take no part.
        label_smoothing: of the hard term, 0 to 1.
        reduction: ``"mean"`` over the tokens that take part, ``"sum"`` or ``"none"``.
        teacher_grad: whether the gradient reaches the teacher's logits too.
        backend: ``"auto"``, ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; a named one runs or raises.

    It has no parameters and no state.

    Raises:
        ValueError: an option out of its range, or an unknown name.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 0.5,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        teacher_grad: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(temperature, alpha, divergence, beta, label_smoothing, reduction)
        check_backend(backend)
        warn_if_zero(divergence, beta)
        self.temperature, self.alpha = float(temperature), float(alpha)
        self.divergence, self.beta = divergence, float(beta)
        self.ignore_index, self.label_smoothing = ignore_index, float(label_smoothing)
        self.reduction, self.teacher_grad, self.backend = reduction, teacher_grad, backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | ops.TopKLogits,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | ops.DistillLossParts:
        """The loss, or with ``return_parts`` the loss and its two terms.

        Args:
            student_logits: ``(..., V)`` float32, bfloat16 or float16.
            teacher_logits: ``(..., V')``, or :class:`TopKLogits`.
            labels: ``(...)`` integers.
            token_weight: ``(...)``, finite and >= 0.
            num_items: what the mean divides by, instead of the number of tokens that take part.
        """
        return ops.distill_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
            beta=self.beta,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            token_weight=token_weight,
            num_items=num_items,
            teacher_grad=self.teacher_grad,
            return_parts=return_parts,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return ", ".join(loss_repr(self))


def warn_if_zero(divergence: str, beta: float) -> None:
    """Warns of a jsd that is 0 whatever the logits are."""
    if divergence == "jsd" and beta in (0, 1):
        limit, scaled = ("forward_kl", "jsd / beta") if beta == 0 else ("reverse_kl", "jsd / (1 - beta)")
        warnings.warn(
            f"DistillationLoss: divergence='jsd' with beta={beta:g} is 0 for all logits; divergence={limit!r} is the "
            f"limit of {scaled}",
            stacklevel=3,
        )


def loss_repr(loss: nn.Module) -> list[str]:
    """The options of a loss as ``name=value``; those at their defaults, but the first three, are left out."""
    defaults = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean", "teacher_grad": False}
    parts = [f"{name}={getattr(loss, name)}" for name in ("temperature", "alpha", "divergence")]
    if loss.divergence == "jsd":
        parts.append(f"beta={loss.beta}")
    values = {name: getattr(loss, name, usual) for name, usual in defaults.items()}
    parts += [f"{name}={value}" for name, value in values.items() if value != defaults[name]]
    return [*parts, f"backend={loss.backend}"]
