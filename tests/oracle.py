"""The int8 linear layer once more, in numpy and float64, sharing no code with the package."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# Unit roundoff by dtype: half the gap between 1 and the next number.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

SHAPES = [(0, 8, 8), (1, 1, 1), (1, 1024, 1024), (15, 17, 31), (65, 33, 127), (3, 5, 5001), (7, 130, 64), (4, 9, 0)]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(v: np.ndarray, activation: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        if activation == "relu":
            return np.where(v < 0, 0.0, v)
        if activation == "gelu":
            return 0.5 * v * (1 + _erf(v / math.sqrt(2))) if v.size else v
        if activation == "gelu_tanh":
            return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        if activation == "silu":
            return v / (1 + np.exp(-v))
    return v


def quantize_rows(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Integers and float32 scales of finite rows, by the documented formula with its float32 roundings."""
    v = x.to(torch.float32).numpy()
    largest = np.abs(v).max(axis=1, keepdims=True) if v.shape[1] else np.zeros((len(v), 1), np.float32)
    scale = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(v * (np.float32(1) / scale)).astype(np.int64), scale


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    mode: str,
    activation: str,
    input_scale: float = 1.0,
    zero_point: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """float64 result, and the sum of the magnitudes that met in it: what float32 rounding errors are relative to."""
    w, s = weight.numpy().astype(np.int64), weight_scale.numpy().astype(np.float64)
    if mode == "weight_only":
        v = x.to(torch.float64).numpy()
        product = v @ w.T.astype(np.float64) * s
        magnitude = np.abs(v) @ np.abs(w.T).astype(np.float64) * s
    else:
        if mode == "dynamic":
            q, x_scale = quantize_rows(x)
        else:
            step = x.to(torch.float32).numpy() * (np.float32(1) / np.float32(input_scale))
            q = (np.clip(np.rint(step) + zero_point, 0, 255) - zero_point).astype(np.int64)
            x_scale = np.full((len(q), 1), np.float32(input_scale))
        product = (q @ w.T).astype(np.float64) * s * x_scale.astype(np.float64)
        magnitude = np.abs(product)
    b = 0.0 if bias is None else bias.to(torch.float64).numpy()
    return activate(product + b, activation), magnitude + np.abs(b)


def assert_close(y: Tensor, expected: np.ndarray, magnitude: np.ndarray, dtype: torch.dtype, terms: int = 0) -> None:
    """|y - expected| within the roundings of the epilogue and of y's dtype; the message names the worst element.

    The float32 epilogue rounds a handful of times (8 half-units cover it, the activation's 2e-7 included);
    ``terms`` is the length of a float32 sum, whose error grows as its square root.
    """
    assert tuple(y.shape) == expected.shape
    if y.numel() == 0:
        return
    got = y.to(torch.float64).numpy()
    fp32 = ROUNDOFF[torch.float32] * (8 + 2 * math.sqrt(terms)) * (magnitude + np.abs(expected))
    tiny = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    allowed = fp32 + 2 * ROUNDOFF[dtype] * np.abs(expected) * (dtype != torch.float32) + tiny
    excess = np.abs(got - expected) / allowed
    # What the dtype rounds to infinity is infinite.
    overflow = torch.finfo(dtype).max * (1 + ROUNDOFF[dtype] / 2)
    excess[np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) + allowed >= overflow)] = 0
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 1, (
        f"worst at {tuple(map(int, worst))}: got {got[worst]!r}, expected {expected[worst]!r}, "
        f"{excess[worst]:.2f} x the error allowed"
    )
