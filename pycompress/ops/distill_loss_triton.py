"""Distillation loss by the Triton kernels, ``pycompress.kernels.distill_loss``, imported when they are first asked for.

What differs from the CPU, where values are checked, is in that file's docstring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import gpu
from pycompress.ops.distill_loss_call import Call, Outputs, kernels_missing

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_distill_missing(call: Call) -> str | None:
    """Why the Triton kernels cannot take the call, or None."""
    return kernels_missing(call, "Triton") or gpu.triton_missing(call.student, "student_logits")


def triton_distill_loss(call: Call) -> Outputs:
    """Loss and gradients of a checked call."""
    from pycompress.kernels.distill_loss import distill_loss

    return distill_loss(call)


def triton_row_loss(call: Call, values: Tensor, grad: Tensor | None) -> None:
    """Loss, hard and soft of each token into values (3, n), and the gradient into grad (n, V), or into None.

    The call has reduction "none"; grad may be the student's own memory.
    """
    from pycompress.kernels.distill_loss import row_loss

    row_loss(call, values, grad)


def triton_scale_missing(grad: Tensor) -> str | None:
    """Why the Triton kernel cannot scale a gradient in place, or None."""
    if grad.dtype not in _DTYPES:
        return f"the gradient is {grad.dtype}, the Triton kernels take float32, bfloat16 and float16"
    return gpu.triton_missing(grad)


def triton_scale_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """grad (..., V), contiguous, times factor: 0-dim, or one a token. Where it is 1 nothing is moved."""
    from pycompress.kernels.distill_loss import scale_in_place

    return scale_in_place(grad, factor)
