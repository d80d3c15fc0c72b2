"""What a model file or folder holds, read and checked: its description, and its tensors whether plain or coded."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from pycompress.model_description import (
    DESCRIPTION,
    LARGEST_DESCRIPTION,
    Folder,
    ModelFileError,
    check_sum,
    file_description,
    parse_description,
    read_folder,
)
from pycompress.model_file_coding import BITS, unpack_bits
from pycompress.model_file_groups import CodedGroups
from pycompress.structure import StructureError
from pycompress.tensor_file import Entry, Scratch, TensorFile, TensorFileError, are_sizes, tensor_bytes

DATA = "data"  # beside DESCRIPTION the tensor of a compact file
Like = tuple[torch.dtype, tuple[int, ...]]


class Contents(Protocol):
    """The tensors of a model file. Nothing is decoded before read() asks for it."""

    header: dict[str, Any]
    file_bytes: int
    file_count: int

    def likes(self) -> Mapping[str, Like]:
        """dtype and shape by name, as the file declares them; sizes that its bytes contradict were refused."""

    def read(self, name: str, keep: bool | Scratch = True) -> Tensor:
        """The tensor of this name, in memory of its own; keep: as TensorFile.read. May be called by several threads."""

    def sizes(self) -> dict[str, tuple[str, float]]:
        """For each tensor how it is kept and how many bytes of the file are its."""


@contextmanager
def opened(path: str | os.PathLike[str], note: str = "") -> Iterator[Contents]:
    """The contents of a file, for a while; whatever is wrong with them is said with the file's name and the note.

    Raises:
        OSError, ModelFileError: no such file; damaged, of a newer version, or no model file.
    """
    with saying(path, note), TensorFile(path) as file:
        yield _contents(file)


@contextmanager
def opened_folder(path: str | os.PathLike[str], note: str = "") -> Iterator[Contents]:
    """As opened, for a folder that save_pretrained wrote."""
    with saying(path, note), ExitStack() as stack:
        folder = read_folder(path)
        files = [stack.enter_context(TensorFile(shard.path)) for shard in folder.shards]
        yield _folder_contents(folder, files)


@contextmanager
def saying(path: str | os.PathLike[str], note: str) -> Iterator[None]:
    """What is wrong with a file or model is said with the file's name and the note."""
    try:
        yield
    except (TensorFileError, StructureError) as error:
        name = os.fspath(path)
        text = str(error) if name in str(error) else f"{name}: {error}"
        raise ModelFileError(text + note) from error


def _contents(file: TensorFile) -> Contents:
    description = file_description(file.metadata, file.path)
    if description is None:
        return CompactContents([file], file.metadata["sum"], file.path)
    return PlainContents([file], description, file.path)


def _folder_contents(folder: Folder, files: Sequence[TensorFile]) -> Contents:
    if folder.description is None:
        return CompactContents(files, folder.total, folder.path)
    return PlainContents(files, folder.description, folder.path)


class PlainContents:
    """Tensors as they are; in a single file bool ones at a bit a value, header["tensors"] has their shapes."""

    def __init__(self, files: Sequence[TensorFile], header: dict[str, Any], path: str) -> None:
        self.header, self._path = header, path
        self.file_bytes, self.file_count = sum(file.size for file in files), len(files)
        self._files: dict[str, TensorFile] = {}
        for file in files:
            if twice := sorted(self._files.keys() & file.entries.keys()):
                raise ModelFileError(f"{file.path} is damaged: {twice[0]!r} is in another shard too")
            self._files.update(dict.fromkeys(file.entries, file))
        sums = header.get("sums")
        if not isinstance(sums, dict) or set(sums) != set(self._files):
            raise ModelFileError(f"{path} is damaged: its checksums are not those of its tensors")
        self._sums: dict[str, object] = sums
        self._bits = {name: self._shape(name, value) for name, value in header["tensors"].items()}

    def likes(self) -> dict[str, Like]:
        plain = {name: (self._entry(name).dtype, self._entry(name).shape) for name in self._files}
        return {**plain, **{name: (torch.bool, shape) for name, shape in self._bits.items()}}

    def read(self, name: str, keep: bool | Scratch = True) -> Tensor:
        tensor = self._files[name].read(name, keep)
        check_sum(tensor_bytes(tensor), self._sums[name], f"{self._files[name].path}: {name}")
        return unpack_bits(tensor, self._bits[name], name) if name in self._bits else tensor

    def sizes(self) -> dict[str, tuple[str, float]]:
        return {
            name: ("bits" if name in self._bits else "plain", float(self._entry(name).nbytes)) for name in self._files
        }

    def _entry(self, name: str) -> Entry:
        return self._files[name].entries[name]

    def _shape(self, name: str, value: object) -> tuple[int, ...]:
        entry = self._entry(name) if name in self._files else None
        shape = value.get("shape") if isinstance(value, dict) and value.get("coding") == BITS else None
        kept = entry.shape if entry is not None and entry.dtype is torch.uint8 else ()
        if are_sizes(shape) and kept == (-(-math.prod(shape) // 8),):
            return tuple(shape)
        raise ModelFileError(
            f"{self._path}: tensor {name!r} is said to be {str(value)[:100]} and is kept as {entry}; it is "
            "damaged, or coded in a way that this pycompress does not know"
        )


class CompactContents:
    """All values coded, see model_file_groups.py; the description lies deflated in the first file."""

    def __init__(self, files: Sequence[TensorFile], total: str, path: str) -> None:
        self.file_bytes, self.file_count = sum(file.size for file in files), len(files)
        for number, file in enumerate(files):
            names = {DATA} if number else {DATA, DESCRIPTION}
            found = file.entries.values()
            if set(file.entries) != names or any(e.dtype is not torch.uint8 or len(e.shape) != 1 for e in found):
                raise ModelFileError(f"{file.path} is damaged: it has no description, neither as text nor coded")
        self.header = parse_description(_inflated(files[0], total), path)
        self._groups = CodedGroups(self.header, [(file, file.entries[DATA]) for file in files], path)

    def likes(self) -> dict[str, Like]:
        return self._groups.likes()

    def read(self, name: str, keep: bool | Scratch = True) -> Tensor:
        return self._groups.read(name, keep)

    def sizes(self) -> dict[str, tuple[str, float]]:
        return self._groups.sizes()


def _inflated(file: TensorFile, total: str) -> bytes:
    entry = file.entries[DESCRIPTION]
    coder = zlib.decompressobj(-15)
    coded = file.read_bytes(entry.begin, entry.end)
    check_sum(coded, total, f"{file.path}: the description")
    try:
        text = coder.decompress(coded, LARGEST_DESCRIPTION)
    except zlib.error as error:
        raise ModelFileError(f"{file.path} is damaged: its description is no deflate ({error})") from error
    if not coder.eof:
        raise ModelFileError(f"{file.path} is damaged: its description is cut off or too large")
    return text
