"""Distillation loss by the CUDA kernels, from tensors to addresses. Contract: ``csrc/distill_loss/cuda.h``.

Nothing here waits for the device, and a call can be captured in a graph: what the CPU refuses by its value (a label
out of range, a weight that is negative or not finite, ``num_items`` that is no positive number) gives NaN instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import gpu
from pycompress._native import DTYPE_CODES
from pycompress.ops.distill_loss_call import (
    DIVERGENCE_CODES,
    MIRRORED,
    REDUCTION_CODES,
    Call,
    Outputs,
    divides_later,
    in_order,
    kernels_missing,
    num_items_of,
)
from pycompress.ops.rows import row_layout

_COUNT = -1.0  # given_items: the valid tokens are counted
_MOST_CLASSES = 2**30


def cuda_distill_missing(call: Call) -> str | None:
    """Why the CUDA kernels cannot take the call, or None."""
    reason = kernels_missing(call, "CUDA") or gpu.cuda_missing(call.student, "student_logits")
    if reason is None and max(call.student.shape[-1], call.teacher.shape[-1]) > _MOST_CLASSES:
        return (
            f"the vocabularies are V={call.student.shape[-1]} and {call.teacher.shape[-1]}, the CUDA kernels take at "
            "most 2^30 classes"
        )
    return reason


def cuda_distill_loss(call: Call) -> Outputs:
    """Loss and gradients of a checked call."""
    shape = call.student.shape[:-1] if call.reduction == "none" else ()
    device = call.student.device
    loss, hard, soft = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
    later = divides_later(call)
    grad_scale = torch.empty((), dtype=torch.float32, device=device) if later else None
    grad_student = grad_teacher = None
    if call.student_grad:
        grad_student = torch.empty(call.student.shape, dtype=call.student.dtype, device=device)
    _launch(call, (loss, hard, soft), grad_student, grad_scale)
    if call.teacher_grad:
        grad_teacher = _teacher_grad(call)
    return Outputs(loss, hard, soft, grad_student, grad_teacher, grad_scale)


def cuda_row_loss(call: Call, values: Tensor, grad: Tensor | None) -> None:
    """Loss, hard and soft of each token into values (3, n), and the gradient into grad (n, V), or into None.

    The call has reduction "none"; grad may be the student's own memory.
    """
    loss, hard, soft = values
    _launch(call, (loss, hard, soft), grad)


def cuda_scale_missing(grad: Tensor) -> str | None:
    """Why the CUDA kernel cannot scale a gradient in place, or None."""
    if grad.dtype not in DTYPE_CODES:
        return f"the gradient is {grad.dtype}, the CUDA kernels take float32, bfloat16 and float16"
    if not grad.is_contiguous():
        return "the gradient is not contiguous"
    return gpu.cuda_missing(grad)


def cuda_scale_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """grad (..., V), contiguous, times factor: 0-dim, or one a token. Where it is 1 nothing is moved."""
    factor = factor.to(torch.float32).contiguous()
    gpu.cuda_module().distill_scale(
        grad=grad.data_ptr(),
        dtype=DTYPE_CODES[grad.dtype],
        rows=grad.shape[:-1].numel(),
        cols=grad.shape[-1],
        factor=factor.data_ptr(),
        factor_stride=1 if factor.dim() else 0,
        place=gpu.place(grad),
    )
    return grad


def _teacher_grad(call: Call) -> Tensor:
    """The student's gradient of the problem with the roles swapped, times 1 - alpha."""
    if call.alpha == 1:
        return torch.zeros_like(call.teacher, memory_format=torch.contiguous_format)
    grad = torch.empty(call.teacher.shape, dtype=call.teacher.dtype, device=call.teacher.device)
    swapped = call._replace(
        student=call.teacher,
        teacher=call.student,
        alpha=0.0,
        divergence=MIRRORED[call.divergence],
        beta=1 - call.beta,
        label_smoothing=0.0,
    )
    # The labels, which say what takes part, remain classes of the student; and what is divided later for one gradient
    # is divided later for the other.
    _launch(swapped, None, grad, None, not divides_later(call), 1 - call.alpha, call.student.shape[-1])
    return grad


def _launch(
    call: Call,
    values: tuple[Tensor, Tensor, Tensor] | None,
    grad: Tensor | None,
    grad_scale: Tensor | None = None,
    normalize: bool | None = None,
    grad_factor: float = 1.0,
    label_classes: int = 0,
) -> None:
    """One run of the kernels into memory that the caller made: float32 values, and grad of the student's dtype.

    grad_scale: where 1 / items goes if the mean's division is left out of grad; normalize says so where it is not asked
    for. grad_factor multiplies grad. label_classes: labels lie below it; 0: the student's vocabulary.
    """
    module, place = gpu.cuda_module(), gpu.place(call.student)
    student, student_rows = row_layout(call.student.resolve_neg())
    teacher, teacher_rows = row_layout(call.teacher.resolve_neg())
    labels = in_order(call.labels, torch.int64)
    weight = in_order(call.token_weight, torch.float32)
    items, given = None, _COUNT
    if call.num_items is not None:
        if call.num_items.is_cpu:
            given = num_items_of(call.num_items)
        else:
            items = call.num_items.to(torch.float64)
    workspace = torch.empty(
        module.distill_workspace_bytes(student_rows[0], place[0]), dtype=torch.uint8, device=student.device
    )
    module.distill_loss(
        student=(student.data_ptr(), DTYPE_CODES[student.dtype], student_rows),
        teacher=(teacher.data_ptr(), DTYPE_CODES[teacher.dtype], teacher_rows),
        labels=0 if labels is None else labels.data_ptr(),
        token_weight=0 if weight is None else weight.data_ptr(),
        label_classes=label_classes,
        divergence=DIVERGENCE_CODES[call.divergence],
        reduction=REDUCTION_CODES[call.reduction],
        temperature=call.temperature,
        alpha=call.alpha,
        beta=call.beta,
        label_smoothing=call.label_smoothing,
        ignore_index=call.ignore_index,
        num_items=0 if items is None else items.data_ptr(),
        given_items=given,
        values=(0, 0, 0) if values is None else tuple(value.data_ptr() for value in values),
        grad=0 if grad is None else grad.data_ptr(),
        normalize_grad=grad_scale is None if normalize is None else normalize,
        grad_factor=grad_factor,
        grad_scale=0 if grad_scale is None else grad_scale.data_ptr(),
        workspace=workspace.data_ptr(),
        place=place,
    )
