"""What a call of the distillation loss takes and gives, and the checks that shapes, dtypes and options allow."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none")
# The enums of csrc/distill_loss/distill_loss.h.
DIVERGENCE_CODES = {name: code for code, name in enumerate(DIVERGENCES)}
REDUCTION_CODES = {name: code for code, name in enumerate(REDUCTIONS)}
# The teacher's gradient is the student's of the problem with the roles swapped; jsd takes 1 - beta with it.
MIRRORED = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl", "jsd": "jsd"}
_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TopKLogits(NamedTuple):
    """A teacher's k largest logits a token, so that its outputs can be stored; :meth:`from_logits` makes one.

    values: ``(..., k)`` float32, bfloat16 or float16, before the division by the temperature.
    indices: ``(..., k)`` int64, the class of each value; none twice in a token.
    logsumexp: ``(...)`` float32, ``log sum_v exp(t[v] / temperature)`` over the teacher's whole vocabulary, at the
        temperature of the loss; or None.

    With ``logsumexp`` the probabilities are the teacher's own. What they lack to 1 is one more class, compared with the
    student's probability of all classes outside the k; as a difference it is known to about 2^-24, and is never taken
    as less. Without it the teacher is renormalised over the k and has no mass elsewhere, while the student keeps its
    whole softmax.
    """

    values: Tensor
    indices: Tensor
    logsumexp: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, temperature: float = 1.0) -> TopKLogits:
        """The k largest of ``logits`` ``(..., V)``, and their logsumexp at ``temperature``, the one of the loss.

        Raises:
            ValueError: k outside 1..V, a temperature that is not positive and finite, or logits that are not floating.
        """
        if logits.dim() == 0 or not logits.is_floating_point():
            raise ValueError(
                f"TopKLogits.from_logits: logits are {logits.dtype} {tuple(logits.shape)}, expected floating (..., V)"
            )
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"TopKLogits.from_logits: k={k}, expected 1..V={logits.shape[-1]}")
        _check_temperature("TopKLogits.from_logits", temperature)
        logits = logits.detach()
        values, indices = logits.topk(k, dim=-1)
        accumulator = torch.promote_types(logits.dtype, torch.float32)
        return cls(values, indices, (logits.to(accumulator) / temperature).logsumexp(-1))


class Call(NamedTuple):
    """Arguments of one call. ``teacher`` is ``(..., V)``, or with ``topk_indices`` the values ``(..., k)``."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    token_weight: Tensor | None
    num_items: Tensor | None
    topk_indices: Tensor | None
    topk_logsumexp: Tensor | None
    temperature: float
    alpha: float
    divergence: str
    beta: float
    ignore_index: int
    label_smoothing: float
    reduction: str
    student_grad: bool
    teacher_grad: bool


class Outputs(NamedTuple):
    """``loss``, ``hard``, ``soft``: one value, or one a token for ``reduction="none"``; dtype: :func:`accumulator`.

    The gradient of the reduced loss is ``grad_scale * grad_student``, with the student's shape and dtype, contiguous;
    None where it was not asked for. The teacher's likewise. ``grad_scale``: float32, 0-dim; None is 1.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor
    grad_student: Tensor | None
    grad_teacher: Tensor | None
    grad_scale: Tensor | None


def accumulator(call: Call) -> torch.dtype:
    """The dtype of the loss: float32, or float64 where the logits are."""
    wide = torch.float64
    return wide if call.student.dtype is wide or call.teacher.dtype is wide else torch.float32


def kernels_missing(call: Call, kernels: str) -> str | None:
    """Why no kernels of a GPU, ``"CUDA"`` or ``"Triton"``, take such logits, wherever they are; or None."""
    for name, logits in (("student_logits", call.student), ("teacher_logits", call.teacher)):
        if logits.dtype is torch.float64:
            return f"{name} are {logits.dtype}, the {kernels} kernels take float32, bfloat16 and float16"
    if call.topk_indices is not None and call.alpha < 1:
        return f"the teacher is TopKLogits, the {kernels} kernels take whole logits; backend='reference' takes both"
    return None


def divides_later(call: Call) -> bool:
    """Whether the mean's division is left to ``grad_scale``: a gradient in float16 would underflow."""
    half = torch.float16
    return call.reduction == "mean" and (
        (call.student_grad and call.student.dtype is half) or (call.teacher_grad and call.teacher.dtype is half)
    )


def with_unit_weights(call: Call) -> Call:
    """The same problem with a largest weight of 1/2 to 1: a float16 gradient neither underflows nor overflows by them.

    Divided by a power of 2, so that the parts of a batch round as the whole batch does. On the CPU, weights that are
    not finite and positive are left for the check of values; elsewhere nothing waits for the device, and they stay as
    bad as they are.
    """
    assert call.token_weight is not None
    weight = call.token_weight.to(torch.float64)
    counted = weight if call.labels is None else weight.where(call.labels != call.ignore_index, 0.0)
    if not weight.is_cpu:
        return _with_unit_weights_on_device(call, weight, counted)
    largest = float(counted.max()) if counted.numel() else 0.0
    if not 0 < largest < math.inf or bool((weight < 0).any()):
        return call
    unit = 2.0 ** math.frexp(largest)[1]
    num_items = None if call.num_items is None else call.num_items.to(torch.float64) / unit
    return call._replace(token_weight=weight / unit, num_items=num_items)


def _with_unit_weights_on_device(call: Call, weight: Tensor, counted: Tensor) -> Call:
    if counted.numel() == 0:
        return call
    largest = counted.where((counted > 0) & (counted < math.inf), 0.0).max()
    mantissa, _ = torch.frexp(largest)
    unit = torch.where(largest > 0, largest / mantissa, 1.0)
    num_items = call.num_items
    if num_items is not None:
        if num_items.is_cpu:
            num_items_of(num_items)  # a number can be checked
        num_items = num_items.to(torch.float64).reshape(()) / unit
    return call._replace(token_weight=weight / unit, num_items=num_items)


def in_order(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One value a token, as a kernel reads it: of that dtype, contiguous; copied only where it is not."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg()):
        return tensor
    return tensor.to(dtype).resolve_neg().contiguous()


def num_items_of(num_items: Tensor) -> float:
    """The number in it.

    Raises:
        ValueError: it is negative, infinite or NaN.
    """
    items = float(num_items)
    if not 0 <= items < math.inf:
        raise ValueError(f"distill_loss: num_items={items:g}, expected a finite number >= 0")
    return items


# ---- checks ---------------------------------------------------------------------------------------------------


def _check_temperature(who: str, temperature: float) -> None:
    if not 1e-30 <= temperature <= 1e30:  # beyond, its square or what logits are multiplied by leaves float32
        raise ValueError(f"{who}: temperature={temperature}, expected a positive finite number, 1e-30 to 1e30")


def check_options(
    temperature: float, alpha: float, divergence: str, beta: float, label_smoothing: float, reduction: str
) -> None:
    """Raises ``ValueError`` for a number out of its range or a name that is not in DIVERGENCES or REDUCTIONS."""
    _check_temperature("distill_loss", temperature)
    if not 0 <= alpha <= 1:
        raise ValueError(f"distill_loss: alpha={alpha}, expected 0 (soft term alone) to 1 (hard term alone)")
    if not 0 <= beta <= 1:
        raise ValueError(f"distill_loss: beta={beta}, expected 0 to 1")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"distill_loss: label_smoothing={label_smoothing}, expected 0 to 1")
    if divergence not in DIVERGENCES:
        raise ValueError(f"distill_loss: divergence={divergence!r}, expected one of {', '.join(DIVERGENCES)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"distill_loss: reduction={reduction!r}, expected one of {', '.join(REDUCTIONS)}")


def check(call: Call) -> None:
    """Everything that can be told without reading a tensor; ``distill_loss_values.py`` does the rest."""
    check_options(
        call.temperature, call.alpha, call.divergence, call.beta, call.label_smoothing, call.reduction
    )  # fmt: skip
    student, teacher = call.student, call.teacher
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dtype not in _LOGIT_DTYPES:
            raise ValueError(
                f"distill_loss: {name} are {logits.dtype}, expected float32, bfloat16 or float16; use {name}.float()"
            )
        if logits.layout is not torch.strided:
            raise ValueError(f"distill_loss: {name} are {logits.layout}, expected a dense tensor; use .to_dense()")
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"distill_loss: {name} are {tuple(logits.shape)}, expected (..., V) with V > 0")
    tokens = student.shape[:-1]
    if teacher.shape[:-1] != tokens:
        raise ValueError(
            f"distill_loss: student_logits are {tuple(student.shape)} but teacher_logits {tuple(teacher.shape)}; all "
            "dimensions but the last must agree"
        )
    _check_labels(call.labels, call.alpha, tokens)
    if call.token_weight is not None:
        _check_token_shape("token_weight", call.token_weight, tokens)
        if call.token_weight.is_complex():
            raise ValueError(f"distill_loss: token_weight is {call.token_weight.dtype}, expected real numbers")
    if call.num_items is not None:
        _check_num_items(call.num_items, call.reduction)
    if call.topk_indices is not None:
        _check_topk(call, call.topk_indices)
    elif call.topk_logsumexp is not None:
        raise ValueError("distill_loss: topk_logsumexp comes without topk_indices; use TopKLogits")
    _check_devices(call)


def _check_token_shape(name: str, tensor: Tensor, tokens: torch.Size) -> None:
    if tensor.shape != tokens:
        raise ValueError(
            f"distill_loss: {name} has shape {tuple(tensor.shape)}, expected {tuple(tokens)}, one value a token"
        )


def _check_labels(labels: Tensor | None, alpha: float, tokens: torch.Size) -> None:
    if labels is None:
        if alpha > 0:
            raise ValueError(f"distill_loss: alpha={alpha} needs labels; give them, or alpha=0 for the soft term alone")
        return
    _check_token_shape("labels", labels, tokens)
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"distill_loss: labels are {labels.dtype}, expected class indices in int64; use .long()")


def _check_num_items(num_items: Tensor, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f"distill_loss: num_items belongs to reduction='mean', not {reduction!r}")
    if num_items.numel() != 1 or num_items.is_complex():
        raise ValueError(
            f"distill_loss: num_items is {num_items.dtype} {tuple(num_items.shape)}, expected one real number"
        )


def _check_topk(call: Call, indices: Tensor) -> None:
    values, lse = call.teacher, call.topk_logsumexp
    if indices.shape != values.shape:
        raise ValueError(
            f"distill_loss: top-k values are {tuple(values.shape)} but indices {tuple(indices.shape)}; expected "
            "(..., k) for both"
        )
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"distill_loss: top-k indices are {indices.dtype}, expected int64; use .long()")
    if values.shape[-1] > call.student.shape[-1]:
        raise ValueError(
            f"distill_loss: the teacher's top-k has k={values.shape[-1]} but the student V={call.student.shape[-1]}; "
            "every index must be one of the student's classes"
        )
    if lse is not None:
        _check_token_shape("top-k logsumexp", lse, values.shape[:-1])
        if lse.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"distill_loss: top-k logsumexp is {lse.dtype}, expected float32")
    elif call.divergence == "reverse_kl" and call.alpha < 1:
        raise ValueError(
            "distill_loss: divergence='reverse_kl' is infinite for a top-k teacher without mass outside the k classes; "
            "give TopKLogits its logsumexp"
        )
    if call.teacher_grad:
        raise ValueError("distill_loss: teacher_grad=True needs a teacher's whole logits, not TopKLogits")


def _check_devices(call: Call) -> None:
    device = call.student.device
    for name, tensor in (
        ("teacher_logits", call.teacher),
        ("labels", call.labels),
        ("token_weight", call.token_weight),
        ("top-k indices", call.topk_indices),
        ("top-k logsumexp", call.topk_logsumexp),
    ):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"distill_loss: student_logits are on {device} but {name} on {tensor.device}; move one with .to(device)"
            )
    # A number becomes a tensor on the CPU, whatever the device of the logits.
    if call.num_items is not None and call.num_items.device not in (device, torch.device("cpu")):
        raise ValueError(f"distill_loss: num_items is on {call.num_items.device}, expected {device} or the CPU")
