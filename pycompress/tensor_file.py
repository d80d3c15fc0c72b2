"""Reading and writing safetensors files.

    8 bytes  length of the header, little-endian
    header   JSON: {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [N, K], "data_offsets": [begin, end]}}
    data     the tensors' bytes, without gaps or overlaps; offsets count from its start

The library ``safetensors`` reads these files, and what it writes can be read here. Three things it does otherwise: its
metadata comes in random order, so that one model gives many files; by default its tensors are mapped memory, which a
file that is cut off later turns into a crash; and a tensor has to be there as a whole before the first is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pycompress.atomic_file import replacing

_LENGTH = 8
_LARGEST_HEADER = 25_000_000  # some 150 000 tensors; parsed, JSON takes many times its size
_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors calls it; raises TypeError for a dtype that it cannot hold."""
    if dtype not in _NAMES:
        expected = ", ".join(map(str, _NAMES))
        raise TypeError(f"{dtype} is none that a safetensors file can hold; expected one of {expected}")
    return _NAMES[dtype]


class TensorFileError(ValueError):
    """A file that is damaged, cut off or none of this kind."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file; `begin` and `end` count from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorFile:
    """A safetensors file opened for reading: its whole header is checked, tensors are read when they are asked for.

    Raises:
        OSError: no such file, or the system cannot read it.
        TensorFileError: the header is damaged, or does not fit the size of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.metadata, self.entries = self._header()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, keep: bool = True) -> Tensor:
        """The tensor of this name, in memory of its own.

        keep: in torch's memory, aligned as it always is, on which the sums of its kernels may depend. A tensor that is
        soon dropped had better lie elsewhere: the hole that it leaves between aligned ones is too small for the next
        aligned one of its size, and a model that is packed layer by layer would take twice its memory.
        """
        entry = self.entries[name]
        if not keep and entry.nbytes:
            return torch.frombuffer(self.read_bytes(entry.begin, entry.end), dtype=entry.dtype).view(entry.shape)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes:
            self._read_into(tensor_bytes(tensor), entry.begin)
        return tensor

    def read_bytes(self, begin: int, end: int) -> bytearray:
        """Bytes of the file, from inside an entry."""
        data = bytearray(end - begin)
        self._read_into(memoryview(data), begin)
        return data

    def _read_into(self, memory: memoryview, begin: int) -> None:
        self._file.seek(begin)
        if self._file.readinto(memory) != len(memory):
            raise TensorFileError(f"{self.path} ends before byte {begin + len(memory)}; it was cut off meanwhile")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        length = int.from_bytes(self._file.read(_LENGTH), "little")
        start = _LENGTH + length
        if self.size < _LENGTH + 2 or start > self.size:
            raise self._damaged(f"its header would be {length} bytes long, and the file has {self.size}")
        if length > _LARGEST_HEADER:
            raise self._damaged(f"its header is {length} bytes long; at most {_LARGEST_HEADER} are read")
        try:
            header = json.loads(self._file.read(length), object_pairs_hook=_unique)
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

    def _entry(self, name: str, value: Any, start: int) -> Entry:
        fields = value if isinstance(value, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._damaged(f"tensor {name!r} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
        if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
        begin, end = offsets
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise self._damaged(f"tensor {name!r} is {dtype} {tuple(shape)} in bytes {begin} to {end}")
        return Entry(DTYPES[dtype], tuple(shape), start + begin, start + end)

    def _damaged(self, why: str) -> TensorFileError:
        return TensorFileError(f"{self.path} is damaged, cut off or no safetensors file: {why}")


@dataclass(frozen=True)
class Pending:
    """A tensor to be written, made only when it is its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Pending:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor] | Mapping[str, Pending], metadata: Mapping[str, str]
) -> int:
    """Write a safetensors file whole or not at all, see :func:`replacing`; the same input gives the same bytes.

    Returns its size in bytes.

    Raises:
        OSError: as the system says; the old file is then what it was.
        TypeError: a dtype that safetensors cannot hold.
    """
    pending = {name: Pending.of(item) if isinstance(item, Tensor) else item for name, item in tensors.items()}
    text, order = _layout(pending, metadata)
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        for name in order:
            item = pending[name]
            tensor = item.make()
            if tensor.dtype != item.dtype or tuple(tensor.shape) != item.shape:
                raise RuntimeError(f"{os.fspath(path)}: tensor {name!r} changed while the file was written")
            if item.nbytes:
                file.write(tensor_bytes(tensor))
    return _LENGTH + len(text) + sum(item.nbytes for item in pending.values())


def layout_bytes(tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> int:
    """The size of the file that write_tensors would write."""
    return _LENGTH + len(_layout(tensors, metadata)[0]) + sum(item.nbytes for item in tensors.values())


def _layout(pending: Mapping[str, Pending], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header, and the names in the order of their data."""
    # Large elements first: each tensor then lies at a multiple of its element's size.
    order = sorted(pending, key=lambda name: (-pending[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        item = pending[name]
        header[name] = {"dtype": dtype_name(item.dtype), "shape": item.shape, "data_offsets": [at, at + item.nbytes]}
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), order


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor, row by row, as bytes; without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The sum of its 64-bit words, modulo 2^64: finds flipped bits, overwritten and missing pieces, not words that only
    changed places; at 20 GB/s, where crc32 makes 6.
    """
    whole = len(data) // 8
    words = np.frombuffer(data, dtype="<u8", count=whole)
    rest = int.from_bytes(data[8 * whole :], "little")
    return (int(words.sum(dtype=np.uint64)) + rest) % 2**64


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def are_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether a value from JSON is a list of sizes."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
