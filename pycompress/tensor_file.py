"""Reading and writing safetensors files; ``tensor_header.py`` says how one looks, and reads its head.

The library ``safetensors`` reads these files, and what it writes can be read here. Three things it does otherwise: its
metadata comes in random order, so that one model gives many files; by default its tensors are mapped memory, which a
file that is cut off later turns into a crash; and a tensor has to be there as a whole before the first is written.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pycompress import _C
from pycompress.atomic_file import replacing
from pycompress.tensor_header import LENGTH, TensorFileError, are_sizes, checksum, read_header

__all__ = [
    "DTYPES",
    "Entry",
    "Pending",
    "Scratch",
    "TensorFile",
    "TensorFileError",
    "are_sizes",
    "checksum",
    "dtype_name",
    "layout_bytes",
    "tensor_bytes",
    "write_tensors",
]

_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_ALIGNMENT = 64
_MOST_AT_ONCE = 1 << 30  # bytes; the system reads at most 2 GiB
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors calls it; raises TypeError for a dtype that it cannot hold."""
    if dtype not in _NAMES:
        expected = ", ".join(map(str, _NAMES))
        raise TypeError(f"{dtype} is none that a safetensors file can hold; expected one of {expected}")
    return _NAMES[dtype]


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
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise TensorFileError(f"{self.path} is no regular file, and so no safetensors file")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.metadata, found = read_header(self._file, self.size, self.path)
            self.entries = {name: Entry(DTYPES[e.dtype], e.shape, e.begin, e.end) for name, e in found.items()}
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, keep: bool | Scratch = True) -> Tensor:
        """The tensor of this name, in memory of its own, aligned as torch's always is: sums may depend on it.

        keep: or in that of a Scratch, for a tensor that is soon dropped.
        """
        entry = self.entries[name]
        tensor = keep.take(entry.dtype, entry.shape) if isinstance(keep, Scratch) else _new(entry.shape, entry.dtype)
        if entry.nbytes:
            memory = tensor_bytes(tensor)
            self._read_into(memory, entry.begin)
            if entry.dtype is torch.bool and int(tensor.view(torch.uint8).max()) > 1:
                raise TensorFileError(f"{self.path} is damaged: {name!r} is BOOL, and a value is neither 0 nor 1")
        return tensor

    def read_bytes(self, begin: int, end: int) -> bytearray:
        """Bytes of the file, from inside an entry."""
        data = bytearray(end - begin)
        self._read_into(memoryview(data), begin)
        return data

    def _read_into(self, memory: memoryview, begin: int) -> None:
        """May run in several threads: the position of the file plays no part."""
        done = 0
        while done < len(memory):
            count = os.preadv(self._file.fileno(), [memory[done : done + _MOST_AT_ONCE]], begin + done)
            if count == 0:
                raise TensorFileError(f"{self.path} ends before byte {begin + len(memory)}; it was cut off meanwhile")
            done += count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory in huge pages where there are some: the system clears 500 MB of them in a sixth of the time."""
    tensor = torch.empty(shape, dtype=dtype)
    _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


class Scratch:
    """Memory for tensors that are read, packed and dropped, layer after layer.

    It is the same for all of them: the system hands out new memory page by page, which takes longer than to fill it,
    and holes between the packed weights would be too small for the next.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor whose values are anything, and are lost at the next reset()."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._memory):
            if self._used:  # something of this layer lies here
                return torch.empty(shape, dtype=dtype)
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = _new((size,), torch.uint8)
        begin = self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return self._memory[begin : begin + size].view(dtype).view(shape)

    def reset(self) -> None:
        self._used = 0

    def holds(self, tensor: Tensor) -> bool:
        own = self._memory.untyped_storage().data_ptr()
        return len(self._memory) > 0 and tensor.untyped_storage().data_ptr() == own


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
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        for name in order:
            item = pending[name]
            tensor = item.make()
            if tensor.dtype != item.dtype or tuple(tensor.shape) != item.shape:
                raise RuntimeError(f"{os.fspath(path)}: tensor {name!r} changed while the file was written")
            if item.nbytes:
                file.write(tensor_bytes(tensor))
    return LENGTH + len(text) + sum(item.nbytes for item in pending.values())


def layout_bytes(tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> int:
    """The size of the file that write_tensors would write."""
    return LENGTH + len(_layout(tensors, metadata)[0]) + sum(item.nbytes for item in tensors.values())


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
