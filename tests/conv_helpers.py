"""The int8 convolution once more, in numpy and float64, tap by tap, sharing no code with the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pycompress import ops
from tests import oracle

SCALE, ZERO_POINT = 0.02, 97


def static() -> dict[str, Tensor]:
    return {"input_scale": torch.tensor(SCALE), "input_zero_point": torch.tensor(ZERO_POINT, dtype=torch.int32)}


@dataclass(frozen=True)
class Conv:
    """A convolution's shape; padding is (height, width) on both sides."""

    channels: int
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def layer(self) -> tuple[Tensor, Tensor, Tensor]:
        """weight, weight_scale, bias"""
        weight = torch.randn(self.out, self.channels // self.groups, *self.kernel)
        return (*ops.quantize_conv_weight(weight), torch.randn(self.out))

    def run(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, mode: str, **more: str) -> Tensor:
        statics = static() if mode == "static" else {}
        window = self.stride, self.padding, self.dilation, self.groups
        return ops.int8_conv2d(x, weight, scale, bias, *window, mode=mode, **statics, **more)  # type: ignore


def windows(v: np.ndarray, conv: Conv) -> np.ndarray:
    """(N, C, H, W) -> (N, C, kh * kw, OH, OW)"""
    (ph, pw), (kh, kw), (sh, sw), (dh, dw) = conv.padding, conv.kernel, conv.stride, conv.dilation
    v = np.pad(v, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    rows, columns = (v.shape[2] - dh * (kh - 1) - 1) // sh + 1, (v.shape[3] - dw * (kw - 1) - 1) // sw + 1
    taps = [
        v[:, :, a * dh : a * dh + (rows - 1) * sh + 1 : sh, b * dw : b * dw + (columns - 1) * sw + 1 : sw]
        for a in range(kh)
        for b in range(kw)
    ]
    return np.stack(taps, axis=2)


def sums(v: np.ndarray, weight: np.ndarray, conv: Conv) -> np.ndarray:
    """(N, O, OH, OW) in v's dtype"""
    n, g = len(v), conv.groups
    found = windows(v, conv)
    rows, columns = found.shape[3:]
    found = found.reshape(n, g, conv.channels // g, -1, rows, columns)
    kernels = weight.reshape(g, conv.out // g, conv.channels // g, -1)
    return np.einsum("ngctij,goct->ngoij", found, kernels).reshape(n, conv.out, rows, columns)


def check(
    y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, conv: Conv, mode: str, activation: str
) -> None:
    """y against the documented formula, within the roundings of the epilogue and of y's dtype."""
    v, terms = x.to(torch.float32).numpy(), 0
    w, s = weight.numpy().astype(np.float64), scale.numpy().astype(np.float64)[:, None, None]
    if mode == "weight_only":
        terms = weight[0].numel()
        product = sums(v.astype(np.float64), w, conv) * s
        magnitude = sums(np.abs(v).astype(np.float64), np.abs(w), conv) * s
    else:
        if mode == "dynamic":
            q, x_scale = oracle.quantize_rows(x.reshape(len(x), -1))
        else:
            q = np.clip(np.rint(v * (np.float32(1) / np.float32(SCALE))), -ZERO_POINT, 255 - ZERO_POINT)
            x_scale = np.full((len(x), 1), np.float32(SCALE))
        exact = sums(q.reshape(v.shape).astype(np.int64), w.astype(np.int64), conv)
        product = exact.astype(np.float64) * s * x_scale.astype(np.float64)[..., None, None]
        magnitude = np.abs(product)
    b = 0.0 if bias is None else bias.to(torch.float64).numpy()[:, None, None]
    oracle.assert_close(y, oracle.activate(product + b, activation), magnitude + np.abs(b), x.dtype, terms)
