"""Pruned weights: bitmap and values, their checks, and the forms that the kernels derive from them.

======  ===========  ================================================================================================
bitmap  (N, ceil(K/8)) uint8   bit ``k % 8`` of byte ``k // 8`` of row n is 1 where the weight is kept; 0 past K
values  (nnz,)                 the kept weights, row after row, k ascending: ``weight[mask]``; one of them may be 0
======  ===========  ================================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import has_values
from pycompress.ops.int8_matmul_weight import aligned

SPARSE_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
}  # fmt: skip
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float16: 3}  # 3: GPU kernels only
_DTYPE_NAMES = "float32, bfloat16, float16 or int8"


# ---- bitmap and values -----------------------------------------------------------------------------------------


def sparse_from_dense(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmap and values of ``weight ⊙ mask``.

    Args:
        weight: ``(N, K)`` float32, bfloat16, float16 or int8.
        mask: ``(N, K)`` bool, True where the weight is kept.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    if weight.dim() != 2 or weight.dtype not in WEIGHT_TYPES:
        raise ValueError(
            f"sparse_from_dense: expected a {_DTYPE_NAMES} (N, K) weight, got {weight.dtype} {tuple(weight.shape)}"
        )
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"sparse_from_dense: the mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
            f"{tuple(weight.shape)}, True where the weight is kept"
        )
    if mask.device != weight.device:
        raise ValueError(f"sparse_from_dense: the weight is on {weight.device}, the mask on {mask.device}")
    n, k = weight.shape
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -k % 8)).view(n, -(-k // 8), 8)
    bitmap = (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)
    return bitmap, weight.detach()[mask]


def sparse_mask(bitmap: Tensor, k: int) -> Tensor:
    """The mask ``(N, K)``, bool."""
    bits = (bitmap[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bitmap.device)) & 1
    return bits.reshape(bitmap.shape[0], 8 * bitmap.shape[1])[:, :k].bool()


def sparse_to_dense(bitmap: Tensor, values: Tensor, k: int) -> Tensor:
    """``(N, K)`` in the values' dtype: +0.0 where pruned.

    Raises:
        ValueError: as :func:`validate_sparse`.
    """
    if not has_values(bitmap):
        return values.new_zeros(bitmap.shape[0], k)
    validate_sparse(bitmap, values, bitmap.shape[0], k)
    return expand(bitmap, values, k)


def expand(bitmap: Tensor, values: Tensor, k: int) -> Tensor:
    """The same of a weight that was checked before, without waiting for its device."""
    return values.new_zeros(bitmap.shape[0], k).masked_scatter_(sparse_mask(bitmap, k), values)


def row_starts(bitmap: Tensor, k: int) -> Tensor:
    """int64 ``(N + 1,)``: where each row's values begin, and at last their number.

    Raises:
        ValueError: a bit past K is set, or a meta or fake tensor.
    """
    if not has_values(bitmap):
        raise ValueError("sparse_linear: the bitmap is a meta or fake tensor, without values; load them first")
    n = bitmap.shape[0]
    starts = torch.zeros(n + 1, dtype=torch.int64, device=bitmap.device)
    if bitmap.device.type == "cpu":
        bitmap = bitmap.contiguous()
        _C.sparse_scan(bitmap.data_ptr(), n, k, starts.data_ptr())
        return starts
    if k % 8 and (bitmap[:, -1] >> (k % 8)).any():
        raise ValueError(f"sparse_linear: the bitmap has bits past K={k}; it is damaged or of another layer")
    twos = bitmap - ((bitmap >> 1) & 0x55)
    fours = (twos & 0x33) + ((twos >> 2) & 0x33)
    torch.cumsum(((fours + (fours >> 4)) & 0x0F).sum(1, dtype=torch.int64), 0, out=starts[1:])
    return starts


def validate_sparse(bitmap: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    """Check that bitmap and values are a weight ``(n, k)``, and return its :func:`row_starts`.

    Raises:
        ValueError: wrong shapes, dtypes or devices, a bit past K, or a number of values that is not the number of bits.
    """
    shape = (n, -(-k // 8))
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != shape:
        raise ValueError(
            f"sparse_linear: the bitmap is {bitmap.dtype} {tuple(bitmap.shape)}, expected torch.uint8 {shape} "
            f"for N={n}, K={k}"
        )
    if values.dtype not in WEIGHT_TYPES or values.dim() != 1:
        raise ValueError(
            f"sparse_linear: values are {values.dtype} {tuple(values.shape)}, expected {_DTYPE_NAMES} (nnz,)"
        )
    if values.device != bitmap.device or values.layout is not torch.strided:
        raise ValueError(
            f"sparse_linear: values are {values.layout} on {values.device}, expected dense ones on {bitmap.device} "
            "like the bitmap"
        )
    starts = row_starts(bitmap, k)
    if int(starts[-1]) != values.numel():
        raise ValueError(
            f"sparse_linear: the bitmap keeps {int(starts[-1])} weights but there are {values.numel()} values; "
            "one of them is damaged or of another layer"
        )
    return starts


# ---- the index form -----------------------------------------------------------------------------------------------


def pack_index(bitmap: Tensor, values: Tensor, row_start: Tensor, k: int) -> Tensor | None:
    """The index form, 1-D uint8, for the best native kernel of this machine; None where there is none for this shape.

    bitmap, values, row_start: a checked weight on the CPU, see :func:`validate_sparse`. The form carries a header
    and belongs to this machine's instruction set: keep bitmap and values in files.
    """
    n = bitmap.shape[0]
    bitmap, values, row_start = bitmap.contiguous(), values.contiguous(), row_start.contiguous()
    args = (bitmap.data_ptr(), values.data_ptr(), row_start.data_ptr(), n, k, WEIGHT_TYPES[values.dtype])
    packed = bytearray(_C.sparse_pack_index(*args))
    return aligned(torch.frombuffer(packed, dtype=torch.uint8)) if packed else None


def index_info(index: Tensor) -> dict[str, Any]:
    """What the header says: n, k, nnz, layout, and the kernel that reads it, "" where this machine has none.

    Raises:
        ValueError: a damaged header.
    """
    source = aligned(index)
    return dict(_C.sparse_index_info(source.data_ptr(), source.numel()))


def runs_here(index: Tensor) -> bool:
    """Whether this machine, under PYCOMPRESS_ISA, has a kernel for it: it may come from another.

    Raises:
        ValueError: a damaged header.
    """
    return index_info(index)["kernel"] != ""


def bitmap_kernel_name(dtype: torch.dtype) -> str:
    """Name of the native kernel for a few tokens, by the weight's dtype, e.g. ``sparse_linear_bitmap_8_avx512``."""
    return str(_C.sparse_bitmap_kernel_name(WEIGHT_TYPES[dtype]))


def sparse_kernel_names(dtype: torch.dtype) -> tuple[str, str]:
    """Names of the native kernels for the bitmap and the index form of a weight of this dtype, on this machine."""
    one = torch.ones(1, 1, device="cpu")
    bitmap, values = sparse_from_dense(one.to(dtype), one.bool())
    index = pack_index(bitmap, values, row_starts(bitmap, 1), 1)
    assert index is not None, "a weight so small has one"
    return bitmap_kernel_name(dtype), str(index_info(index)["kernel"])
