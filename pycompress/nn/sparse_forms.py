"""The forms of its weight that a ``SparseLinear`` holds besides bitmap and values: those that its choices name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pycompress import ops
from pycompress.ops.sparse_linear_eager import Forms
from pycompress.ops.sparse_linear_reference import BITMAP, DENSE, INDEX, dense_dtype

if TYPE_CHECKING:
    from pycompress.nn.sparse_linear import SparseLinear


def make_forms(
    state: tuple[Tensor, Tensor, Tensor | None],
    row_start: Tensor,
    choices: Mapping[int, tuple[int, ...]],
    layer: SparseLinear,
) -> Forms:
    """state: checked bitmap, values and scale on the CPU. choices: by number of threads."""
    bitmap, values, _ = state
    k = layer.in_features
    index = dense = None
    if INDEX in _codes(choices):
        index = ops.pack_index(bitmap, values, row_start, k)
        if index is None:  # no list can hold it
            choices = {threads: _without_index(choice, layer.format) for threads, choice in choices.items()}
    if DENSE in _codes(choices):
        dense = ops.sparse_to_dense(bitmap, values, k)
        # bfloat16 is multiplied by bfloat16 only: what x will be, the bias tells.
        like = torch.float32 if layer.bias is None else layer.bias.dtype
        int8 = dense.dtype == torch.int8
        dense = ops.pack_weight(dense) if int8 else dense.to(dense_dtype(dense.dtype, like))
    return Forms(state, row_start, index, dense, choices)


def _codes(choices: Mapping[int, tuple[int, ...]]) -> set[int]:
    return {code for choice in choices.values() for code in choice[1::2]}


def _without_index(choice: tuple[int, ...], format: str) -> tuple[int, ...]:
    """The choice for a weight that has no index form: dense there, or bitmap where the index form was asked for."""
    instead = DENSE if format == "auto" else BITMAP
    codes = [instead if code == INDEX else code for code in choice[1::2]]
    return tuple(value for pair in zip(choice[::2], codes, strict=True) for value in pair)
