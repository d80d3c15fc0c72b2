"""Distillation loss by the native kernel, from tensors to addresses. Contract: csrc/distill_loss/distill_loss.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import DTYPE_CODES, empty
from pycompress.ops.distill_loss_call import (
    DIVERGENCE_CODES,
    MIRRORED,
    REDUCTION_CODES,
    Call,
    Outputs,
    divides_later,
    in_order,
    num_items_of,
)
from pycompress.ops.rows import row_layout

_COUNT = -1.0  # num_items for the kernel: the valid tokens are counted


def distill_kernel_name() -> str:
    """Name of the native kernel that runs on this machine, e.g. ``distill_loss_avx512``."""
    return str(_C.distill_kernel_name())


def native_missing(call: Call) -> str | None:
    """Why the native kernel cannot take the call, or None."""
    if not call.student.is_cpu:
        return f"student_logits are on {call.student.device}, the native kernels run on the CPU"
    for name, logits in (("student_logits", call.student), ("teacher_logits", call.teacher)):
        if logits.dtype not in DTYPE_CODES:
            return f"{name} are {logits.dtype}, the native kernels take float32, bfloat16 and float16"
    return None


def native_distill_loss(call: Call) -> Outputs:
    """Loss and gradients of a checked call."""
    given = _COUNT if call.num_items is None else num_items_of(call.num_items)
    later = divides_later(call)
    loss, hard, soft = _values(call)
    grad_student = empty(call.student.shape, call.student.dtype) if call.student_grad else None
    items = run_kernel(call, loss, hard, soft, grad_student, given, not later)
    grad_teacher = _teacher_grad(call, items, not later) if call.teacher_grad else None
    grad_scale = torch.full((), 1 / items if items > 0 else 0.0, dtype=torch.float32) if later else None
    return Outputs(loss, hard, soft, grad_student, grad_teacher, grad_scale)


def _values(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for loss, hard and soft."""
    shape = call.student.shape[:-1] if call.reduction == "none" else ()
    return (
        torch.empty(shape, dtype=torch.float32),
        torch.empty(shape, dtype=torch.float32),
        torch.empty(shape, dtype=torch.float32),
    )


def run_kernel(
    call: Call, loss: Tensor, hard: Tensor, soft: Tensor, grad: Tensor | None, num_items: float, normalize: bool
) -> float:
    """One run of the kernel into memory that the caller made.

    loss, hard, soft: float32, one value, or one a token for ``reduction="none"``. grad: the student's dtype and shape,
    contiguous; it may be the student itself, which is then overwritten. num_items: ``call.num_items`` as a number,
    negative to count. normalize: whether the mean's division is in grad.

    Returns what the sum is divided by.

    Raises:
        ValueError: a label, top-k index, weight or num_items that is out of its range; nothing has been written then.
    """
    student, student_rows = row_layout(call.student.resolve_neg())
    teacher, teacher_rows = row_layout(call.teacher.resolve_neg())
    labels = in_order(call.labels, torch.int64)
    weight = in_order(call.token_weight, torch.float32)
    indices = in_order(call.topk_indices, torch.int64)
    lse = in_order(call.topk_logsumexp, torch.float32)
    return _C.distill_loss(
        student=(student.data_ptr(), DTYPE_CODES[student.dtype], *student_rows),
        teacher=(teacher.data_ptr(), DTYPE_CODES[teacher.dtype], *teacher_rows),
        topk_indices=0 if indices is None else indices.data_ptr(),
        topk_logsumexp=0 if lse is None else lse.data_ptr(),
        labels=0 if labels is None else labels.data_ptr(),
        token_weight=0 if weight is None else weight.data_ptr(),
        divergence=DIVERGENCE_CODES[call.divergence],
        reduction=REDUCTION_CODES[call.reduction],
        temperature=call.temperature,
        alpha=call.alpha,
        beta=call.beta,
        label_smoothing=call.label_smoothing,
        ignore_index=call.ignore_index,
        num_items=num_items,
        loss=loss.data_ptr(),
        hard=hard.data_ptr(),
        soft=soft.data_ptr(),
        grad=0 if grad is None else grad.data_ptr(),
        normalize_grad=normalize,
        threads=torch.get_num_threads(),
    )


def _teacher_grad(call: Call, items: float, normalize: bool) -> Tensor:
    if call.alpha == 1:
        return torch.zeros(call.teacher.shape, dtype=call.teacher.dtype)
    tokens = call.student.shape[:-1]
    # In the weights travel the factor 1 - alpha, which the given items keep out of the mean's division, and the mask
    # of the labels, which as classes are the student's.
    weight = torch.ones(tokens, dtype=torch.float32)
    if call.token_weight is not None:
        weight = call.token_weight.to(torch.float32)
    if call.labels is not None:
        weight = torch.where(call.labels == call.ignore_index, 0.0, weight)
    swapped = call._replace(
        student=call.teacher,
        teacher=call.student,
        labels=None,
        token_weight=weight * (1 - call.alpha),
        alpha=0.0,
        divergence=MIRRORED[call.divergence],
        beta=1 - call.beta,
        label_smoothing=0.0,
    )
    grad = empty(call.teacher.shape, call.teacher.dtype)
    loss, hard, soft = _values(call)
    given = items if call.reduction == "mean" and items > 0 else _COUNT
    run_kernel(swapped, loss, hard, soft, grad, given, normalize)
    return grad
