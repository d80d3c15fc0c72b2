"""The 4-bit linear layer once more, in numpy and float64, sharing no code with the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests import oracle

# Table of bitsandbytes' create_normal_map(), to float32.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
# (format, symmetric): every kind of weight.
KINDS = [("int4", True), ("int4", False), ("nf4", True)]
KIND_IDS = ["int4", "int4 zero points", "nf4"]
Parts = tuple[Tensor, Tensor, "Tensor | None"]


def nibbles(packed: Tensor, k: int) -> np.ndarray:
    """(N, K) of 0..15."""
    q = np.zeros((packed.shape[0], k), np.int64)
    q[:, 0::2] = packed.numpy()[:, : (k + 1) // 2] & 15
    q[:, 1::2] = packed.numpy()[:, : k // 2] >> 4
    return q


def weight(parts: Parts, k: int, format: str, group_size: int) -> np.ndarray:
    """The float64 (N, K) weight."""
    packed, scale, zero_point = parts
    q, group = nibbles(packed, k), np.arange(k) // (group_size if group_size > 0 else max(k, 1))
    if format == "nf4":
        value = NF4.astype(np.float64)[q]
    else:
        value = (q - (8 if zero_point is None else zero_point.numpy().astype(np.int64)[:, group])).astype(np.float64)
    return value * scale.numpy().astype(np.float64)[:, group]


def int4_linear(
    x: Tensor, parts: Parts, bias: Tensor | None, format: str, group_size: int, activation: str
) -> tuple[np.ndarray, np.ndarray]:
    """float64 result, and the sum of the magnitudes that met in it: what float32 rounding errors are relative to."""
    v, w = x.to(torch.float64).numpy(), weight(parts, x.shape[-1], format, group_size)
    b = 0.0 if bias is None else bias.to(torch.float64).numpy()
    return oracle.activate(v @ w.T + b, activation), np.abs(v) @ np.abs(w).T + np.abs(b)
