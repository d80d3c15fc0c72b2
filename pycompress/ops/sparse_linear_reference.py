"""Sparse linear layer in torch: the specification that every kernel is tested against. Any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress.ops.int8_matmul_reference import Call as Int8Call
from pycompress.ops.int8_matmul_reference import apply_activation, reference_int8_linear
from pycompress.ops.sparse_linear_weight import sparse_to_dense

BITMAP, INDEX, DENSE = range(3)
FORMAT_CODES = {"bitmap": BITMAP, "index": INDEX, "dense": DENSE}
MOST = 2**62  # the last entry of a choice: any number of tokens
BITMAP_TOKENS = 8  # the bitmap is expanded once for so many tokens; the index form wants more


@dataclass(frozen=True)
class Call:
    """Checked arguments of one call. ``x`` is ``(..., K)``; see ``sparse_linear_weight.py`` for the weight."""

    x: Tensor
    bitmap: Tensor
    values: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    row_start: Tensor | None
    index: Tensor | None
    dense: Tensor | None
    choice: Sequence[int]
    activation: str

    @property
    def tokens(self) -> int:
        return self.x.shape[:-1].numel()

    def format(self) -> int:
        """BITMAP, INDEX or DENSE, as ``choice`` says for this number of tokens."""
        m = self.tokens
        if not self.choice:
            return BITMAP if m <= BITMAP_TOKENS or self.index is None else INDEX
        for most, code in zip(self.choice[::2], self.choice[1::2], strict=True):
            if m <= most:
                return code
        return self.choice[-1]

    def int8(self, weight: Tensor) -> Int8Call:
        """The same call of int8_linear, with the unpacked or packed weight."""
        assert self.weight_scale is not None, "checked before"
        return Int8Call(self.x, weight, self.weight_scale, self.bias, "dynamic", None, None, self.activation)


def reference_sparse_linear(call: Call) -> Tensor:
    """The weight unpacked, and the product in float32 (int8: exact integer sums). Any device."""
    weight = sparse_to_dense(call.bitmap, call.values, call.x.shape[-1])
    if weight.dtype == torch.int8:
        return reference_int8_linear(call.int8(weight))
    y = F.linear(call.x.float(), weight.float(), None if call.bias is None else call.bias.float())
    return apply_activation(y, call.activation).to(call.x.dtype)


def dense_dtype(weight: torch.dtype, x: torch.dtype) -> torch.dtype:
    """What the dense form of a float weight is kept in: float32, unless weight and x are of one 16-bit type."""
    return weight if weight == x else torch.float32


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """What ``nn.Linear`` computes, with torch's own kernels, for any x; where x and weight differ, in float32."""
    if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype):  # the usual case, without conversions
        return apply_activation(F.linear(x, weight, bias), activation)
    dtype = dense_dtype(weight.dtype, x.dtype)
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return apply_activation(y, activation).to(x.dtype)
