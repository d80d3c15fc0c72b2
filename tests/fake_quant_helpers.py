"""What the tests of FakeQuantLinear share: layers, a float64 oracle, and the composition in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn import FakeQuantLinear, MaskedLinear
from tests import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANGE = (-1.5, 2.0)  # narrower than the data, so that static mode clips


def make(
    mode: str = "dynamic", k: int = 24, n: int = 10, bias: bool = True, mask: str = "", **options: Any
) -> FakeQuantLinear:
    """mask: "", or the gradient option of the MaskedLinear that the layer is made of."""
    dtype = options.pop("dtype", torch.float32)
    layer: nn.Module = nn.Linear(k, n, bias, dtype=dtype)
    if mask:
        layer = MaskedLinear.from_linear(layer, torch.rand(n, k) > 0.6, mask)
    return FakeQuantLinear.from_float(layer, mode, input_range=RANGE if mode == "static" else None, **options)


def mask_of(layer: MaskedLinear) -> Tensor:
    assert layer.mask is not None
    return layer.mask


def quantized_weight(layer: FakeQuantLinear) -> tuple[Tensor, Tensor]:
    """Integers and float32 scales by the documented formula, in numpy; the pruned weights are 0."""
    w = layer.weight.detach().float().numpy()
    if layer.mask is not None:
        w = np.where(layer.mask.numpy(), w, np.float32(0))
    largest = np.abs(w).max(axis=1, keepdims=True) if w.shape[1] else np.zeros((len(w), 1), np.float32)
    scale = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny).astype(np.float32)
    q = np.clip(np.rint(w / scale), -127, 127).astype(np.int8)
    return torch.from_numpy(q), torch.from_numpy(scale[:, 0])


def expected(layer: FakeQuantLinear, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The float64 result, and the magnitude of the terms that met in it."""
    q, scale = quantized_weight(layer)
    bias = None if layer.bias is None else layer.bias.detach()
    statics = ops.affine_qparams(*RANGE) if layer.mode == "static" else (1.0, 0)
    return oracle.int8_linear(x, q, scale, bias, layer.mode, "none", *statics)


def composed(layer: FakeQuantLinear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Fake quantisation written in plain torch and float64, rounded straight through; x, weight, bias float64 leaves.

    The integers are those of the float32 formulas, the sums and products exact to float64.
    """
    q, scale = quantized_weight(layer)
    exact = q.double() * scale.double()[:, None]
    if layer.mask is not None and layer.gradient == "masked":
        weight = torch.where(layer.mask, weight, 0)
    weight = weight + (exact - weight).detach()
    rows = x.reshape(-1, x.shape[-1])
    narrow = rows.detach().float()
    if layer.mode == "dynamic":
        x_scale = (narrow.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (narrow * (1 / x_scale)).round().double() * x_scale.double()
        rows = rows + (rounded - rows).detach()
    elif layer.mode == "static":
        s, zero_point = ops.affine_qparams(*RANGE)
        step = torch.tensor(s, dtype=torch.float32)
        rounded = ((narrow * (1 / step)).round() + zero_point).clamp(0, 255).double() - zero_point
        rows = rows.clamp(-zero_point * step.double(), (255 - zero_point) * step.double())
        rows = rows + (rounded * step.double() - rows).detach()
    return F.linear(rows, weight, bias).reshape(*x.shape[:-1], weight.shape[0])
