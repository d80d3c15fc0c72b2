"""The coded tensors of compact files: in groups, so that a large model is decoded piece by piece.

    header["tensors"]  {name: its Part as JSON}, in the order of their values
    header["groups"]   [{"file": 0, "tensors": how many, "streams": {stream: [[coder, bytes, checksum], ... a plane]}}]

A group is coded by itself: the streams of its tensors' values, see ``model_file_coding.py``, one behind the other in
the data of its file. A file of save_model is one group, and has its "streams" in the header.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycompress.model_description import ModelFileError, check_sum
from pycompress.model_file_coding import (
    BITS,
    Part,
    as_tensor,
    decode_into,
    decode_stream,
    encode_stream,
    itemsize_of,
    put_together,
    take_apart,
)
from pycompress.tensor_file import DTYPES, Entry, Pending, Scratch, TensorFile, checksum, tensor_bytes

_PIECE = 1 << 18  # bytes that are read at once; whole words, of which checksums are sums
GROUP_BYTES = 1 << 22  # of plain values; a larger tensor is a group of its own
Streams = dict[str, list[tuple[str, int, int]]]
Data = tuple[TensorFile, Entry]


def code_group(tensors: Mapping[str, Pending], bitmaps: Mapping[str, int]) -> tuple[dict[str, Any], Streams, bytes]:
    """The index entries of the tensors, the streams of the group, and its data. bitmaps: as Found has them."""
    pieces: dict[str, list[memoryview]] = {}
    index = {}
    for name, item in tensors.items():
        part, found = take_apart(item.make(), bitmaps.get(name))
        index[name] = part.to_json()
        for stream, piece in found.items():
            pieces.setdefault(stream, []).append(piece)
    streams: Streams = {}
    data = []
    for stream in list(pieces):
        planes = encode_stream(pieces.pop(stream), itemsize_of(stream), every=stream == BITS)
        streams[stream] = [(coder, len(coded), checksum(coded)) for coder, coded in planes]
        data += [coded for _, coded in planes]
    return index, streams, b"".join(data)


def deflated(text: str) -> bytes:
    """As the description of a compact file is kept."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return coder.compress(text.encode()) + coder.flush()


def coded_tensors(coded: Mapping[str, bytes]) -> dict[str, Pending]:
    """Tensors of bytes."""
    return {
        name: Pending(torch.uint8, (len(data),), lambda data=data: as_tensor(data, torch.uint8))  # type: ignore[misc]
        for name, data in coded.items()
    }


@dataclass(frozen=True)
class _Stream:
    planes: tuple[tuple[str, int, int, object], ...]  # coder, begin and end in the file, checksum
    length: int  # decoded

    @property
    def nbytes(self) -> int:
        return sum(end - begin for _, begin, end, _ in self.planes)


class _Group:
    """Some tensors, and where their values begin in which stream."""

    def __init__(
        self, file: TensorFile, parts: dict[str, Part], planes: object, begin: int, lock: threading.Lock
    ) -> None:
        self.file, self.parts, self._lock = file, parts, lock
        self.places: dict[str, dict[str, int]] = {}  # by tensor and stream
        lengths: dict[str, int] = {}
        for name, part in parts.items():
            self.places[name] = {}
            for stream, length in part.lengths().items():
                self.places[name][stream] = lengths.get(stream, 0)
                lengths[stream] = lengths.get(stream, 0) + length
        self.streams, self.end = _checked_streams(file, planes, lengths, begin)
        self._decoded: dict[str, memoryview] = {}
        self._unread = {stream: {n for n, places in self.places.items() if stream in places} for stream in lengths}

    def read(self, name: str, keep: bool | Scratch) -> Tensor:
        part = self.parts[name]
        if len(self.parts) == 1 and part.how == "plain" and part.count:
            return self._read_alone(part, keep)
        with self._lock:
            pieces = {}
            for stream, length in part.lengths().items():
                begin = self.places[name][stream]
                pieces[stream] = self._stream(stream)[begin : begin + length]
                self._unread[stream].discard(name)
                if not self._unread[stream]:
                    self._decoded.pop(stream, None)  # nobody will ask for it again
        return put_together(part, pieces, name)

    def _stream(self, name: str) -> memoryview:
        if name not in self._decoded:
            stream = self.streams[name]
            what = f"{self.file.path}: stream {name}"
            planes = []
            for coder, begin, end, total in stream.planes:
                coded = self.file.read_bytes(begin, end)
                check_sum(coded, total, what)
                planes.append((coder, coded))
            self._decoded[name] = decode_stream(planes, itemsize_of(name), stream.length, what)
        return self._decoded[name]

    def _read_alone(self, part: Part, keep: bool | Scratch) -> Tensor:
        """A large tensor: without its coded or decoded values lying anywhere else as a whole."""
        ((name, stream),) = self.streams.items()
        what = f"{self.file.path}: stream {name}"
        for _, begin, end, total in stream.planes:
            found = sum(map(checksum, self._pieces(begin, end))) % 2**64
            if str(found) != str(total):
                raise ModelFileError(f"{what} is damaged: its checksum is {found}, expected {str(total)[:20]}")
        dtype, shape = DTYPES[part.dtype], tuple(part.shape)
        tensor = keep.take(dtype, shape) if isinstance(keep, Scratch) else torch.empty(shape, dtype=dtype)
        planes = [(coder, self._pieces(begin, end)) for coder, begin, end, _ in stream.planes]
        decode_into(tensor_bytes(tensor), planes, itemsize_of(name), what)
        return tensor

    def _pieces(self, begin: int, end: int) -> Iterator[bytearray]:
        return (self.file.read_bytes(at, min(at + _PIECE, end)) for at in range(begin, end, _PIECE))

    def sizes(self) -> Iterable[tuple[str, tuple[str, float]]]:
        """Of a stream that several tensors share, each has the part that it has of the uncoded bytes."""
        for name, part in self.parts.items():
            lengths = {self.streams[key]: length for key, length in part.lengths().items() if length}
            yield name, (part.how, sum(stream.nbytes * n / stream.length for stream, n in lengths.items()))


class CodedGroups:
    """Every tensor of some compact files, by name. data: the coded bytes of each file, by its number."""

    def __init__(self, header: Mapping[str, Any], data: Sequence[Data], path: str) -> None:
        parts = {name: Part.of(value, name) for name, value in header["tensors"].items()}
        self._groups = _groups(header, parts, data, path)
        self._group_of = {name: group for group in self._groups for name in group.parts}
        self._parts = parts

    def likes(self) -> dict[str, Any]:
        return {name: (DTYPES[part.dtype], tuple(part.shape)) for name, part in self._parts.items()}

    def read(self, name: str, keep: bool | Scratch) -> Tensor:
        return self._group_of[name].read(name, keep)

    def sizes(self) -> dict[str, tuple[str, float]]:
        return dict(pair for group in self._groups for pair in group.sizes())


def _groups(header: Mapping[str, Any], parts: dict[str, Part], data: Sequence[Data], path: str) -> list[_Group]:
    described = header.get("groups", [{"file": 0, "tensors": len(parts), "streams": header.get("streams")}])
    names, used = list(parts), 0
    ends = [entry.begin for _, entry in data]
    lock = threading.Lock()  # of all groups: decoded values of several threads would add up
    groups = []
    for fields in described if isinstance(described, list) else ():
        number, count, streams = _fields(fields)
        if not 0 <= number < len(data) or not 0 <= count <= len(names) - used:
            raise ModelFileError(f"{path} is damaged: a group of its tensors is {str(fields)[:100]}")
        own = {name: parts[name] for name in names[used : used + count]}
        groups.append(_Group(data[number][0], own, streams, ends[number], lock))
        ends[number], used = groups[-1].end, used + count
    if used != len(names) or ends != [entry.end for _, entry in data]:
        raise ModelFileError(f"{path} is damaged: its streams do not fill its data")
    return groups


def _fields(group: object) -> tuple[int, int, object]:
    """File, tensors and streams of a group; -1 for what is no number."""
    fields = group if isinstance(group, dict) else {}
    number, count = (fields.get(key) if type(fields.get(key)) is int else -1 for key in ("file", "tensors"))
    return number, count, fields.get("streams")  # type: ignore[return-value]


def _checked_streams(
    file: TensorFile, streams: object, lengths: Mapping[str, int], at: int
) -> tuple[dict[str, _Stream], int]:
    """The streams of a group that begins at that byte, and where it ends."""
    if not isinstance(streams, dict) or set(streams) != set(lengths):
        raise ModelFileError(f"{file.path} is damaged: its streams are not those of its tensors")
    checked: dict[str, _Stream] = {}
    for name, planes in streams.items():
        places = []
        for plane in planes if isinstance(planes, list) else ():
            coder, size, total = plane if isinstance(plane, list) and len(plane) == 3 else (None, None, None)
            if not isinstance(coder, str) or type(size) is not int or size < 0:
                raise ModelFileError(f"{file.path} is damaged: stream {name} has a plane {str(plane)[:100]}")
            places.append((coder, at, at + size, total))
            at += size
        if len(places) != itemsize_of(name):
            raise ModelFileError(f"{file.path} is damaged: stream {name} has {len(places)} planes")
        checked[name] = _Stream(tuple(places), lengths[name])
    if at > file.size:
        raise ModelFileError(f"{file.path} is damaged: its streams do not fill its data")
    return checked, at
