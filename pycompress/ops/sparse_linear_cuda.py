"""The CUDA backend of sparse_linear: tensors to addresses, and the form for weights with two of every four.

Kernels and contract, the layout of the form included: ``csrc/sparse_linear/cuda.h``. In the form (header and sections:
``sparse_linear_forms.py``) section B holds the metadata and the values are the tiles; A is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress import gpu
from pycompress._native import DTYPE_CODES
from pycompress.ops.linear_common import ACTIVATION_CODES
from pycompress.ops.rows import row_layout
from pycompress.ops.sparse_linear_forms import (
    TWO_OF_FOUR,
    Header,
    form_header,
    is_2to4,
    known,
    new_form,
    register_check,
)
from pycompress.ops.sparse_linear_reference import INDEX, Call
from pycompress.ops.sparse_linear_weight import WEIGHT_TYPES, sparse_to_dense

_ROWS, _TILE_BYTES = 16, 512  # of a tile: outputs; bytes of kept values
MOST_INT8_K = 2**17  # sums of products of bytes stay within int32


def cuda_sparse_missing(call: Call) -> str | None:
    """Why the CUDA kernels cannot take a call, or None."""
    reason = gpu.cuda_missing(call.x)
    if reason is not None:
        return reason
    if call.format() == INDEX and call.index is not None and form_header(call.index).kind != TWO_OF_FOUR:
        return "its index form holds blocks, which the Triton kernels multiply"
    return None


def cuda_sparse_linear(call: Call) -> Tensor:
    """The CUDA backend: checked arguments with ``row_start``, on x's device and its current stream.

    The 2:4 form of a float16 or bfloat16 weight takes x of the same dtype; for another, the weight is read as bitmap,
    eight tokens at a time. One allocation beside the result, none by the kernels, no synchronisation: a CUDA graph can
    capture the call.
    """
    x, layout = row_layout(call.x)
    n, k = call.bitmap.shape[0], call.x.shape[-1]
    bitmap, values, bias, scale = _from(call.bitmap, 4), _from(call.values, 16), call.bias, call.weight_scale
    row_start, metadata, tiles = call.row_start, 0, 0
    assert row_start is not None, "made before, where it was not given"
    form = None
    if call.format() == INDEX and call.index is not None and values.dtype in (torch.int8, x.dtype):
        form = _from(call.index, 16)
        header = form_header(call.index)
        metadata, tiles = form.data_ptr() + header.start_b, form.data_ptr() + header.start_values
    plan = gpu.cuda_module().SparsePlan(
        WEIGHT_TYPES[values.dtype],
        n,
        k,
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        ACTIVATION_CODES[call.activation],
        bitmap.data_ptr(),
        values.data_ptr(),
        values.numel(),
        row_start.data_ptr(),
        metadata,
        tiles,
    )
    dtype = DTYPE_CODES[x.dtype]
    size = plan.workspace_bytes(x.data_ptr(), layout, dtype)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    y = torch.empty((*call.x.shape[:-1], n), dtype=x.dtype, device=x.device)
    plan.run(x.data_ptr(), layout, dtype, y.data_ptr(), workspace.data_ptr(), size, gpu.place(x))
    return y


def _from(tensor: Tensor, alignment: int) -> Tensor:
    """The tensor where its memory begins at a multiple of so many bytes, else a copy: new memory does."""
    return tensor if tensor.data_ptr() % alignment == 0 else tensor.clone()


# ---- the 2:4 form -------------------------------------------------------------------------------------------------


def _places() -> Tensor:
    """(16, 2): for four bits of a bitmap the places of the kept columns, ascending; free ones where fewer are kept."""
    rows = []
    for bits in range(16):
        kept = [place for place in range(4) if bits >> place & 1]
        free = [place for place in range(4) if not bits >> place & 1]
        rows.append(sorted((kept + free)[:2]))
    return torch.tensor(rows, device="cpu")


def pack_2to4(bitmap: Tensor, values: Tensor, k: int) -> Tensor | None:
    """The form of kind "2:4" of a weight, on its device.

    None where there is none: float32 values, more than two kept of some columns 4 i to 4 i + 3, or int8 with
    K > 131072.

    Raises:
        ValueError: a damaged weight.
    """
    if values.dtype == torch.float32 or (values.dtype == torch.int8 and k > MOST_INT8_K) or not is_2to4(bitmap, k):
        return None
    n, int8 = bitmap.shape[0], values.dtype == torch.int8
    step = _step(values.dtype)
    height, steps = -(-n // _ROWS), -(-k // step)
    below, right = -n % _ROWS, -k % step
    bits = torch.stack((bitmap & 15, bitmap >> 4), 2).view(n, 2 * bitmap.shape[1])  # four columns each
    bits = F.pad(bits[:, : -(-k // 4)], (0, steps * step // 4 - -(-k // 4), 0, below))
    places = _places().to(values.device)[bits.to(torch.int64)]  # (rows, groups of 4, 2)
    dense = F.pad(sparse_to_dense(bitmap, values, k), (0, right, 0, below)).view(16 * height, steps * step // 4, 4)
    kept = dense.gather(2, places)

    header = Header(TWO_OF_FOUR, WEIGHT_TYPES[values.dtype], n, k, values.numel(), 4, height * steps, 0, 0, 0, 0)
    form, header = new_form(header, (0, *_sizes(header)), values.device)
    words, tiles = sections(form, header)
    # Rows g and g + 8 of a tile; bytes 4 t of either half of its row: registers (half, row) of lane (g, t).
    lanes = kept.view(torch.uint8).view(height, 2, 8, steps, 2, 4, 4).permute(0, 3, 2, 5, 4, 1, 6)
    tiles.copy_(lanes.reshape(tiles.shape))
    nibbles = places[..., 0] | places[..., 1] << 2
    shifts = 4 * torch.arange(8 if int8 else 4, device=values.device)
    parts = (nibbles.view(height, 2, 8, steps, 2, len(shifts)) << shifts).sum(5)  # (height, row, g, steps, half)
    both = parts.permute(0, 3, 2, 4, 1) if int8 else (parts[:, 0] | parts[:, 1] << 16).permute(0, 2, 1, 3)
    words.copy_(both.reshape(words.shape))
    return known(form, header)


def _step(dtype: torch.dtype) -> int:
    """Columns of a tile."""
    return 64 if dtype == torch.int8 else 32


def _sizes(header: Header) -> tuple[int, int]:
    """Bytes of the metadata and of the tiles."""
    return header.count * (128 if header.dtype == torch.int8 else 64), header.count * _TILE_BYTES


def sections(form: Tensor, header: Header) -> tuple[Tensor, Tensor]:
    """Views: metadata int32 (tiles, 32 for int8, else 16), tiles uint8 (tiles, 512)."""
    metadata, tiles = _sizes(header)
    words = form[header.start_b : header.start_b + metadata].view(torch.int32)
    held = form[header.start_values : header.start_values + tiles]
    return words.view(header.count, -1) if header.count else words.view(0, 16), held.view(header.count, _TILE_BYTES)


def _check(form: Tensor, header: Header) -> str | None:
    """As many tiles as N and K ask for, and of each four two different places, ascending: what mma.sp demands."""
    count = -(-header.n // _ROWS) * -(-header.k // _step(header.dtype))
    metadata, tiles = _sizes(header)
    if header.dtype == torch.float32:
        return "float32 has no 2:4 form"
    if header.count != count or header.start_b + metadata > header.start_values:
        return f"it tells of {header.count} tiles, N={header.n} and K={header.k} make {count}"
    if header.start_values + tiles > header.size:
        return f"it tells of {header.count} tiles, which it cannot hold"
    pairs = form[header.start_b : header.start_b + metadata]
    ascending = ((pairs & 3) < (pairs >> 2 & 3)) & ((pairs >> 4 & 3) < (pairs >> 6))
    return None if bool(ascending.all()) else "its metadata name a column twice"


register_check(TWO_OF_FOUR, _check)
