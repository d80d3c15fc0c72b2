"""The values of a compact model file: lossless entropy coding with what the standard library has.

Tensors are first taken apart, then what belongs together is coded as one stream:

    plain    values                                                    -> the stream of their dtype
    bits     a bool tensor, or the bitmap of a pruned weight           -> a bit for each block of equal ones -> "bits"
    sparse   a tensor with many zeros                                  -> bits, and the values that are not zero

A stream of elements of e bytes is coded as e planes, one for each byte of an element: of floats the byte with the
exponent says little, those of the mantissa hardly get smaller. Each plane takes the coder that makes it smallest. For
pruned int8 weights that is Huffman codes alone: of MiniLM's, 80 % pruned, they leave 0.935 of the bytes, where the
order-0 entropy is 0.930; deflate with matches leaves 0.936, zstd 22 0.937, lzma 0.941.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pycompress.ops.sparse_linear_weight import sparse_mask
from pycompress.tensor_file import DTYPES, TensorFileError, dtype_name, tensor_bytes

BITS = "bits"
_STEP = 1 << 18  # bytes that are decoded at once
_SHORT = 1 << 18  # bytes on which every coder is tried; lzma takes a second for a million
_PIECES, _PIECE = 16, 1 << 14  # of longer data, whether a search for repetitions is worth its time
_WORTH_SEARCH = 0.99
_SIDES = (64, 32, 16, 8, 4, 2)  # of blocks of equal bits
_LZMA = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 22, "lc": 0, "lp": 0, "pb": 0}]
_WORTH_SPARSE = 0.25  # of zeros: int8 values lose an eighth of their size by them, the bits cost an eighth


# ---- coders ---------------------------------------------------------------------------------------------------------


class Coder(NamedTuple):
    """decode: of the bytes and the length to expect; it makes at most one byte more, and says whether that was all."""

    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes | bytearray, int], tuple[bytes, bool]]


def _deflate(strategy: int) -> Callable[[bytes], bytes]:
    def encode(data: bytes) -> bytes:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        return coder.compress(data) + coder.flush()

    return encode


def _inflate(data: bytes | bytearray, length: int) -> tuple[bytes, bool]:
    coder = zlib.decompressobj(-15)
    return coder.decompress(data, length + 1), coder.eof and not coder.unused_data


def _lzma(data: bytes) -> bytes:
    # Raw: no header, so no length or dictionary size that a file could lie about.
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_LZMA)


def _unlzma(data: bytes | bytearray, length: int) -> tuple[bytes, bool]:
    coder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    return coder.decompress(data, length + 1), coder.eof and not coder.unused_data


# Best first where two give the same size. "huffman" and "deflate" are one format.
CODERS: dict[str, Coder] = {
    "raw": Coder(lambda data: data, lambda data, length: (bytes(data[: length + 1]), len(data) <= length)),
    "huffman": Coder(_deflate(zlib.Z_HUFFMAN_ONLY), _inflate),
    "deflate": Coder(_deflate(zlib.Z_DEFAULT_STRATEGY), _inflate),
    "lzma": Coder(_lzma, _unlzma),
}


def encode_bytes(data: bytes, every: bool = False) -> tuple[str, bytes]:
    """The name of the coder and what it makes of the data. every: try all, however long the data are."""
    names = ["raw", "huffman"]
    if every or len(data) <= _SHORT:
        names = list(CODERS)
    else:
        step = len(data) // _PIECES
        sample = b"".join(data[at * step : at * step + _PIECE] for at in range(_PIECES))
        if len(CODERS["deflate"].encode(sample)) < _WORTH_SEARCH * len(CODERS["huffman"].encode(sample)):
            names.append("deflate")
    coded = {name: CODERS[name].encode(data) for name in names}
    best = min(coded, key=lambda name: len(coded[name]))
    return best, coded[best]


def decode_bytes(name: str, data: bytes | bytearray, length: int, what: str) -> bytes:
    """Raises TensorFileError unless the data decode to exactly `length` bytes; never makes more than one more."""
    if name not in CODERS:
        raise TensorFileError(f"{what} is coded as {name!r}, which this pycompress does not know; update pycompress")
    try:
        decoded, whole = CODERS[name].decode(data, length)
    except (zlib.error, lzma.LZMAError) as error:
        raise TensorFileError(f"{what} is damaged ({error})") from error
    if len(decoded) != length or not whole:
        size = f"{len(decoded)}" if len(decoded) <= length else f"more than {length}"
        raise TensorFileError(f"{what} is damaged: it decodes to {size} bytes, expected {length}")
    return decoded


# ---- bits of a mask -------------------------------------------------------------------------------------------------


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 (ceil(count / 8),): bit i % 8 of byte i // 8 is value i, row after row."""
    bits = mask.detach().flatten().view(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int], what: str) -> Tensor:
    """The bool tensor. Raises TensorFileError where bits behind its end are set."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)).flatten() & 1
    count = math.prod(shape)
    if len(packed) != -(-count // 8) or bool(bits[count:].any()):
        raise TensorFileError(f"the {len(packed)} bytes of bits of {what} do not fit {tuple(shape)}; it is damaged")
    return bits[:count].bool().view(*shape)


def block_of(mask: Tensor) -> tuple[int, int]:
    """The largest block, outputs x inputs, by which the whole mask (N, K) is constant."""
    rows = next((r for r in _SIDES if mask.shape[0] % r == 0 and _is_constant(mask.view(-1, r, mask.shape[1]), 1)), 1)
    thin = mask[::rows]
    columns = next((c for c in _SIDES if thin.shape[1] % c == 0 and _is_constant(thin.view(len(thin), -1, c), 2)), 1)
    return rows, columns


def _is_constant(groups: Tensor, dim: int) -> bool:
    return bool((groups == groups.narrow(dim, 0, 1)).all())


# ---- tensors into parts, and back -----------------------------------------------------------------------------------


@dataclass
class Part:
    """A tensor as it stands in the index of a compact file.

    how: "plain", "bits", "bitmap" or "sparse". block: of bits; kept: values of a sparse one that are not zero;
    columns: of the weight whose bitmap it is.
    """

    dtype: str
    shape: list[int]
    how: str = "plain"
    block: list[int] = field(default_factory=list)
    kept: int = 0
    columns: int = 0

    def to_json(self) -> list[Any]:
        return [self.dtype, self.shape, self.how, *([self.block, self.kept, self.columns] if self.block else [])]

    @classmethod
    def of(cls, value: object, name: str) -> Part:
        """The entry of an index; raises TensorFileError where it is none."""
        try:
            part = cls(*value)  # type: ignore[misc]
            sizes = [*part.shape, *part.block, part.kept, part.columns]
            sound = part.dtype in DTYPES and part.how in ("plain", "bits", "bitmap", "sparse")
            sound = sound and all(type(size) is int and 0 <= size < 2**63 for size in sizes)
            sound = sound and (part.how == "plain" or (len(part.block) == 2 and min(part.block) > 0))
            sound = sound and (part.dtype == "BOOL") == (part.how == "bits")
            if part.how == "bitmap":  # nobody else says how many columns there are
                sound = sound and part.dtype == "U8" and part.shape[1:] == [-(-part.columns // 8)]
        except TypeError:
            sound = False
        if not sound:
            raise TensorFileError(f"the index entry of {name} is {str(value)[:100]}, which is none; it is damaged")
        return part

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def grid(self) -> tuple[int, int]:
        """The number of blocks of its mask, down and across."""
        n, k = _as_matrix(self.shape)
        if self.how == "bitmap":
            k = self.columns
        if n % self.block[0] or k % self.block[1]:
            raise TensorFileError(f"blocks of {self.block} do not fit into {n} x {k}; the file is damaged")
        return n // self.block[0], k // self.block[1]

    def lengths(self) -> dict[str, int]:
        """How many bytes of which stream are this tensor's."""
        found = {}
        if self.how != "plain":
            down, across = self.grid()
            found[BITS] = -(-down * across // 8)
        if self.how in ("plain", "sparse"):
            count = self.count if self.how == "plain" else self.kept
            found[self.dtype] = count * DTYPES[self.dtype].itemsize
        return found


def take_apart(tensor: Tensor, columns: int | None) -> tuple[Part, dict[str, memoryview]]:
    """The parts of a tensor, and the bytes for each stream. columns: of the weight, where it is a bitmap (N, K/8)."""
    tensor = tensor.detach().cpu().contiguous()
    part = Part(dtype_name(tensor.dtype), list(tensor.shape))
    mask = None
    if columns is not None:
        part.how, part.columns = "bitmap", columns
        mask = sparse_mask(tensor, columns)
    elif tensor.dtype is torch.bool:
        part.how, mask = "bits", tensor
    elif tensor.dim() >= 2 and tensor.numel() and tensor.element_size() in _BITS_OF:
        kept = tensor.view(_BITS_OF[tensor.element_size()]) != 0  # by their bits: -0.0 is no zero
        if int(kept.sum()) <= (1 - _WORTH_SPARSE) * kept.numel():
            part.how, part.kept, mask = "sparse", int(kept.sum()), kept
    if mask is None:
        return part, {part.dtype: tensor_bytes(tensor)}
    matrix = mask.reshape(_as_matrix(mask.shape))
    rows, cols = block_of(matrix) if matrix.numel() else (1, 1)
    part.block = [rows, cols]
    streams = {BITS: tensor_bytes(pack_bits(matrix[::rows, ::cols].contiguous()))}
    if part.how == "sparse":
        streams[part.dtype] = tensor_bytes(tensor[mask])
    return part, streams


def put_together(part: Part, streams: Mapping[str, memoryview], name: str) -> Tensor:
    """The tensor whose parts these are; the bytes have the lengths that part.lengths() tells."""
    dtype = DTYPES[part.dtype]
    if part.how == "plain":
        return as_tensor(streams[part.dtype], dtype).view(part.shape)
    grid = part.grid()
    bits = unpack_bits(as_tensor(streams[BITS], torch.uint8), grid, name)
    mask = bits.repeat_interleave(part.block[0], 0).repeat_interleave(part.block[1], 1)
    if part.how == "bits":
        return mask.view(part.shape)
    if part.how == "bitmap":
        return _packed_rows(mask)
    if int(mask.sum()) != part.kept:
        raise TensorFileError(f"{name} is damaged: its bits keep {int(mask.sum())} values and there are {part.kept}")
    values = as_tensor(streams[part.dtype], dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_scatter_(mask, values).view(part.shape)


_BITS_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def _packed_rows(mask: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask.view(torch.uint8), (0, -mask.shape[1] % 8))
    return pack_bits(padded).view(mask.shape[0], -1)


def as_tensor(data: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """A copy of the bytes in torch's own memory."""
    tensor = torch.empty(len(data) // dtype.itemsize, dtype=dtype)
    if len(data):
        tensor_bytes(tensor)[:] = data
    return tensor


# ---- streams --------------------------------------------------------------------------------------------------------


def itemsize_of(stream: str) -> int:
    return 1 if stream == BITS else DTYPES[stream].itemsize


def encode_stream(pieces: Iterable[memoryview], itemsize: int, every: bool = False) -> list[tuple[str, bytes]]:
    """The planes of a stream, each with the name of its coder. every: try all coders."""
    data = b"".join(pieces)
    planes = (data,) if itemsize == 1 else tuple(data[byte::itemsize] for byte in range(itemsize))
    return [encode_bytes(plane, every) for plane in planes]


def decode_stream(planes: Sequence[tuple[str, bytes | bytearray]], itemsize: int, length: int, what: str) -> memoryview:
    """The bytes of a stream of that length; raises TensorFileError where the planes do not give them."""
    if len(planes) != itemsize or length % itemsize:
        raise TensorFileError(f"{what} is damaged: {len(planes)} planes of {length} bytes, expected {itemsize}")
    count = length // itemsize
    decoded = [decode_bytes(coder, data, count, what) for coder, data in planes]
    if itemsize == 1:
        return memoryview(decoded[0])
    # Only now is there memory for all: the planes were as long as they were said to be.
    whole = bytearray(length)
    for byte, plane in enumerate(decoded):
        whole[byte::itemsize] = plane
    return memoryview(whole)


def decode_into(
    memory: memoryview, planes: Sequence[tuple[str, Iterable[bytes | bytearray]]], itemsize: int, what: str
) -> None:
    """As decode_stream, into memory that is there, piece by piece: for a large tensor, which is a stream of its own."""
    values = np.frombuffer(memory, np.uint8).reshape(-1, itemsize)
    if len(planes) != itemsize:
        raise TensorFileError(f"{what} is damaged: it has {len(planes)} planes, expected {itemsize}")
    for byte, (coder, coded) in enumerate(planes):
        done = 0
        for piece in _decoded_pieces(coder, coded, what):
            if done + len(piece) > len(values):
                raise TensorFileError(f"{what} is damaged: it decodes to more than {len(values)} bytes")
            values[done : done + len(piece), byte] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        if done != len(values):
            raise TensorFileError(f"{what} is damaged: it decodes to {done} bytes, expected {len(values)}")


def _decoded_pieces(coder: str, coded: Iterable[bytes | bytearray], what: str) -> Iterator[bytes | bytearray]:
    if coder == "raw":
        yield from coded
        return
    if coder not in CODERS:
        raise TensorFileError(f"{what} is coded as {coder!r}, which this pycompress does not know; update pycompress")
    is_lzma = coder == "lzma"
    decoder: Any = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA) if is_lzma else zlib.decompressobj(-15)
    try:
        for data in coded:
            if decoder.eof:
                raise TensorFileError(f"{what} is damaged: something follows its end")
            rest: bytes | bytearray = data
            while not decoder.eof:
                piece = decoder.decompress(rest, _STEP)
                yield piece
                rest = b"" if is_lzma else decoder.unconsumed_tail
                if decoder.needs_input if is_lzma else not rest and len(piece) < _STEP:
                    break
    except (zlib.error, lzma.LZMAError) as error:
        raise TensorFileError(f"{what} is damaged ({error})") from error
    if not decoder.eof or decoder.unused_data:
        raise TensorFileError(f"{what} is damaged: it does not end where it should")
