"""The native backend of int8_conv2d: tensors to addresses. Kernels and contract: ``csrc/int8_conv2d/int8_conv2d.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import DTYPE_CODES, empty
from pycompress.ops.int8_conv2d_reference import ConvCall
from pycompress.ops.int8_conv2d_weight import pack_conv_weight
from pycompress.ops.int8_matmul_weight import aligned
from pycompress.ops.linear_common import ACTIVATION_CODES

_MODE_CODES = {"dynamic": 0, "static": 1}  # Mode of csrc/int8_matmul/int8_matmul.h


def native_conv_missing(call: ConvCall) -> str | None:
    """Why the native kernels cannot take a call, or None."""
    if call.x.device.type != "cpu":
        return f"x is on {call.x.device}, the native kernels run on the CPU"
    if call.mode == "weight_only":
        return "mode='weight_only' multiplies in float, which torch does"
    return conv_refused(call.x.shape[1] // call.window.groups, call.window.kernel) or None


def conv_refused(per_group: int, kernel: tuple[int, int]) -> str:
    """Why no native kernel takes a weight ``(O, per_group, *kernel)``; empty where they do."""
    return _C.conv_refuses(per_group, *kernel)


def native_int8_conv2d(call: ConvCall) -> Tensor:
    """The native backend: checked arguments, on the CPU."""
    groups = call.window.groups
    weight = aligned(call.weight) if call.weight.dtype == torch.uint8 else pack_conv_weight(call.weight, groups)
    return run_plan(native_conv_plan(call, weight), call)


def native_conv_plan(call: ConvCall, packed: Tensor) -> _C.Int8ConvPlan:
    """All but x and y, as addresses: the tensors must outlive the plan."""
    bias, input_scale, zero_point, window = call.bias, call.input_scale, call.input_zero_point, call.window
    return _C.Int8ConvPlan(
        packed.data_ptr(),
        packed.numel(),
        call.weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        0 if input_scale is None else input_scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        _MODE_CODES[call.mode],
        ACTIVATION_CODES[call.activation],
        (*window.stride, window.padding[0], window.padding[2], *window.dilation),
    )


def run_plan(plan: _C.Int8ConvPlan, call: ConvCall) -> Tensor:
    """y in the memory format of x."""
    x, shape = call.x, call.out_shape
    channels_last = call.memory_format is torch.channels_last
    if x.stride(1) != 1 and x.stride(3) != 1:
        x = x.contiguous()
    if channels_last:
        n, o, oh, ow = shape
        y = empty((n, oh, ow, o), x.dtype).permute(0, 3, 1, 2)
    else:
        y = empty(shape, x.dtype)
    strides = x.stride()
    if x.shape[3] == 1:
        strides = (*strides[:3], 1)  # of one column it says nothing, and may be anything
    plan.run(
        x.data_ptr(), tuple(x.shape), strides, DTYPE_CODES[x.dtype], y.data_ptr(), shape[2:], channels_last,
        torch.get_num_threads(),
    )  # fmt: skip
    return y
