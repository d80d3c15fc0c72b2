"""How a tensor of any leading dimensions is told to a native kernel: as rows in two levels."""

from __future__ import annotations

from torch import Tensor


def row_layout(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int, int]]:
    """x and (M, K, inner_rows, outer_stride, row_stride, col_stride); copied only if its rows need three levels."""
    k = x.shape[-1]
    if x.is_contiguous():
        m = x.numel() // k if k else x.shape[:-1].numel()
        return x, (m, k, max(m, 1), 0, k, 1)
    levels: list[tuple[int, int]] = []  # (size, stride) of the leading dimensions, adjacent ones merged
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == stride * size:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return row_layout(x.contiguous())
    inner, row_stride = levels[-1] if levels else (1, 0)
    outer, outer_stride = levels[0] if len(levels) == 2 else (1, 0)
    return x, (inner * outer, k, max(inner, 1), outer_stride, row_stride, x.stride(-1))
