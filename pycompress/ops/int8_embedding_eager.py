"""The short way from ``Int8Embedding`` to the native kernel, for plain eager mode.

The dispatcher and the checks take 8 us, where the kernel finds a token in 0.1 us: a plan holds a table, checked once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress._native import DTYPE_CODES
from pycompress.ops.int8_embedding import check_table, plan_of, run_rows


class TablePlan:
    """A table and its scales, checked once.

    :meth:`run` computes what the operator computes, or answers None where it is not sure; the operator then runs, or
    says what is wrong. Ask :func:`pycompress.ops.eager.is_plain_eager` and :meth:`is_for` first.
    """

    __slots__ = ("_addresses", "_d", "_held", "_native", "_tensors")

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        check_table("int8_embedding", weight, scale)
        self._tensors = weight, scale
        # Held, so that no other tensor can come to lie at these addresses while the plan compares them.
        self._held = weight.detach(), scale.detach()
        self._addresses = weight.data_ptr(), scale.data_ptr()
        self._d, self._native = weight.shape[1], plan_of(weight, scale)

    @classmethod
    def make(cls, weight: Tensor, scale: Tensor) -> TablePlan | None:
        """A plan for this table, or None where it is not for the native kernel."""
        return cls(weight, scale) if weight.is_cpu and scale.is_cpu else None

    def is_for(self, weight: Tensor | None, scale: Tensor | None) -> bool:
        """Whether these are the plan's tensors still, in the memory that they had then (``.data`` may move them)."""
        if weight is not self._tensors[0] or scale is not self._tensors[1] or weight is None or scale is None:
            return False
        return (weight.data_ptr(), scale.data_ptr()) == self._addresses

    def run(self, indices: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The rows, or None where this call is the operator's."""
        if indices.dtype not in (torch.int64, torch.int32) or dtype not in DTYPE_CODES or not indices.is_cpu:
            return None
        return run_rows(self._native, indices, self._d, dtype) if indices.layout is torch.strided else None
