"""The sparse linear layer once more, in numpy and float64, sharing no code with the package; and weights for it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests import oracle

FORMS = ("bitmap", "index", "dense")  # the position is the code in a choice
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY_M = 2**62


class Layer(NamedTuple):
    """A pruned weight, its mask, and what goes to the operator."""

    weight: Tensor  # (N, K), unmasked
    mask: Tensor
    bitmap: Tensor
    values: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.bitmap, self.values, self.scale, self.bias


def block_mask(n: int, k: int, sparsity: float, block: tuple[int, int] = (1, 1)) -> Tensor:
    """Random blocks, ragged at the edges."""
    rows, cols = block
    kept = torch.rand(-(-n // rows), -(-k // cols)) >= sparsity
    return kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k].contiguous()


def pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmap and values as the format is documented, by numpy."""
    bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits.reshape(len(mask), -(-mask.shape[1] // 8))), weight[mask]


def layer(
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    sparsity: float = 0.7,
    block: tuple[int, int] = (1, 1),
    bias: bool = True,
    mask: Tensor | None = None,
) -> Layer:
    mask = block_mask(n, k, sparsity, block) if mask is None else mask
    if dtype == torch.int8:
        weight, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) * 0.02 + 0.001
    else:
        weight, scale = torch.randn(n, k).to(dtype), None
    return Layer(weight, mask, *pack(weight, mask), scale, torch.randn(n) if bias else None)


def sparse_linear(
    x: Tensor, bitmap: Tensor, values: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str = "none"
) -> tuple[np.ndarray, np.ndarray, int]:
    """float64 result, the sum of the magnitudes that met in it, and how long the longest float sum is."""
    k = x.shape[1]
    bits = np.unpackbits(bitmap.numpy(), axis=1, bitorder="little")
    assert not bits[:, k:].any()
    mask = bits[:, :k].astype(bool)
    if scale is not None:
        weight = np.zeros(mask.shape, np.int8)
        weight[mask] = values.numpy()
        expected, magnitude = oracle.int8_linear(x, torch.from_numpy(weight), scale, bias, "dynamic", activation)
        return expected, magnitude, 0
    w = np.zeros(mask.shape)
    w[mask] = values.to(torch.float64).numpy()
    v = x.to(torch.float64).numpy()
    b = np.zeros(len(w)) if bias is None else bias.to(torch.float64).numpy()
    magnitude = np.abs(v) @ np.abs(w).T + np.abs(b)
    return oracle.activate(v @ w.T + b, activation), magnitude, int(mask.sum(1).max(initial=0))


def assert_close(y: Tensor, x: Tensor, made: Layer, activation: str = "none", form: str = "bitmap") -> None:
    """Against float64, within the roundings of float32 sums and of y's dtype."""
    expected, magnitude, terms = sparse_linear(x, *made.args, activation)
    assert y.dtype == x.dtype
    if form == "dense" and x.dtype == made.values.dtype == torch.bfloat16 and y.numel():
        # torch's own bfloat16 product: it rounds the bias, and the sum before the activation.
        error = np.abs(y.double().numpy() - expected)
        assert (error <= 4 * oracle.ROUNDOFF[torch.bfloat16] * (magnitude + np.abs(expected)) + 1e-30).all()
        return
    oracle.assert_close(y, expected, magnitude, x.dtype, terms)
