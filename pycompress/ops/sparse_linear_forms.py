"""The index form on a GPU: blocks, or two of every four, made with torch on any device.

A 1-D uint8 tensor on the device of the weight. A header of 16 int64, then sections that start at multiples of 128:

    | header 128 B | A | B | values |

======  ==========================================================  =============  ===================================
kind    A                                                           B              values
======  ==========================================================  =============  ===================================
block   int32 (R + 1): where the blocks of a row of blocks begin    int32 (count)  (count, block, block), zeros where a
        R = ceil(N / block)                                         their columns  weight is pruned or past N or K
2:4     see sparse_linear_cuda.py
======  ==========================================================  =============  ===================================

It is derived and belongs to no file. Kernels never read the header: the host keeps what it says beside the tensor, so
that a call waits for no device. A form that the host has not seen, or that was edited in place, is read and checked
once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pycompress._native import has_values
from pycompress.ops.sparse_linear_weight import WEIGHT_TYPES, row_starts, sparse_mask, sparse_to_dense

BLOCK, TWO_OF_FOUR = 1, 2  # kinds
KIND_NAMES = {BLOCK: "block", TWO_OF_FOUR: "2:4"}
BLOCKS = (64, 32, 16)  # a larger one wastes less of a tensor core, and needs fewer columns told
MOSTLY_FULL = 0.75  # of its places a kept block must fill so much on average, as its zeros are multiplied too
_MAGIC, _VERSION = 0x4D524F4653504350, 1
_WORDS, _ALIGNMENT = 16, 128
_SAY = "sparse_linear: index"
_AGAIN = "make it again with pack_blocks, pack_2to4 or by moving the layer"


@dataclass(frozen=True)
class Header:
    """What the header says. starts: of the sections, in bytes. size: of the whole tensor. more: of the kind's own."""

    kind: int
    weight_type: int
    n: int
    k: int
    nnz: int
    block: int
    count: int
    start_a: int
    start_b: int
    start_values: int
    size: int
    more: tuple[int, int, int] = (0, 0, 0)

    def words(self) -> list[int]:
        *fields, more = astuple(self)
        return [_MAGIC, _VERSION, *fields, *more]

    @property
    def dtype(self) -> torch.dtype:
        return next(dtype for dtype, code in WEIGHT_TYPES.items() if code == self.weight_type)

    @property
    def rows(self) -> int:
        """Rows of blocks."""
        return -(-self.n // self.block)


# ---- headers, and what is known of a form -----------------------------------------------------------------------

_Check = Callable[[Tensor, Header], str | None]
_checks: dict[int, _Check] = {}
_known = WeakTensorKeyDictionary()  # form -> (version, Header)


def register_check(kind: int, check: _Check) -> None:
    """check(form, header): what is wrong with the sections of a form of this kind, or None. It may wait for them.

    To be called by the module that makes such forms.
    """
    _checks[kind] = check


def new_form(header: Header, sizes: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Header]:
    """Memory for sections of these sizes in bytes, the header written and known. The caller fills the sections."""
    starts = [_WORDS * 8]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
    header = replace(header, start_a=starts[0], start_b=starts[1], start_values=starts[2], size=starts[3])
    form = torch.zeros(header.size, dtype=torch.uint8, device=device)
    form[: _WORDS * 8].view(torch.int64).copy_(torch.tensor(header.words()))
    return form, header


def known(form: Tensor, header: Header) -> Tensor:
    """The form, remembered as sound: to be called when its sections are filled."""
    _known[form] = (_version(form), header)
    return form


def form_header(form: Tensor) -> Header:
    """What a form holds. Read and checked at first sight, which waits for the device; then remembered.

    Raises:
        ValueError: a damaged form.
        RuntimeError: at first sight of it while a CUDA graph is captured.
    """
    found: tuple[int, Header] | None = _known.get(form)
    if found is not None and found[0] == _version(form):
        return found[1]
    if form.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{_SAY} is new and cannot be read while a CUDA graph is captured; call once before")
    header = _read(form)
    wrong = _checks[header.kind](form, header)
    if wrong is not None:
        raise ValueError(f"{_SAY} is damaged: {wrong}; {_AGAIN}")
    known(form, header)
    return header


def _version(form: Tensor) -> int:
    return 0 if form.is_inference() else form._version  # inference tensors do not count their changes


def _read(form: Tensor) -> Header:
    if form.dtype != torch.uint8 or form.dim() != 1 or not form.is_contiguous() or form.numel() < _WORDS * 8:
        raise ValueError(f"{_SAY} is {form.dtype} {tuple(form.shape)}, which holds no header; {_AGAIN}")
    if form.storage_offset() % 16:
        raise ValueError(f"{_SAY} does not begin at a multiple of 16 bytes of its memory; pass a clone of it")
    words = form[: _WORDS * 8].view(torch.int64).tolist()
    if words[:2] != [_MAGIC, _VERSION]:
        raise ValueError(f"{_SAY} has no header of this version; {_AGAIN}")
    kind, weight_type, n, k, nnz, block, count, a, b, values, size, *more = words[2:]
    header = Header(kind, weight_type, n, k, nnz, block, count, a, b, values, size, (more[0], more[1], more[2]))
    starts = a, b, values, size
    sound = (
        kind in KIND_NAMES
        and weight_type in WEIGHT_TYPES.values()
        and min(n, k, nnz, count) >= 0
        and block in (BLOCKS if kind == BLOCK else (4,))
        and starts[0] == _WORDS * 8
        and all(a <= b for a, b in itertools.pairwise(starts))
        and not any(start % _ALIGNMENT for start in starts)
        and size == form.numel()
    )
    if not sound:
        raise ValueError(f"{_SAY} has a damaged header; {_AGAIN}")
    return header


def check_form(form: Tensor, bitmap: Tensor, values: Tensor, k: int) -> Header:
    """The header of a form that is of this weight, as far as that can be told without waiting for a device.

    Raises:
        ValueError: it is damaged, or of another weight.
    """
    header = form_header(form)
    weight = (bitmap.shape[0], k, values.numel(), WEIGHT_TYPES[values.dtype])
    if (header.n, header.k, header.nnz, header.weight_type) != weight:
        raise ValueError(
            f"{_SAY} is of a weight N={header.n}, K={header.k} with {header.nnz} values of {header.dtype}, this one is "
            f"N={bitmap.shape[0]}, K={k} with {values.numel()} of {values.dtype}; {_AGAIN}"
        )
    return header


# ---- blocks -----------------------------------------------------------------------------------------------------


def pack_blocks(bitmap: Tensor, values: Tensor, k: int, block: int) -> Tensor:
    """The form of kind "block" of a weight, on its device.

    Args:
        bitmap, values: a weight ``(N, k)``, see :func:`sparse_from_dense`; float32, bfloat16, float16 or int8.
        block: 16, 32 or 64 rows and columns; a block that holds a kept weight is stored whole.

    Raises:
        ValueError: another block, a damaged weight, or more than 2**31 - 1 blocks.
    """
    if block not in BLOCKS:
        raise ValueError(f"pack_blocks: block={block}, expected one of {', '.join(map(str, BLOCKS))}")
    dense = _blocked(sparse_to_dense(bitmap, values, k), block)
    kept = _blocked(sparse_mask(bitmap, k), block).any(3).any(1)  # (R, C)
    place = kept.nonzero()
    count, rows = place.shape[0], kept.shape[0]
    if count >= 2**31:
        raise ValueError(f"pack_blocks: {count} blocks are kept, more than int32 can count; take a larger block")
    header = Header(
        BLOCK, WEIGHT_TYPES[values.dtype], bitmap.shape[0], k, values.numel(), block, count, 0, 0, 0, 0
    )  # fmt: skip
    sizes = 4 * (rows + 1), 4 * count, count * block * block * values.element_size()
    form, header = new_form(header, sizes, values.device)
    pointer, column, stored = block_sections(form, header)
    pointer[1:] = kept.sum(1).cumsum(0)
    column.copy_(place[:, 1])
    stored.copy_(dense.transpose(1, 2)[place[:, 0], place[:, 1]])
    return known(form, header)


def _blocked(matrix: Tensor, block: int) -> Tensor:
    """(N, K) as (R, block, C, block), zeros past N and K."""
    n, k = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -k % block, 0, -n % block))
    return padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)


def block_sections(form: Tensor, header: Header) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the sections: int32 (R + 1), int32 (count), values (count, block, block)."""
    cells = header.block * header.block

    def part(start: int, elements: int, dtype: torch.dtype) -> Tensor:
        return form[start : start + elements * dtype.itemsize].view(dtype)

    values = part(header.start_values, header.count * cells, header.dtype)
    return (
        part(header.start_a, header.rows + 1, torch.int32),
        part(header.start_b, header.count, torch.int32),
        values.view(header.count, header.block, header.block),
    )


def _check_blocks(form: Tensor, header: Header) -> str | None:
    """Pointers that ascend to the count, columns that ascend within K: the kernel trusts them."""
    columns = -(-header.k // header.block)
    needed = (
        (header.start_a, header.start_b, 4 * (header.rows + 1)),
        (header.start_b, header.start_values, 4 * header.count),
        (header.start_values, header.size, header.count * header.block**2 * header.dtype.itemsize),
    )
    if header.count > header.rows * columns or any(end - start < size for start, end, size in needed):
        return f"it tells of {header.count} blocks, which it cannot hold"
    pointer, column, _ = (part.to("cpu", torch.int64) for part in block_sections(form, header))
    if pointer[0] != 0 or pointer[-1] != header.count or (pointer.diff() < 0).any():
        return "the rows of blocks do not begin where they should"
    if header.count and (column.min() < 0 or column.max() >= columns):
        return f"a block is past K={header.k}"
    return None


register_check(BLOCK, _check_blocks)


# ---- structure --------------------------------------------------------------------------------------------------


def kept_blocks(bitmap: Tensor, k: int, block: int) -> int:
    """How many blocks of this size hold a kept weight."""
    return int(_blocked(sparse_mask(bitmap, k), block).any(3).any(1).sum())


def block_of(bitmap: Tensor, k: int) -> int | None:
    """The largest block whose kept blocks are mostly full, or None: a weight without blocks, or without weights."""
    n = bitmap.shape[0]
    nnz = int(row_starts(bitmap, k)[-1])
    if nnz == 0 or nnz == n * k:  # a full weight is dense, not a block
        return None
    for block in BLOCKS:
        kept = _blocked(sparse_mask(bitmap, k), block).any(3).any(1)
        # Of a block at the edge count the places within N and K.
        height, width = (_extents(size, block, bitmap.device) for size in (n, k))
        places = int(height @ kept.to(torch.float64) @ width)
        if nnz >= MOSTLY_FULL * places:
            return block
    return None


def _extents(size: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, size, block, dtype=torch.float64, device=device)
    return (size - starts).clamp_max(block)


def is_2to4(bitmap: Tensor, k: int) -> bool:
    """Whether no row keeps more than two of four neighbouring columns 4 i to 4 i + 3."""
    if not has_values(bitmap):
        return False
    twos = bitmap - ((bitmap >> 1) & 0x55)
    fours = (twos & 0x33) + ((twos >> 2) & 0x33)  # each half of a byte: how many of its bits are set
    return not bool(((fours & 0x0F) > 2).any() or ((fours >> 4) > 2).any())
