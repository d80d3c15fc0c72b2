"""Distillation loss as a torch operator: formula, backend table, registration.

For each token, with student logits s, teacher logits t, label y, temperature tau::

    loss = alpha * hard + (1 - alpha) * soft
    hard = cross_entropy(s, y), at temperature 1
    soft = tau^2 * D(p, q)                    p = softmax(t / tau), q = softmax(s / tau)

==========  =========================================================  ===============================================
divergence  D                                                          source
==========  =========================================================  ===============================================
forward_kl  ``KL(p|q) = sum p (log p - log q)``                        Hinton et al. 2015
reverse_kl  ``KL(q|p) = sum q (log q - log p)``                        Gu et al. 2024 (MiniLLM)
jsd         ``beta KL(p|m) + (1 - beta) KL(q|m)``,                     Agarwal et al. 2024 (GKD)
            ``m = beta p + (1 - beta) q``
==========  =========================================================  ===============================================

Edges:

- jsd is the plain formula: for beta -> 0 it tends to 0 like ``beta * KL(p|q)``, for beta -> 1 like
  ``(1 - beta) * KL(q|p)``, and at 0 and 1 it is exactly 0.
- Vocabularies of different size: D is over the classes that both have, p and q renormalised over them; the hard term
  is over all of the student's.
- A term whose weight is 0 is not computed, and its part is 0.
- A token takes no part where its label is ``ignore_index`` or its weight 0: loss 0 and gradient 0, whatever its logits
  hold. Without such a token left the loss is 0.
- ``-inf`` is a masked class: no mass, ``0 log 0 = 0``. So is, as a weight, a probability below 2^-126 of the row's
  largest. Where a term is infinite (forward_kl: the student masks what the
  teacher does not; reverse_kl: the teacher masks what the student does not; the label is masked) the loss is ``+inf``
  and the gradient finite: that of the finite part. A row with NaN, ``+inf`` or nothing but ``-inf`` gives NaN, and no
  other row does.
- Label smoothing is spread over the student's classes that are not masked.
- The kernels of a GPU check no values, which would wait for the device. A label out of its range, or a weight that is
  negative or not finite, makes that token NaN in loss and gradient; ``num_items`` that is no positive finite number
  makes all tokens NaN that take part. ``ignore_index`` goes before, and a number that is not on the device is checked.

The contract of the native kernels is ``csrc/distill_loss/distill_loss.h``, that of the CUDA kernels ``cuda.h`` beside
it; the Triton kernels are ``pycompress/kernels/distill_loss*.py``. ``distill_loss_reference.py`` is the same in torch
and runs on any device; on a GPU it takes top-k teachers, and checks values as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycompress.ops.backend import Backend, Backends
from pycompress.ops.distill_loss_autograd import is_plain_eager, refuse_second_order, run_eager, scale_anew
from pycompress.ops.distill_loss_call import (
    Call,
    Outputs,
    TopKLogits,
    accumulator,
    check,
    divides_later,
    with_unit_weights,
)
from pycompress.ops.distill_loss_cuda import cuda_distill_loss, cuda_distill_missing
from pycompress.ops.distill_loss_native import native_distill_loss, native_missing
from pycompress.ops.distill_loss_reference import reference_distill_loss
from pycompress.ops.distill_loss_triton import triton_distill_loss, triton_distill_missing

# ---- backend table --------------------------------------------------------------------------------------------


_TABLE = Backends(
    "distill_loss",
    Backend("native", native_missing, native_distill_loss),
    Backend("cuda", cuda_distill_missing, cuda_distill_loss),
    Backend("triton", triton_distill_missing, triton_distill_loss),
    Backend("reference", lambda call: None, reference_distill_loss),
)
DISTILL_BACKENDS, pick, check_backend = _TABLE.names, _TABLE.pick, _TABLE.check


# ---- registration ---------------------------------------------------------------------------------------------

_LIB = torch.library.Library("pycompress", "FRAGMENT")
_LIB.define(
    "distill_loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? token_weight, Tensor? num_items, "
    "Tensor? topk_indices, Tensor? topk_logsumexp, float temperature, float alpha, str divergence, float beta, "
    "int ignore_index, float label_smoothing, str reduction, bool student_grad, bool teacher_grad, str backend) -> "
    "(Tensor loss, Tensor hard, Tensor soft, Tensor grad_student, Tensor grad_teacher, Tensor grad_scale)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def _checked(call: Call, backend: str) -> Callable[[Call], Outputs]:
    check_backend(backend)
    check(call)
    run = pick(backend, call).run
    if call.token_weight is None or not divides_later(call):
        return run
    return lambda call: run(with_unit_weights(call))


def _run(*args: Any) -> tuple[Tensor, ...]:
    call = Call(*args[:-1])
    found = _checked(call, args[-1])(call)
    student, teacher, scale = found.grad_student, found.grad_teacher, found.grad_scale
    return (
        *found[:3],
        call.student.new_empty(0) if student is None else student,
        call.teacher.new_empty(0) if teacher is None else teacher,
        call.student.new_ones((), dtype=torch.float32) if scale is None else scale,
    )


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = Call(*args[:-1])
    check_backend(args[-1])
    check(call)
    student, teacher = call.student, call.teacher
    shape = student.shape[:-1] if call.reduction == "none" else ()
    return (
        *(student.new_empty(shape, dtype=accumulator(call)) for _ in range(3)),
        student.new_empty(student.shape if call.student_grad else 0),
        teacher.new_empty(teacher.shape if call.teacher_grad else 0),
        student.new_empty((), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else torch fills zeros of the gradients' size
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_order()
    grads: list[Tensor | None] = [None, None]
    if grad_loss is not None:
        grad_student, grad_teacher, grad_scale = ctx.saved_tensors
        factor = grad_loss * grad_scale
        if ctx.needs_input_grad[0]:
            grads[0] = scale_anew(grad_student, factor)
        if ctx.needs_input_grad[1]:
            grads[1] = scale_anew(grad_teacher, factor)
    return (*grads, *[None] * 15)


_LIB.impl("distill_loss", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pycompress::distill_loss", _fake, lib=_LIB)
torch.library.register_autograd("pycompress::distill_loss", _backward, setup_context=_setup_context, lib=_LIB)


# ---- the function ---------------------------------------------------------------------------------------------


class DistillLossParts(NamedTuple):
    """The loss and, detached, its two terms before the weighting with alpha; all with the same reduction."""

    loss: Tensor
    hard: Tensor
    soft: Tensor


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKLogits,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    teacher_grad: bool = False,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | DistillLossParts:
    """``alpha * cross_entropy + (1 - alpha) * temperature^2 * D(teacher, student)``; the formulas are above.

    Args:
        student_logits: ``(..., V)`` float32, bfloat16 or float16, any strides: a slice is not copied. The gradient has
            its dtype. The reference backend also takes float64.
        teacher_logits: ``(..., V')`` of the same leading dimensions and any of the dtypes, or :class:`TopKLogits`.
            A constant, unless ``teacher_grad``.
        labels: ``(...)`` integers, classes of the student or ``ignore_index``. Needed for ``alpha > 0``; with
            ``alpha=0`` they only tell which tokens take part.
        temperature: positive. Large ones soften both distributions; the hard term stays at temperature 1.
        alpha: weight of the hard term, 0 to 1.
        divergence: ``"forward_kl"``, ``"reverse_kl"`` or ``"jsd"``; beta is for jsd.
        label_smoothing: of the hard term, 0 to 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value a token, in the leading dimensions).
        token_weight: ``(...)`` finite, >= 0, a constant. The mean is weighted, as by ``weight`` in
            ``F.cross_entropy``: ``sum w * loss / sum w``.
        num_items: with ``"mean"``, what the sum is divided by instead of the number (weight) of this call's valid
            tokens: a number or a tensor of one. With the number of the whole batch, the parts of a batch
            (gradient accumulation, data parallelism) add up to its loss.
        teacher_grad: whether the gradient reaches ``teacher_logits`` too.
        return_parts: return :class:`DistillLossParts`, for logging.
        backend: ``"auto"``, ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; a named one runs or raises.

    Returns:
        The loss in float32 (float64 for float64 logits). Forward and gradient are computed in one pass when the
        gradient is wanted; nothing is kept but the gradient. First order only.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, a label or top-k index out of range, a top-k
            index that is repeated, a weight that is negative or not finite, ``num_items`` of 0 with valid tokens.
            Values on a GPU are not checked; see above.
        RuntimeError: in the backward, if it is to be differentiated in its turn (``create_graph=True``).
    """
    indices = logsumexp = None
    teacher = teacher_logits
    if isinstance(teacher, TopKLogits):
        teacher, indices, logsumexp = teacher
    grad_mode = torch.is_grad_enabled()
    teacher_grad = teacher_grad and (indices is not None or (grad_mode and teacher.requires_grad))
    if teacher.requires_grad and not teacher_grad:
        teacher = teacher.detach()
    if token_weight is not None and token_weight.requires_grad:
        token_weight = token_weight.detach()
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = torch.tensor(num_items, dtype=torch.float64)  # on the CPU, where reading it waits for no device
    call = Call(
        student_logits,
        teacher,
        labels,
        token_weight,
        num_items,
        indices,
        logsumexp,
        temperature,
        alpha,
        divergence,
        beta,
        ignore_index,
        label_smoothing,
        reduction,
        grad_mode and student_logits.requires_grad,
        teacher_grad,
    )
    if not torch.compiler.is_compiling() and is_plain_eager(call):
        loss, hard, soft = run_eager(call, _checked(call, backend))
    else:
        loss, hard, soft, _, _, _ = torch.ops.pycompress.distill_loss.default(*call, backend)
    return DistillLossParts(loss, hard, soft) if return_parts else loss
