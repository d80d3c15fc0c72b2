"""Distillation loss of two classifiers on their hidden states, without the logits of the whole batch.

For each token, with ``distill_loss`` as in ``distill_loss.py``::

    student = cap(student_logit_scale * (student_hidden @ student_weight^T + student_bias))
    teacher = cap(teacher_logit_scale * (teacher_hidden @ teacher_weight^T + teacher_bias))
    loss    = distill_loss(student, teacher, labels)          cap(x) = softcap * tanh(x / softcap), or x

The tokens are taken in chunks: the logits of a chunk lie in a buffer that is used again. Where a gradient is wanted it
is computed in the forward pass, so that neither logits nor their gradient are kept, as in the chunked losses of
Liger-Kernel. ``linear_distill_loss_chunks.py`` is that loop. The backends differ in what makes the losses of a chunk:
the native kernel and those of a GPU, which write the gradient over the logits, or the reference in torch.

Edges are those of ``distill_loss``. Of a teacher with more classes than the student, only the student's are computed.
The gradient of the weight is summed in float32 whatever the dtype of the weight (float64 for float64).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pycompress import gpu
from pycompress._native import DTYPE_CODES
from pycompress.ops import distill_loss_call
from pycompress.ops.backend import Backend, Backends
from pycompress.ops.distill_loss import DistillLossParts, check_backend
from pycompress.ops.distill_loss_autograd import may_scale_in_place, refuse_second_order, scale_anew, scale_in_place
from pycompress.ops.distill_loss_cuda import cuda_row_loss
from pycompress.ops.distill_loss_native import run_kernel
from pycompress.ops.distill_loss_reference import reference_distill_loss
from pycompress.ops.distill_loss_triton import triton_row_loss
from pycompress.ops.linear_distill_loss_call import Call, Head, Options, Outputs, check, gradient_dtype
from pycompress.ops.linear_distill_loss_chunks import Chunk, accumulator, compute_dtype, run_chunks

# ---- backend table --------------------------------------------------------------------------------------------


def _dtype_missing(call: Call, kernels: str) -> str | None:
    for who, head in (("student", call.student), ("teacher", call.teacher)):
        if compute_dtype(head, call.matmul_dtype) not in DTYPE_CODES:
            return f"{who}_hidden is {head.hidden.dtype}, the {kernels} kernels take float32, bfloat16 and float16"
    return None


def _native_missing(call: Call) -> str | None:
    device = call.student.hidden.device
    if device.type != "cpu":
        return f"student_hidden is on {device}, the native kernels run on the CPU"
    return _dtype_missing(call, "native")


def _cuda_missing(call: Call) -> str | None:
    return gpu.cuda_missing(call.student.hidden, "student_hidden") or _dtype_missing(call, "CUDA")


def _triton_missing(call: Call) -> str | None:
    return gpu.triton_missing(call.student.hidden, "student_hidden") or _dtype_missing(call, "Triton")


def _logits_call(options: Options, chunk: Chunk) -> distill_loss_call.Call:
    return distill_loss_call.Call(
        chunk.student, chunk.teacher, chunk.labels, None, None, None, None,
        *options._replace(reduction="none"), student_grad=chunk.grad is not None, teacher_grad=False,
    )  # fmt: skip


def _native_row_loss(options: Options, chunk: Chunk) -> None:
    loss, hard, soft = chunk.values
    run_kernel(_logits_call(options, chunk), loss, hard, soft, chunk.grad, num_items=-1.0, normalize=True)


def _cuda_row_loss(options: Options, chunk: Chunk) -> None:
    cuda_row_loss(_logits_call(options, chunk), chunk.values, chunk.grad)


def _triton_row_loss(options: Options, chunk: Chunk) -> None:
    triton_row_loss(_logits_call(options, chunk), chunk.values, chunk.grad)


def _reference_row_loss(options: Options, chunk: Chunk) -> None:
    out = reference_distill_loss(_logits_call(options, chunk))
    torch.stack([out.loss, out.hard, out.soft], out=chunk.values)
    if chunk.grad is not None:
        assert out.grad_student is not None, "it was asked for"
        chunk.grad.copy_(out.grad_student)


# A backend turns the logits of one chunk into losses and gradients; run_chunks has the loop.
_TABLE = Backends(
    "linear_distill_loss",
    Backend("native", _native_missing, partial(run_chunks, row_loss=_native_row_loss)),
    Backend("cuda", _cuda_missing, partial(run_chunks, row_loss=_cuda_row_loss, on_gpu=True)),
    Backend("triton", _triton_missing, partial(run_chunks, row_loss=_triton_row_loss, on_gpu=True)),
    Backend("reference", lambda call: None, partial(run_chunks, row_loss=_reference_row_loss)),
)


# ---- registration ---------------------------------------------------------------------------------------------

_LIB = torch.library.Library("pycompress", "FRAGMENT")
_LIB.define(
    "linear_distill_loss("
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
    "Tensor? labels, Tensor? token_weight, Tensor? num_items, Tensor? token_grad, "
    "float temperature, float alpha, str divergence, float beta, int ignore_index, float label_smoothing, "
    "str reduction, float student_logit_scale, float teacher_logit_scale, float? student_softcap, "
    "float? teacher_softcap, int? chunk_tokens, bool hidden_grad, bool weight_grad, bool bias_grad, "
    "ScalarType? matmul_dtype, str backend) -> "
    "(Tensor loss, Tensor hard, Tensor soft, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def _call(*args: Any) -> tuple[Call, str]:
    """The operator's arguments, checked, and the backend's name."""
    labels, token_weight, num_items, token_grad = args[6:10]
    student_scale, teacher_scale, student_cap, teacher_cap, chunk_tokens = args[17:22]
    hidden_grad, weight_grad, bias_grad, matmul_dtype, backend = args[22:]
    call = Call(
        student=Head(args[0], args[1], args[2], student_scale, student_cap),
        teacher=Head(args[3], args[4], args[5], teacher_scale, teacher_cap),
        labels=labels,
        token_weight=token_weight,
        num_items=num_items,
        token_grad=token_grad,
        options=Options(*args[10:17]),
        chunk_tokens=chunk_tokens,
        matmul_dtype=matmul_dtype,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
    )
    check_backend(backend)
    check(call)
    return call, backend


def _run(*args: Any) -> Outputs:
    call, backend = _call(*args)
    return _TABLE.pick(backend, call).run(call)


def _fake(*args: Any) -> Outputs:
    call, _ = _call(*args)
    hidden, weight, bias, _, _ = call.student
    shape = hidden.shape[:-1] if call.options.reduction == "none" else ()
    loss, hard, soft = (hidden.new_empty(shape, dtype=accumulator(call)) for _ in range(3))
    grads = []
    for wanted, tensor in ((call.hidden_grad, hidden), (call.weight_grad, weight), (call.bias_grad, bias)):
        like = hidden if tensor is None else tensor
        size = tensor.shape if wanted and tensor is not None else (0,)
        grads.append(like.new_empty(size, dtype=gradient_dtype(like.dtype)))
    return Outputs(loss, hard, soft, *grads)


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _autocast(*args: Any) -> Outputs:
    """As ``nn.Linear`` under autocast: the products are in its dtype, float64 excepted. The gradients of float32
    parameters are not rounded to it."""
    device = args[0].device.type
    wide = any(isinstance(tensor, Tensor) and tensor.dtype is torch.float64 for tensor in args[:6])
    *rest, matmul_dtype, backend = args
    if matmul_dtype is None and device in ("cpu", "cuda") and not wide:
        matmul_dtype = torch.get_autocast_dtype(device)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return torch.ops.pycompress.linear_distill_loss.default(*rest, matmul_dtype, backend)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else torch fills zeros of the gradients' size
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.rest = None
    if inputs[16] == "none":  # what arrives from above differs from token to token: computed again, in the backward
        ctx.save_for_backward(*inputs[:10])
        ctx.rest = inputs[10:]
    else:
        ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_order("linear_distill_loss")
    grads: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        wanted = ctx.needs_input_grad[:3]
        made: list[Any]
        if ctx.rest is None:
            found, scaled = ctx.saved_tensors, scale_in_place if may_scale_in_place(grad_loss) else scale_anew
            made = [scaled(found[i], grad_loss) if wanted[i] else None for i in range(3)]
        else:
            made = list(_gradients_by_token(ctx, wanted, grad_loss))
        grads = [made[i].to(ctx.dtypes[i]) if wanted[i] else None for i in range(3)]
    return (*grads, *[None] * 24)


def _gradients_by_token(ctx: Any, wanted: tuple[bool, ...], grad_loss: Tensor) -> tuple[Tensor, ...]:
    *tensors, _ = ctx.saved_tensors
    options, after, (matmul_dtype, backend) = ctx.rest[:7], ctx.rest[7:12], ctx.rest[15:]
    options = (*options[:6], "sum")
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):  # as in the forward, whatever surrounds the backward
        return torch.ops.pycompress.linear_distill_loss.default(
            *tensors, grad_loss.reshape(-1), *options, *after, *wanted, matmul_dtype, backend
        )[3:]


_LIB.impl("linear_distill_loss", _run, "CompositeExplicitAutograd")
_LIB.impl("linear_distill_loss", _autocast, "AutocastCPU")
_LIB.impl("linear_distill_loss", _autocast, "AutocastCUDA")
torch.library.register_fake("pycompress::linear_distill_loss", _fake, lib=_LIB)
torch.library.register_autograd("pycompress::linear_distill_loss", _backward, setup_context=_setup_context, lib=_LIB)


# ---- the function ---------------------------------------------------------------------------------------------


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
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
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | DistillLossParts:
    """:func:`distill_loss` of the logits that two heads make of hidden states; the formulas are above.

    Args:
        student_hidden: ``(..., H)`` float32, bfloat16 or float16. The reference backend also takes float64.
        student_weight: ``(V, H)``, as ``nn.Linear`` keeps it, of the same dtype (under autocast any).
        teacher_hidden, teacher_weight: ``(..., H')`` of the same leading dimensions, ``(V', H')``. Constants, of a
            dtype of their own.
        labels: ``(...)`` integers, as in :func:`distill_loss`. Tokens with ``ignore_index`` are left out before the
            products, so they cost nothing; on a GPU, where that would wait for the device, they cost as others do.
        student_bias, teacher_bias: ``(V,)``, ``(V',)`` of the weight's dtype.
        temperature, alpha, divergence, beta, ignore_index, label_smoothing, reduction, token_weight, num_items,
            return_parts: as in :func:`distill_loss`.
        student_logit_scale, teacher_logit_scale: what the logits are multiplied by; positive.
        student_softcap, teacher_softcap: ``softcap * tanh(logits / softcap)`` of the scaled logits; positive, or None.
        chunk_tokens: tokens in a chunk. None: enough for fast products, about 24 MB of logits or 96 tokens (on a GPU
            256 MB or 1024).
        backend: ``"auto"``, ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; a named one runs or raises.

    Returns:
        The loss in float32 (float64 for float64 hidden states). Gradients reach ``student_hidden``,
        ``student_weight`` and ``student_bias``; what does not require one is not computed. They are computed in the
        forward pass, except for ``reduction="none"``, where the backward pass computes the logits again. First order
        only.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, a label out of range, a weight that is
            negative or not finite, ``num_items`` of 0 with valid tokens. On a GPU such values make NaN instead, as in
            :func:`distill_loss`.
        RuntimeError: in the backward, if it is to be differentiated in its turn (``create_graph=True``).
    """
    now = torch.is_grad_enabled() and reduction != "none"
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = torch.tensor(num_items, dtype=torch.float64)  # on the CPU, where reading it waits for no device
    loss, hard, soft, _, _, _ = torch.ops.pycompress.linear_distill_loss.default(
        student_hidden,
        student_weight,
        student_bias,
        *(None if tensor is None else tensor.detach() for tensor in (teacher_hidden, teacher_weight, teacher_bias)),
        labels,
        None if token_weight is None else token_weight.detach(),
        num_items,
        None,
        temperature,
        alpha,
        divergence,
        beta,
        ignore_index,
        label_smoothing,
        reduction,
        student_logit_scale,
        teacher_logit_scale,
        student_softcap,
        teacher_softcap,
        chunk_tokens,
        now and student_hidden.requires_grad,
        now and student_weight.requires_grad,
        now and student_bias is not None and student_bias.requires_grad,
        None,
        backend,
    )
    return DistillLossParts(loss, hard, soft) if return_parts else loss
