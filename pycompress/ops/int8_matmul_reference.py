"""Int8 linear layer in torch: the specification that every kernel is tested against. Any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.ops.int8_matmul_weight import SMALLEST_SCALE, plain


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic quantisation of the rows of ``x`` ``(M, K)``: int8 ``(M, K)`` and fp32 scales ``(M, 1)``.

    A row with NaN or Inf has q = 0 and scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    finite = largest.isfinite()
    scale = (largest / 127.0).clamp_min(SMALLEST_SCALE)
    q = torch.where(finite, (x * (1.0 / scale)).round(), 0.0).to(torch.int8)
    return q, torch.where(finite, scale, torch.nan)


def static_rows(x: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """Static quantisation less the zero point, int16 ``(M, K)``, and scales ``(M, 1)``."""
    assert input_scale is not None, "checked before"
    assert input_zero_point is not None, "checked before"
    x = x.float()
    zero_point = input_zero_point.to(torch.float32)
    finite = x.isfinite().all(dim=1, keepdim=True)
    steps = torch.minimum(torch.maximum(x * (1.0 / input_scale), -zero_point), 255 - zero_point).round()
    q = torch.where(finite, steps, 0.0).to(torch.int16)
    return q, torch.where(finite, input_scale, torch.nan)


def apply_activation(y: Tensor, activation: str) -> Tensor:
    """``activation`` (one of :data:`ACTIVATIONS`) applied elementwise."""
    if activation == "relu":
        return torch.relu(y)
    if activation == "gelu":
        return torch.nn.functional.gelu(y)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    return torch.nn.functional.silu(y) if activation == "silu" else y


@dataclass(frozen=True)
class Call:
    """Checked arguments of one call. ``x`` is ``(..., K)``, ``weight`` int8 ``(N, K)`` or packed uint8."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    mode: str
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    activation: str


def reference_int8_linear(call: Call) -> Tensor:
    """The formula in torch: exact integer sums in int64, epilogue in fp32. Any device."""
    n, k = call.weight_scale.shape[0], call.x.shape[-1]
    rows, weight = call.x.reshape(call.x.shape[:-1].numel(), k), plain(call.weight)
    if call.mode == "weight_only":
        y = rows.float() @ weight.float().t() * call.weight_scale
    else:
        if call.mode == "dynamic":
            q, x_scale = quantize_rows(rows)
        else:
            q, x_scale = static_rows(rows, call.input_scale, call.input_zero_point)
        y = _exact_product(q, weight).to(torch.float32) * call.weight_scale * x_scale
    if call.bias is not None:
        y = y + call.bias.to(torch.float32)
    y = apply_activation(y, call.activation).to(call.x.dtype)
    return y.reshape(*call.x.shape[:-1], n)


def _exact_product(q: Tensor, weight: Tensor) -> Tensor:
    # |sum| <= 255 * 128 * K: float64 holds it exactly for every K up to 2^38, and is far faster than int64.
    return q.to(torch.float64) @ weight.to(torch.float64).t()
