"""The CUDA backend of int8_linear: tensors to addresses. Kernels and contract: ``csrc/int8_matmul/cuda.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import gpu
from pycompress._native import DTYPE_CODES
from pycompress.ops.int8_matmul_reference import Call
from pycompress.ops.linear_common import ACTIVATION_CODES
from pycompress.ops.rows import row_layout

_MODE_CODES = {"dynamic": 0, "static": 1, "weight_only": 2}  # Mode of csrc/int8_matmul/int8_matmul.h


def cuda_int8_missing(call: Call) -> str | None:
    """Why the CUDA kernels cannot take a call, or None."""
    reason = gpu.cuda_missing(call.x)
    if reason is not None:
        return reason
    if call.weight.dtype != torch.int8:
        return "the weight is packed for the CPU; unpack_weight gives the plain int8 (N, K) that a GPU reads"
    if call.mode == "weight_only":
        most, tokens = gpu.cuda_module().INT8_MAX_TOKENS, call.x.shape[:-1].numel()
        if tokens > most:
            return f"mode='weight_only' has a CUDA kernel for at most {most} tokens, x has {tokens}"
    return None


def cuda_int8_linear(call: Call) -> Tensor:
    """The CUDA backend: checked arguments, on x's device and its current stream.

    One allocation beside the result, none by the kernels, no synchronisation: a CUDA graph can capture the call.
    """
    x, layout = row_layout(call.x)
    weight, bias = call.weight.contiguous(), call.bias
    n, k = weight.shape
    input_scale, zero_point = call.input_scale, call.input_zero_point
    plan = gpu.cuda_module().Int8Plan(
        weight.data_ptr(),
        n,
        k,
        call.weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        0 if input_scale is None else input_scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        _MODE_CODES[call.mode],
        ACTIVATION_CODES[call.activation],
    )
    place = gpu.place(x)
    workspace = torch.empty(plan.workspace_bytes(layout[0], place[0]), dtype=torch.uint8, device=x.device)
    y = torch.empty((*call.x.shape[:-1], n), dtype=x.dtype, device=x.device)
    plan.run(x.data_ptr(), layout, DTYPE_CODES[x.dtype], y.data_ptr(), workspace.data_ptr(), workspace.numel(), place)
    return y
