"""Int8 convolution in torch: the specification that every kernel is tested against. Any device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pycompress.ops.int8_conv2d_weight import plain_conv
from pycompress.ops.int8_matmul_reference import apply_activation, quantize_rows, static_rows


@dataclass(frozen=True)
class Window:
    """Which inputs an output reads. ``padding``: top, bottom, left, right; the others are (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def out_size(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the output; less than 1 where the kernel does not fit."""
        top, bottom, left, right = self.padding
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        return (h + top + bottom - dh * (kh - 1) - 1) // sh + 1, (w + left + right - dw * (kw - 1) - 1) // sw + 1


@dataclass(frozen=True)
class ConvCall:
    """Checked arguments of one call. x: ``(N, C, H, W)``, weight: int8 ``(O, C / groups, kh, kw)`` or packed."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    window: Window
    mode: str
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    activation: str

    @cached_property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(N, O, OH, OW)"""
        x = self.x
        return (x.shape[0], self.weight_scale.shape[0], *self.window.out_size(x.shape[2], x.shape[3]))

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the result: channels last where the channels of x are adjacent and its columns are not."""
        last = self.x.shape[1] > 1 and self.x.stride(1) == 1 and self.x.stride(3) != 1
        return torch.channels_last if last else torch.contiguous_format


def float_conv(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """``F.conv2d`` with padding that may differ between the sides."""
    if x.shape[1] == 0:  # torch gives no outputs then
        return x.new_zeros((x.shape[0], weight.shape[0], *window.out_size(x.shape[2], x.shape[3])))
    top, bottom, left, right = window.padding
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight, None, window.stride, 0, window.dilation, window.groups)


def reference_int8_conv2d(call: ConvCall) -> Tensor:
    """The formula in torch: exact integer sums in float64, epilogue in fp32. Any device."""
    x, weight = call.x, plain_conv(call.weight)
    if 0 in call.out_shape:
        return x.new_empty(call.out_shape).to(memory_format=call.memory_format)
    scale = call.weight_scale[:, None, None]
    if call.mode == "weight_only":
        y = float_conv(x.float(), weight.float() * scale[..., None], call.window)
    else:
        rows = x.reshape(x.shape[0], x.shape[1:].numel())
        if call.mode == "dynamic":
            q, x_scale = quantize_rows(rows)
        else:
            q, x_scale = static_rows(rows, call.input_scale, call.input_zero_point)
        # |sum| <= 255 * 128 * K: float64 holds it for every K up to 2^38; round() undoes what an algorithm with
        # transforms (a GPU's) may leave.
        sums = float_conv(q.to(torch.float64).reshape(x.shape), weight.to(torch.float64), call.window).round()
        y = sums.to(torch.float32) * scale * x_scale[:, :, None, None]
    if call.bias is not None:
        y = y + call.bias.to(torch.float32)[:, None, None]
    return apply_activation(y, call.activation).to(x.dtype).contiguous(memory_format=call.memory_format)
