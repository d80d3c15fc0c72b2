"""A linear layer in any of quantize_'s modes: which class computes a mode, and how one is made."""

from __future__ import annotations

import torch
from torch import nn

from pycompress.nn.int4_linear import Int4Linear
from pycompress.nn.int8_linear import Int8Linear
from pycompress.ops import MODES

BIT4_MODES = ("int4", "nf4")
LINEAR_MODES = (*MODES, *BIT4_MODES)


def quantized(
    linear: nn.Module,
    mode: str,
    activation: str | None = None,
    *,
    input_range: tuple[float, float] | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    backend: str = "auto",
) -> Int8Linear | Int4Linear:
    """The float layer in this mode; group_size and symmetric are of the 4-bit modes. Raises as their from_float do."""
    if mode not in BIT4_MODES:
        return Int8Linear.from_float(linear, mode, activation, input_range=input_range, backend=backend)
    return Int4Linear.from_float(linear, mode, activation, group_size=group_size, symmetric=symmetric, backend=backend)


def without_weights(
    in_features: int,
    out_features: int,
    bias: bool,
    mode: str,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> Int8Linear | Int4Linear:
    """The same layer before its state is loaded."""
    if mode not in BIT4_MODES:
        return Int8Linear(in_features, out_features, bias, mode=mode, backend=backend, device=device)
    return Int4Linear(
        in_features, out_features, bias, format=mode,
        group_size=group_size, symmetric=symmetric, backend=backend, device=device,
    )  # fmt: skip
