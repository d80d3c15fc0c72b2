"""The gradient's way back, and the short way from the function to a backend for plain eager mode.

From Python the operator with its autograd takes 100 us and more, this way 35; the loss of a few short rows takes 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycompress.ops.distill_loss_call import Call, Outputs
from pycompress.ops.distill_loss_cuda import cuda_scale_in_place, cuda_scale_missing
from pycompress.ops.distill_loss_triton import triton_scale_in_place, triton_scale_missing
from pycompress.ops.eager import CAN_ASK, nothing_watches

_PLAIN = frozenset((Tensor, type(None)))
_TEMPORARY = 2**16  # elements of float32 that scaling a 16-bit gradient may take, twice or three times over: 256 kB


def is_plain_eager(call: Call) -> bool:
    """Whether nothing would see the call but the backend. ``torch.compiler.is_compiling()`` is the caller's to ask."""
    return (
        CAN_ASK
        and type(call.student) is Tensor
        and type(call.teacher) is Tensor
        and (call.student.is_cpu or call.student.is_cuda)
        and _PLAIN.issuperset(map(type, call[2:7]))
        and nothing_watches()
    )


def run_eager(call: Call, run: Callable[[Call], Outputs]) -> tuple[Tensor, Tensor, Tensor]:
    """loss, hard, soft of a checked call; the loss with its gradient where the call asks for one."""
    if not (call.student_grad or call.teacher_grad):
        return run(call)[:3]
    parts: list[Tensor] = []
    loss = _EagerLoss.apply(call.student, call.teacher, (call, run, parts))
    return loss, parts[0], parts[1]


class _EagerLoss(torch.autograd.Function):
    """A Function of its own, so that nobody else holds the gradients and they can be scaled in place.

    The two terms, which have no gradient, leave through ``parts``: as outputs they would cost 4 us.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, task: tuple[Call, Callable[[Call], Outputs], list[Tensor]]
    ) -> Tensor:
        call, run, parts = task
        loss, hard, soft, *grads = run(call)
        parts += (hard, soft)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        grad_student, grad_teacher, grad_scale = ctx.saved_tensors
        scaled = scale_in_place if may_scale_in_place(grad_loss) else scale_anew
        factor = grad_loss if grad_scale is None else grad_loss * grad_scale
        return (
            None if grad_student is None else scaled(grad_student, factor),
            None if grad_teacher is None else scaled(grad_teacher, factor),
            None,
        )


def refuse_second_order(who: str = "distill_loss") -> None:
    """Raises ``RuntimeError`` in a backward that is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{who}: second-order gradients are not supported (create_graph=True); compose the loss of "
            "log_softmax and kl_div to have them"
        )


def graph_is_kept() -> bool:
    """Whether the saved gradients may be asked for again (``retain_graph=True``), or this torch cannot tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def may_scale_in_place(grad_loss: Tensor) -> bool:
    """Whether nobody will look at the saved gradients again, and grad_loss is what it seems.

    A batch of gradients (``is_grads_batched=True``) arrives as a plain tensor of an older kind of vmap.
    """
    batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    return batched is not None and not batched(grad_loss) and nothing_watches() and not graph_is_kept()


def scale_anew(grad: Tensor, factor: Tensor) -> Tensor:
    """``factor * grad`` in grad's dtype; factor: 0-dim, or one a token."""
    if factor.dim() or not grad.is_cpu:  # without a dimension a GPU would round it to grad's dtype, or overflow
        factor = factor[..., None]
    return (grad * factor).to(grad.dtype)


def scale_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """The same in grad's memory: no second tensor of its size. A factor of 1 costs nothing, on a GPU hardly anything.

    grad is contiguous. On the CPU the factor is looked at; on a GPU nothing waits for it.
    """
    if not grad.is_cpu:
        return _scale_on_device(grad, factor)
    if factor.dim() == 0:
        number = float(factor)
        # A number and not a tensor: beside a float16 tensor that would be rounded to float16, or overflow.
        return grad if number == 1 else grad.mul_(number)
    if bool((factor == 1).all()):
        return grad
    if grad.dtype == factor.dtype:
        return grad.mul_(factor[..., None])
    v = grad.shape[-1]
    step = max(1, _TEMPORARY // v)
    for rows, factors in zip(grad.view(-1, v).split(step), factor.reshape(-1, 1).split(step), strict=True):
        rows.mul_(factors)
    return grad


def _scale_on_device(grad: Tensor, factor: Tensor) -> Tensor:
    if cuda_scale_missing(grad) is None:
        return cuda_scale_in_place(grad, factor)
    if triton_scale_missing(grad) is None:
        return triton_scale_in_place(grad, factor)
    return grad.mul_(factor[..., None])  # of one dimension at least, so that the product is taken in the wider dtype
