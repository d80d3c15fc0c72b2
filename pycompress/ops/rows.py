"""How a tensor of any leading dimensions is told to a native kernel: as rows in two levels."""

from __future__ import annotations

from torch import Tensor

from pycompress.codes import RowLayout
from pycompress.codes import row_layout as of_strides


def row_layout(x: Tensor) -> tuple[Tensor, RowLayout]:
    """x and (M, K, inner_rows, outer_stride, row_stride, col_stride); copied only if its rows need three levels."""
    k = x.shape[-1]
    if x.is_contiguous():
        m = x.numel() // k if k else x.shape[:-1].numel()
        return x, (m, k, max(m, 1), 0, k, 1)
    layout = of_strides(x.shape, x.stride())
    return row_layout(x.contiguous()) if layout is None else (x, layout)
