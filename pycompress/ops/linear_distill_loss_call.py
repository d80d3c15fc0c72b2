"""What a call of the linear distillation loss takes and gives, and the checks that shapes, dtypes and options allow."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pycompress.ops import distill_loss_call

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Head(NamedTuple):
    """``logits = cap(scale * (hidden @ weight^T + bias))``, ``cap(x) = softcap * tanh(x / softcap)`` or x.

    hidden: ``(..., H)``; weight: ``(V, H)``; bias: ``(V,)`` or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


class Options(NamedTuple):
    """Those of ``distill_loss``."""

    temperature: float
    alpha: float
    divergence: str
    beta: float
    ignore_index: int
    label_smoothing: float
    reduction: str


class Call(NamedTuple):
    """Arguments of one call."""

    student: Head
    teacher: Head
    labels: Tensor | None
    token_weight: Tensor | None
    num_items: Tensor | None
    token_grad: Tensor | None  # what multiplies each token's gradient besides; only with reduction="sum"
    options: Options
    chunk_tokens: int | None
    matmul_dtype: torch.dtype | None  # None: that of the heads
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool


class Outputs(NamedTuple):
    """``loss``, ``hard``, ``soft``: one value, or one a token for ``"none"``, in float32 (float64 for float64).

    Gradients of the reduced loss to the student's hidden states, weight and bias, contiguous, empty ``(0,)`` where they
    were not asked for. They have the dtype of :func:`gradient_dtype`.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients to float16 stay float32 until the backward pass: a mean's would underflow before the scaled loss of
    mixed-precision training has multiplied them."""
    return torch.float32 if dtype is torch.float16 else dtype


def logits_call(call: Call) -> distill_loss_call.Call:
    """The call on the logits, which have their shape, dtype and device, and no memory: for checks alone."""

    def stand_in(head: Head) -> Tensor:
        return head.hidden.new_empty(()).expand(*head.hidden.shape[:-1], head.weight.shape[0])

    return distill_loss_call.Call(
        stand_in(call.student), stand_in(call.teacher), call.labels, call.token_weight, call.num_items, None, None,
        *call.options, student_grad=False, teacher_grad=False,
    )  # fmt: skip


# ---- checks ---------------------------------------------------------------------------------------------------


def check_head_options(who: str, scale: float, softcap: float | None) -> None:
    """Raises ``ValueError`` for a scale or softcap that is not positive and finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"linear_distill_loss: {who}_logit_scale={scale}, expected a positive finite number")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"linear_distill_loss: {who}_softcap={softcap}, expected a positive finite number, or None for no cap"
        )


def check_chunk_tokens(chunk_tokens: int | None) -> None:
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"linear_distill_loss: chunk_tokens={chunk_tokens}, expected at least 1, or None to have it chosen"
        )


def check(call: Call) -> None:
    """Everything that can be told without reading a tensor."""
    check_chunk_tokens(call.chunk_tokens)
    student, teacher = call.student, call.teacher
    _check_head("student", student, call.matmul_dtype)
    _check_head("teacher", teacher, call.matmul_dtype)
    if student.hidden.shape[:-1] != teacher.hidden.shape[:-1]:
        raise ValueError(
            f"linear_distill_loss: student_hidden is {tuple(student.hidden.shape)} but teacher_hidden "
            f"{tuple(teacher.hidden.shape)}; all dimensions but the last must agree"
        )
    distill_loss_call.check(logits_call(call))


def _check_head(who: str, head: Head, matmul_dtype: torch.dtype | None) -> None:
    check_head_options(who, head.scale, head.softcap)
    hidden, weight, bias = head.hidden, head.weight, head.bias
    for name, tensor in ((f"{who}_hidden", hidden), (f"{who}_weight", weight), (f"{who}_bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"linear_distill_loss: {name} is {tensor.dtype}, expected float32, bfloat16 or float16")
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"linear_distill_loss: {name} is {tensor.layout}, expected a dense tensor; use .to_dense()"
            )
        if matmul_dtype is None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"linear_distill_loss: {who}_hidden is {hidden.dtype} but {name} {tensor.dtype}; convert one with .to, "
                "or use torch.autocast"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"linear_distill_loss: {who}_hidden is on {hidden.device} but {name} on {tensor.device}; move one with "
                ".to(device)"
            )
    if hidden.dim() == 0:
        raise ValueError(f"linear_distill_loss: {who}_hidden is a scalar, expected (..., H)")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"linear_distill_loss: {who}_weight is {tuple(weight.shape)}, expected (V, H) with V > 0")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"linear_distill_loss: {who}_hidden has H={hidden.shape[-1]} but {who}_weight has H={weight.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_distill_loss: {who}_bias is {tuple(bias.shape)}, expected ({weight.shape[0]},), one value a class"
        )
