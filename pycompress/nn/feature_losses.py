"""Losses on what lies inside the models: hidden states, attention maps, and DistilBERT's triple loss.

Plain torch. The student learns, the teacher is always detached. Whatever the dtype of the inputs, losses are float32
(float64 for float64 inputs) and are accumulated in it. A token that the attention mask leaves out adds nothing to the
loss and gets gradient 0, whatever its values are, NaN too; a batch with no token left gives loss 0 and gradient 0.

An attention mask is the tokenizer's: bool or integer, 1 for a token and 0 for padding. An additive mask (0 and -inf)
would mean the opposite, so a mask of floats raises.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycompress.nn.distillation_loss import DistillationLoss
from pycompress.ops import REDUCTIONS, DistillLossParts, TopKLogits

_MASKED_SCORE = -1e2  # TinyBERT's bound: a score at or below it is that of a masked key


def _one_of(owner: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{owner}: {name}={value!r}, expected one of: {', '.join(map(repr, known))}")


def _check_float(owner: str, name: str, value: object, remedy: str = "") -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{owner}: {name} is {got}, expected a tensor of floats{remedy}")


def _valid(owner: str, attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask as bool, once it is checked; None keeps every token."""
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise ValueError(
            f"{owner}: attention_mask is {attention_mask.dtype}, expected bool or integer, 1 for a token and 0 for "
            "padding, as the tokenizer returns it"
        )
    if attention_mask.shape != shape:
        raise ValueError(
            f"{owner}: attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(shape)}, a value a token"
        )
    return attention_mask != 0


def _widen(x: Tensor) -> Tensor:
    """float32, or float64 where it was: squares and sums of half precision lose too much."""
    return x if x.dtype == torch.float64 else x.float()


def _masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of the values whose place is valid; 0 where there is none."""
    if valid is None:
        return values.sum() / max(values.numel(), 1)
    return values.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)


class HiddenStateLoss(nn.Module):
    """How far the student's hidden states are from the teacher's, per valid token.

    ``"mse"``: the mean over the width of (student - teacher)², as in TinyBERT. ``"cosine"``: 1 - cos(student, teacher),
    as in DistilBERT (``CosineEmbeddingLoss`` with target 1).

    Args:
        kind: ``"mse"`` or ``"cosine"``.
        student_dim, teacher_dim: the widths, both or neither. Where they differ the student's states go through
            ``projection``, a learned linear map without bias (TinyBERT's): hand ``loss.parameters()`` to the optimizer.
        reduction: ``"mean"`` or ``"sum"`` over the valid tokens, or ``"none"``: one value a token, 0 where masked.
    """

    projection: nn.Linear | None

    def __init__(
        self,
        kind: str = "mse",
        *,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _one_of("HiddenStateLoss", "kind", kind, ("mse", "cosine"))
        _one_of("HiddenStateLoss", "reduction", reduction, REDUCTIONS)
        if (student_dim is None) != (teacher_dim is None):
            raise ValueError(f"HiddenStateLoss: student_dim={student_dim}, teacher_dim={teacher_dim}; give both")
        for name, width in (("student_dim", student_dim), ("teacher_dim", teacher_dim)):
            if width is not None and width < 1:
                raise ValueError(f"HiddenStateLoss: {name}={width}, expected a positive width")
        self.kind, self.reduction = kind, reduction
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.projection = None
        if student_dim is not None and teacher_dim is not None and student_dim != teacher_dim:
            self.projection = nn.Linear(student_dim, teacher_dim, bias=False)

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the loss: 0-dim, or with ``reduction="none"`` of the leading shape.

        Args:
            student_hidden: (..., Hs) floats, usually (batch, tokens, width).
            teacher_hidden: (..., Ht) floats with the same leading shape.
            attention_mask: the leading shape, bool or integer; None takes every token.

        Raises:
            ValueError: hidden states that are not floats, a mask that is, or shapes that disagree.
        """
        self.check(student_hidden, teacher_hidden)
        valid = _valid("HiddenStateLoss", attention_mask, student_hidden.shape[:-1])
        student, teacher = student_hidden, teacher_hidden.detach()
        if valid is not None:
            # Before any arithmetic: 0 times NaN is NaN, in the gradient of the projection too.
            student, teacher = (x.masked_fill(~valid.unsqueeze(-1), 0.0) for x in (student, teacher))
        if self.projection is not None:
            student = self.projection(student.to(self.projection.weight.dtype))
        student, teacher = _widen(student), _widen(teacher)
        if self.kind == "mse":
            loss = (student - teacher).square().mean(-1)
        else:
            loss = 1 - functional.cosine_similarity(student, teacher, dim=-1)
        if self.reduction == "mean":
            return _masked_mean(loss, valid)
        if valid is not None:
            loss = loss.masked_fill(~valid, 0.0)
        return loss.sum() if self.reduction == "sum" else loss

    def check(self, student: Tensor, teacher: Tensor) -> None:
        """Raises ``ValueError`` unless these can be compared."""
        remedy = "; Hugging Face models return hidden_states with output_hidden_states=True"
        for name, value in (("student_hidden", student), ("teacher_hidden", teacher)):
            _check_float("HiddenStateLoss", name, value, remedy)
        if 0 in (student.dim(), teacher.dim()) or student.shape[:-1] != teacher.shape[:-1]:
            raise ValueError(
                f"HiddenStateLoss: student_hidden has shape {tuple(student.shape)} and teacher_hidden "
                f"{tuple(teacher.shape)}, expected the same leading shape"
            )
        for side, hidden, width in (("student", student, self.student_dim), ("teacher", teacher, self.teacher_dim)):
            if width is not None and hidden.shape[-1] != width:
                raise ValueError(
                    f"HiddenStateLoss: {side}_hidden has width {hidden.shape[-1]}, expected {side}_dim={width}"
                )
        if self.student_dim is None and student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"HiddenStateLoss: student_hidden has width {student.shape[-1]} but teacher_hidden has "
                f"{teacher.shape[-1]}; give student_dim and teacher_dim for a learned projection"
            )

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, reduction={self.reduction!r}"


class AttentionLoss(nn.Module):
    """How far the student's attention maps are from the teacher's, for one pair of layers.

    ``"mse"``: mean of (student - teacher)² over heads and over pairs of a valid query and a valid key. Takes
    probabilities, or scores before the softmax as TinyBERT does: a value at or below -100 is a masked key's and counts
    as 0. ``"kl"``: Σ_key t·(log t - log s), mean over heads and valid queries (MiniLM). Takes probabilities, each row
    of which sums to 1 over the valid keys; a student's 0 where the teacher has mass counts as the smallest float32.

    Hugging Face returns maps with ``output_attentions=True`` and ``attn_implementation="eager"``, *after* attention
    dropout: put the teacher in ``eval()``, and for ``"kl"`` give the student ``attention_probs_dropout_prob=0``.

    Args:
        kind: ``"mse"`` or ``"kl"``.
        heads: ``"match"`` compares head by head and needs equally many, as TinyBERT and MiniLM do. ``"mean"`` compares
            the means over the heads, so the counts may differ.
    """

    def __init__(self, kind: str = "mse", *, heads: str = "match") -> None:
        super().__init__()
        _one_of("AttentionLoss", "kind", kind, ("mse", "kl"))
        _one_of("AttentionLoss", "heads", heads, ("match", "mean"))
        self.kind, self.heads = kind, heads

    def forward(self, student_maps: Tensor, teacher_maps: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the loss, 0-dim.

        Args:
            student_maps, teacher_maps: (batch, heads, queries, keys) floats.
            attention_mask: (batch, tokens), bool or integer, for maps with queries = keys = tokens; None takes all.

        Raises:
            ValueError: maps that are not floats, a mask that is, or shapes or head counts that disagree.
        """
        self._check(student_maps, teacher_maps)
        shape = torch.Size((student_maps.shape[0], student_maps.shape[-1]))
        if attention_mask is not None and student_maps.shape[-2] != shape[-1]:
            raise ValueError(
                f"AttentionLoss: attention_mask with maps of {student_maps.shape[-2]} queries and {shape[-1]} "
                "keys, expected as many queries as keys; leave the mask out for cross-attention"
            )
        tokens = _valid("AttentionLoss", attention_mask, shape)
        pairs = None if tokens is None else tokens.unsqueeze(-1) & tokens.unsqueeze(-2)

        student, teacher = _widen(student_maps), _widen(teacher_maps.detach())
        if self.kind == "mse":
            student, teacher = (x.masked_fill(x <= _MASKED_SCORE, 0.0) for x in (student, teacher))
        if pairs is not None:
            student, teacher = (x.masked_fill(~pairs.unsqueeze(1), 0.0) for x in (student, teacher))
        if self.heads == "mean":
            student, teacher = (x.mean(1, keepdim=True) for x in (student, teacher))
        if self.kind == "mse":
            return _masked_mean((student - teacher).square().mean(1), pairs)
        tiny = torch.finfo(torch.float32).tiny
        divergence = torch.xlogy(teacher, teacher) - teacher * student.clamp(min=tiny).log()
        return _masked_mean(divergence.sum(-1).mean(1), tokens)

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        remedy = "; Hugging Face needs output_attentions=True and attn_implementation='eager'"
        for name, value in (("student_maps", student), ("teacher_maps", teacher)):
            _check_float("AttentionLoss", name, value, remedy)
            if value.dim() != 4 or value.shape[1] == 0:
                raise ValueError(
                    f"AttentionLoss: {name} has shape {tuple(value.shape)}, expected (batch, heads, queries, keys)"
                )
        if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
            raise ValueError(
                f"AttentionLoss: student_maps has shape {tuple(student.shape)} and teacher_maps "
                f"{tuple(teacher.shape)}, expected the same batch, queries and keys"
            )
        if self.heads == "match" and student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"AttentionLoss: the student has {student.shape[1]} heads and the teacher {teacher.shape[1]}; "
                'heads="mean" compares the means over the heads'
            )

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, heads={self.heads!r}"


class TripleLossParts(NamedTuple):
    """The loss, and its three terms before their weights, detached; one of weight 0 is not computed and is 0."""

    loss: Tensor
    soft: Tensor
    hard: Tensor
    cosine: Tensor


class TripleLoss(nn.Module):
    """DistilBERT's loss: ``alpha_soft · τ²·KL(teacher‖student) + alpha_hard · CE + alpha_cos · (1 - cos)``.

    Each term is a mean over its own tokens, as in DistilBERT: the soft and the cosine term over the tokens of the
    attention mask, the hard term over the labelled ones. Where these are the same tokens (causal language models,
    classification, or ``restrict_soft_to_labels``) soft and hard term come from one sweep over the logits. With the
    labels of masked language modelling, on a few tokens only, they take a sweep each, of which the second skips the
    rows without a label. Under ``torch.compile``, which cannot look at the labels, they always take two unless
    ``restrict_soft_to_labels`` is set.

    Args:
        temperature: τ of the soft term.
        alpha_soft, alpha_hard, alpha_cos: the weights, finite and not negative; DistilBERT's ``alpha_ce``,
            ``alpha_mlm`` (or ``alpha_clm``) and ``alpha_cos``, and its values.
        restrict_soft_to_labels: take the soft term over the labelled tokens too; DistilBERT's ``restrict_ce_to_mask``.
        student_dim, teacher_dim: as in :class:`HiddenStateLoss`, for a learned projection where the widths differ.
        ignore_index: the label of a token without one.
        backend: of the soft and the hard term, as in :class:`DistillationLoss`.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        alpha_soft: float = 5.0,
        alpha_hard: float = 2.0,
        alpha_cos: float = 1.0,
        *,
        restrict_soft_to_labels: bool = False,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        weights = {"alpha_soft": alpha_soft, "alpha_hard": alpha_hard, "alpha_cos": alpha_cos}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"TripleLoss: {name}={weight}, expected a finite weight that is not negative")
        if not any(weights.values()):
            raise ValueError("TripleLoss: every weight is 0, expected at least one term")
        self.alpha_soft, self.alpha_hard, self.alpha_cos = alpha_soft, alpha_hard, alpha_cos
        self.restrict_soft_to_labels, self.ignore_index = restrict_soft_to_labels, ignore_index

        share = alpha_hard / ((alpha_soft + alpha_hard) or 1.0)
        self.soft, self.hard, self.both = (
            DistillationLoss(temperature, alpha, ignore_index=ignore_index, backend=backend)
            for alpha in (0.0, 1.0, share)
        )
        self.cosine = HiddenStateLoss("cosine", student_dim=student_dim, teacher_dim=teacher_dim)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopKLogits,
        labels: Tensor | None = None,
        *,
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | TripleLossParts:
        """Compute the loss, 0-dim.

        Args:
            student_logits, teacher_logits: (..., V) as in :class:`DistillationLoss`.
            labels: int64 of the leading shape; needed unless ``alpha_hard=0``.
            student_hidden, teacher_hidden: (..., H) with the same leading shape; needed unless ``alpha_cos=0``.
            attention_mask: the leading shape, bool or integer; None takes every token.
            return_parts: return :class:`TripleLossParts`.

        Raises:
            ValueError: something that is needed and missing, dtypes or shapes that do not fit.
        """
        _check_float("TripleLoss", "student_logits", student_logits)
        valid = _valid("TripleLoss", attention_mask, student_logits.shape[:-1])
        if labels is None and (self.alpha_hard or self.restrict_soft_to_labels):
            raise ValueError(
                f"TripleLoss: labels=None with alpha_hard={self.alpha_hard}, restrict_soft_to_labels="
                f"{self.restrict_soft_to_labels}; give labels, or alpha_hard=0 for the other terms alone"
            )
        self._check_hidden(student_logits, student_hidden, teacher_hidden)
        loss, soft, hard = self._logit_terms(student_logits, teacher_logits, labels, valid)
        cosine = torch.zeros_like(soft)
        if self.alpha_cos:
            cosine = self.cosine(student_hidden, teacher_hidden, attention_mask)
            loss = loss + self.alpha_cos * cosine
        return TripleLossParts(loss, soft, hard, cosine.detach()) if return_parts else loss

    def _logit_terms(
        self, student: Tensor, teacher: Tensor | TopKLogits, labels: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of the soft and the hard term, then each before its weight."""
        zero = _widen(student.new_zeros(()))
        if self.alpha_soft and self.alpha_hard and self._same_tokens(labels, valid):
            parts = self._weighted(self.both, self.alpha_soft + self.alpha_hard, student, teacher, labels)
            return parts.loss, parts.soft, parts.hard
        loss = soft = hard = zero
        if self.alpha_soft:
            chosen = labels if self.restrict_soft_to_labels else self._as_labels(valid)
            parts = self._weighted(self.soft, self.alpha_soft, student, teacher, chosen)
            loss, soft = loss + parts.loss, parts.soft
        if self.alpha_hard:
            parts = self._weighted(self.hard, self.alpha_hard, student, teacher, labels)
            loss, hard = loss + parts.loss, parts.hard
        return loss, soft, hard

    def _weighted(
        self,
        term: DistillationLoss,
        weight: float,
        student: Tensor,
        teacher: Tensor | TopKLogits,
        labels: Tensor | None,
    ) -> DistillLossParts:
        """weight · term, with hard and soft before the weight.

        The weight goes into the denominator: the gradient then leaves the sweep scaled, which saves a pass over it.
        """
        tokens = student.shape[:-1].numel()
        count = torch.tensor(tokens) if labels is None else (labels != self.ignore_index).sum()
        parts = term(student, teacher, labels, num_items=count.double() / weight, return_parts=True)
        return DistillLossParts(parts.loss, parts.hard / weight, parts.soft / weight)

    def _same_tokens(self, labels: Tensor | None, valid: Tensor | None) -> bool:
        """Whether the soft and the hard term run over the same tokens, as far as one may look."""
        if self.restrict_soft_to_labels or labels is None:
            return True
        if torch.compiler.is_compiling():
            return False
        labelled = labels != self.ignore_index
        return bool(labelled.all()) if valid is None else torch.equal(labelled, valid)

    def _as_labels(self, valid: Tensor | None) -> Tensor | None:
        """Labels that only say which tokens count."""
        return None if valid is None else torch.where(valid, 0, self.ignore_index)

    def _check_hidden(self, logits: Tensor, student: Tensor | None, teacher: Tensor | None) -> None:
        if not self.alpha_cos:
            return
        if student is None or teacher is None:
            missing = "student_hidden" if student is None else "teacher_hidden"
            raise ValueError(
                f"TripleLoss: {missing}=None with alpha_cos={self.alpha_cos}; give both hidden states or alpha_cos=0"
            )
        self.cosine.check(student, teacher)
        if student.shape[:-1] != logits.shape[:-1]:
            raise ValueError(
                f"TripleLoss: student_hidden has shape {tuple(student.shape)} and student_logits "
                f"{tuple(logits.shape)}, expected the same leading shape"
            )

    def extra_repr(self) -> str:
        return f"alpha_soft={self.alpha_soft}, alpha_hard={self.alpha_hard}, alpha_cos={self.alpha_cos}"
