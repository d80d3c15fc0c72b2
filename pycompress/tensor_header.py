"""What stands at the head of a safetensors file, read and checked; without torch, for programs that have none.

    8 bytes  length of the header, little-endian
    header   JSON: {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [N, K], "data_offsets": [begin, end]}}
    data     the tensors' bytes, without gaps or overlaps; offsets count from its start
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeGuard

import numpy as np

LENGTH = 8  # bytes of the length
_LARGEST_HEADER = 25_000_000  # some 150 000 tensors; parsed, JSON takes many times its size
# Bytes of an element, by the name that safetensors has for its dtype.
ITEMSIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
    "U16": 2, "U32": 4, "U64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class TensorFileError(ValueError):
    """A file that is damaged, cut off or none of this kind."""


@dataclass(frozen=True)
class HeaderEntry:
    """A tensor of a file; `begin` and `end` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(file: BinaryIO, size: int, path: str) -> tuple[dict[str, str], dict[str, HeaderEntry]]:
    """Metadata and tensors of a file that was just opened, `size` bytes long.

    Raises:
        TensorFileError: naming `path`: the header is damaged, its tensors overlap, leave gaps, or do not fit the size.
    """
    return _Header(size, path).read(file)


class _Header:
    def __init__(self, size: int, path: str) -> None:
        self.size, self.path = size, path

    def read(self, file: BinaryIO) -> tuple[dict[str, str], dict[str, HeaderEntry]]:
        length = int.from_bytes(file.read(LENGTH), "little")
        start = LENGTH + length
        if self.size < LENGTH + 2 or start > self.size:
            raise self._damaged(f"its header would be {length} bytes long, and the file has {self.size}")
        if length > _LARGEST_HEADER:
            raise self._damaged(f"its header is {length} bytes long; at most {_LARGEST_HEADER} are read")
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is no JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("its metadata is not text by text")
        entries = {name: self._entry(name, value, start) for name, value in header.items()}
        at = start
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != at:
                raise self._damaged(f"tensor {name!r} begins at byte {entry.begin}, where {at} was expected")
            at = entry.end
        if at != self.size:
            raise self._damaged(f"its tensors end at byte {at}, and the file has {self.size}")
        return metadata, entries

    def _entry(self, name: str, value: Any, start: int) -> HeaderEntry:
        fields = value if isinstance(value, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in ITEMSIZES:
            raise self._damaged(f"tensor {name!r} has dtype {dtype!r}; expected one of {', '.join(ITEMSIZES)}")
        if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
        begin, end = offsets
        if end - begin != math.prod(shape) * ITEMSIZES[dtype]:
            raise self._damaged(f"tensor {name!r} is {dtype} {tuple(shape)} in bytes {begin} to {end}")
        return HeaderEntry(dtype, tuple(shape), start + begin, start + end)

    def _damaged(self, why: str) -> TensorFileError:
        return TensorFileError(f"{self.path} is damaged, cut off or no safetensors file: {why}")


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The sum of its 64-bit words, modulo 2^64: finds flipped bits, overwritten and missing pieces, not words that only
    changed places; at 20 GB/s, where crc32 makes 6.
    """
    whole = len(data) // 8
    words = np.frombuffer(data, dtype="<u8", count=whole)
    rest = int.from_bytes(data[8 * whole :], "little")
    return (int(words.sum(dtype=np.uint64)) + rest) % 2**64


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object in which no key occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def are_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether a value from JSON is a list of sizes."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
