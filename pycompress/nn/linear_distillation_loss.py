"""``LinearDistillationLoss``: the distillation loss of two classifiers on hidden states, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from pycompress.nn.distillation_loss import loss_repr, warn_if_zero
from pycompress.ops.distill_loss import DistillLossParts, check_backend
from pycompress.ops.distill_loss_call import check_options
from pycompress.ops.linear_distill_loss import linear_distill_loss
from pycompress.ops.linear_distill_loss_call import check_chunk_tokens, check_head_options


class LinearDistillationLoss(nn.Module):
    """:class:`DistillationLoss` of ``hidden @ weight^T + bias``, without the logits of the whole batch.

    The tokens are taken in chunks; a chunk's logits become its losses and gradients before the next one's are made.
    Memory beyond the gradients is the logits of one chunk, instead of several times those of the batch.

    Args:
        temperature, alpha, divergence, beta, ignore_index, label_smoothing, reduction: as in :class:`DistillationLoss`.
        student_logit_scale, teacher_logit_scale: what the logits are multiplied by, such as 1 / sqrt(H); positive.
        student_softcap, teacher_softcap: ``softcap * tanh(logits / softcap)`` of the scaled logits, as Gemma 2 does;
            positive, or None for none.
        chunk_tokens: tokens in a chunk; None has it chosen.
        backend: ``"auto"``, ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; a named one runs or raises.

    It has no parameters and no state: the heads' weights are arguments, so that they may be tied to embeddings.

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
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        chunk_tokens: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(temperature, alpha, divergence, beta, label_smoothing, reduction)
        check_head_options("student", student_logit_scale, student_softcap)
        check_head_options("teacher", teacher_logit_scale, teacher_softcap)
        check_chunk_tokens(chunk_tokens)
        check_backend(backend)
        warn_if_zero(divergence, beta)
        self.temperature, self.alpha = float(temperature), float(alpha)
        self.divergence, self.beta = divergence, float(beta)
        self.ignore_index, self.label_smoothing = ignore_index, float(label_smoothing)
        self.reduction, self.chunk_tokens, self.backend = reduction, chunk_tokens, backend
        self.student_logit_scale, self.teacher_logit_scale = float(student_logit_scale), float(teacher_logit_scale)
        self.student_softcap = None if student_softcap is None else float(student_softcap)
        self.teacher_softcap = None if teacher_softcap is None else float(teacher_softcap)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | DistillLossParts:
        """The loss, or with ``return_parts`` the loss and its two terms. The gradient reaches the student's arguments.

        Args:
            student_hidden: ``(..., H)`` float32, bfloat16 or float16.
            student_weight: ``(V, H)`` of the same dtype, under autocast of any.
            teacher_hidden, teacher_weight: ``(..., H')``, ``(V', H')``; constants.
            labels: ``(...)`` integers; on the CPU those of ``ignore_index`` cost nothing.
            student_bias, teacher_bias: ``(V,)``, ``(V',)``.
            token_weight: ``(...)``, finite and >= 0.
            num_items: what the mean divides by, instead of the number of tokens that take part.
        """
        return linear_distill_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
            beta=self.beta,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            student_logit_scale=self.student_logit_scale,
            teacher_logit_scale=self.teacher_logit_scale,
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
            chunk_tokens=self.chunk_tokens,
            token_weight=token_weight,
            num_items=num_items,
            return_parts=return_parts,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        usual = {
            "student_logit_scale": 1.0, "teacher_logit_scale": 1.0, "student_softcap": None, "teacher_softcap": None,
            "chunk_tokens": None,
        }  # fmt: skip
        *parts, backend = loss_repr(self)
        parts += [f"{name}={getattr(self, name)}" for name in usual if getattr(self, name) != usual[name]]
        return ", ".join([*parts, backend])
