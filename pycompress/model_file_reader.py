"""What a model file holds, read and checked: its description, and its tensors whether plain or coded."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pycompress.model_file_coding import BITS, Part, decode_stream, itemsize_of, put_together, unpack_bits
from pycompress.structure import StructureError
from pycompress.tensor_file import DTYPES, Entry, TensorFile, TensorFileError, are_sizes, checksum, tensor_bytes

FORMAT, VERSION = "pycompress.model", 1
DESCRIPTION, DATA = "description", "data"  # the two tensors of a compact file
_LARGEST_DESCRIPTION = 25_000_000
Like = tuple[torch.dtype, tuple[int, ...]]


class ModelFileError(TensorFileError):
    """A model file that is damaged, of a newer version, or of another model."""


class Contents(Protocol):
    """The tensors of a model file. Nothing is decoded before read() asks for it."""

    header: dict[str, Any]
    file_bytes: int

    def likes(self) -> Mapping[str, Like]:
        """dtype and shape by name, as the file declares them; sizes that its bytes contradict were refused."""

    def read(self, name: str, keep: bool = True) -> Tensor:
        """The tensor of this name, in memory of its own; keep: as TensorFile.read."""

    def sizes(self) -> dict[str, tuple[str, float]]:
        """For each tensor how it is kept and how many bytes of the file are its."""


@contextmanager
def opened(path: str | os.PathLike[str], note: str = "") -> Iterator[Contents]:
    """The contents of a file, for a while; whatever is wrong with them is said with the file's name and the note.

    Raises:
        OSError, ModelFileError: no such file; damaged, of a newer version, or no model file.
    """
    with TensorFile(path) as file:
        try:
            yield _contents(file)
        except (TensorFileError, StructureError) as error:
            text = str(error) if file.path in str(error) else f"{file.path}: {error}"
            raise ModelFileError(text + note) from error


def _contents(file: TensorFile) -> Contents:
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise ModelFileError(
            f"{file.path} is no model file of pycompress (its format is {metadata.get('format')!r}); save_model writes "
            "them, a plain state_dict is loaded by the model itself"
        )
    version = metadata.get("version", "")
    if version != str(VERSION):
        newer = version.isdecimal() and int(version[:9]) > VERSION
        remedy = "update pycompress to read it" if newer else "the file is damaged"
        raise ModelFileError(f"{file.path} has version {version[:20]!r} and this pycompress reads {VERSION}; {remedy}")
    if not metadata.get("sum", "").isdecimal():
        raise ModelFileError(f"{file.path} is damaged: it has no checksum")
    return PlainContents(file) if DESCRIPTION in metadata else CompactContents(file)


_TYPES = {
    "structure": dict, "tensors": dict, "tied": dict, "frozen": list, "transient": list, "pycompress": str,
    "extra": dict,
}  # fmt: skip


def _header(file: TensorFile, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file.path} is damaged: its description is no JSON ({error})") from error
    for key, kind in _TYPES.items():
        if not isinstance(header, dict) or not isinstance(header.get(key), kind):
            raise ModelFileError(f"{file.path} is damaged: its description has no {key!r} that is a {kind.__name__}")
    names = (*header["tied"].values(), *header["frozen"], *header["transient"])
    if not all(isinstance(name, str) for name in names):
        raise ModelFileError(f"{file.path} is damaged: its description names a tensor by something that is no text")
    return header


def check_sum(data: bytes | bytearray | memoryview, expected: object, what: str) -> None:
    """Raises ModelFileError where the data are not those that were written."""
    if str(checksum(data)) != str(expected):
        raise ModelFileError(f"{what} is damaged: its checksum is {checksum(data)}, expected {str(expected)[:20]}")


class PlainContents:
    """Tensors as they are; bool ones at a bit a value, header["tensors"] has their shapes."""

    def __init__(self, file: TensorFile) -> None:
        self._file, self.file_bytes = file, file.size
        text = file.metadata[DESCRIPTION].encode(errors="surrogatepass")
        check_sum(text, file.metadata["sum"], f"{file.path}: the description")
        self.header = _header(file, text)
        sums = self.header.get("sums")
        if not isinstance(sums, dict) or set(sums) != set(file.entries):
            raise ModelFileError(f"{file.path} is damaged: its checksums are not those of its tensors")
        self._sums: dict[str, object] = sums
        self._bits = {name: self._shape(name, value) for name, value in self.header["tensors"].items()}

    def likes(self) -> dict[str, Like]:
        plain = {name: (entry.dtype, entry.shape) for name, entry in self._file.entries.items()}
        return {**plain, **{name: (torch.bool, shape) for name, shape in self._bits.items()}}

    def read(self, name: str, keep: bool = True) -> Tensor:
        tensor = self._file.read(name, keep)
        check_sum(tensor_bytes(tensor), self._sums[name], name)
        return unpack_bits(tensor, self._bits[name], name) if name in self._bits else tensor

    def sizes(self) -> dict[str, tuple[str, float]]:
        return {
            name: ("bits" if name in self._bits else "plain", float(entry.nbytes))
            for name, entry in self._file.entries.items()
        }

    def _shape(self, name: str, value: object) -> tuple[int, ...]:
        entry = self._file.entries.get(name)
        shape = value.get("shape") if isinstance(value, dict) and value.get("coding") == BITS else None
        kept = entry.shape if entry is not None and entry.dtype is torch.uint8 else ()
        if are_sizes(shape) and kept == (-(-math.prod(shape) // 8),):
            return tuple(shape)
        raise ModelFileError(
            f"{self._file.path}: tensor {name!r} is said to be {str(value)[:100]} and is kept as {entry}; it is "
            "damaged, or coded in a way that this pycompress does not know"
        )


@dataclass(frozen=True)
class _Stream:
    planes: tuple[tuple[str, int, int, object], ...]  # coder, begin and end in the file, checksum
    length: int  # decoded

    @property
    def nbytes(self) -> int:
        return sum(end - begin for _, begin, end, _ in self.planes)


class CompactContents:
    """All values coded, see model_file_coding.py; header["tensors"] is the index, header["streams"] the coders."""

    def __init__(self, file: TensorFile) -> None:
        self._file, self.file_bytes = file, file.size
        for name in (DESCRIPTION, DATA):
            entry = file.entries.get(name)
            if entry is None or entry.dtype is not torch.uint8 or len(entry.shape) != 1 or len(file.entries) != 2:
                raise ModelFileError(f"{file.path} is damaged: it has no description, neither as text nor coded")
        self.header = _header(file, self._inflated(file.entries[DESCRIPTION]))
        self._parts = {name: Part.of(value, name) for name, value in self.header["tensors"].items()}
        self._places: dict[str, dict[str, int]] = {}  # by tensor and stream: where its bytes begin
        lengths: dict[str, int] = {}
        for name, part in self._parts.items():
            self._places[name] = {}
            for stream, length in part.lengths().items():
                self._places[name][stream] = lengths.get(stream, 0)
                lengths[stream] = lengths.get(stream, 0) + length
        self._streams = self._checked_streams(lengths)
        self._decoded: dict[str, memoryview] = {}
        self._unread = {name: {n for n, places in self._places.items() if name in places} for name in lengths}

    def likes(self) -> dict[str, Like]:
        return {name: (DTYPES[part.dtype], tuple(part.shape)) for name, part in self._parts.items()}

    def read(self, name: str, keep: bool = True) -> Tensor:
        part = self._parts[name]
        pieces = {}
        for stream, length in part.lengths().items():
            begin = self._places[name][stream]
            pieces[stream] = self._stream(stream)[begin : begin + length]
        tensor = put_together(part, pieces, name)
        for stream in pieces:
            self._unread[stream].discard(name)
            if not self._unread[stream]:
                self._decoded.pop(stream, None)  # nobody will ask for it again
        return tensor

    def sizes(self) -> dict[str, tuple[str, float]]:
        """Of a stream that several tensors share, each has the part that it has of the uncoded bytes."""
        found = {}
        for name, part in self._parts.items():
            lengths = {self._streams[key]: length for key, length in part.lengths().items() if length}
            found[name] = (part.how, sum(stream.nbytes * length / stream.length for stream, length in lengths.items()))
        return found

    def _stream(self, name: str) -> memoryview:
        if name not in self._decoded:
            stream = self._streams[name]
            what = f"{self._file.path}: stream {name}"
            planes = []
            for coder, begin, end, total in stream.planes:
                coded = self._file.read_bytes(begin, end)
                check_sum(coded, total, what)
                planes.append((coder, coded))
            self._decoded[name] = decode_stream(planes, itemsize_of(name), stream.length, what)
        return self._decoded[name]

    def _inflated(self, entry: Entry) -> bytes:
        coder = zlib.decompressobj(-15)
        coded = self._file.read_bytes(entry.begin, entry.end)
        check_sum(coded, self._file.metadata["sum"], f"{self._file.path}: the description")
        try:
            text = coder.decompress(coded, _LARGEST_DESCRIPTION)
        except zlib.error as error:
            raise ModelFileError(f"{self._file.path} is damaged: its description is no deflate ({error})") from error
        if not coder.eof:
            raise ModelFileError(f"{self._file.path} is damaged: its description is cut off or too large")
        return text

    def _checked_streams(self, lengths: Mapping[str, int]) -> dict[str, _Stream]:
        streams, data = self.header.get("streams"), self._file.entries[DATA]
        if not isinstance(streams, dict) or set(streams) != set(lengths):
            raise ModelFileError(f"{self._file.path} is damaged: its streams are not those of its tensors")
        at = data.begin
        checked: dict[str, _Stream] = {}
        for name, planes in streams.items():
            places = []
            for plane in planes if isinstance(planes, list) else ():
                coder, size, total = plane if isinstance(plane, list) and len(plane) == 3 else (None, None, None)
                if not isinstance(coder, str) or type(size) is not int or size < 0:
                    raise ModelFileError(f"{self._file.path} is damaged: stream {name} has a plane {str(plane)[:100]}")
                places.append((coder, at, at + size, total))
                at += size
            if len(places) != itemsize_of(name):
                raise ModelFileError(f"{self._file.path} is damaged: stream {name} has {len(places)} planes")
            checked[name] = _Stream(tuple(places), lengths[name])
        if at != data.end:
            raise ModelFileError(f"{self._file.path} is damaged: its streams do not fill its data")
        return checked
