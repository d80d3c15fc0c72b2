"""A compressed model in one safetensors file: its tensors, and JSON that says what each layer is.

    metadata     "format": "pycompress.model", "version": "1", "sum": of the description, "description": JSON,
                 see ``model_description.py``

Tensors have the names of a state_dict. A compact file holds two tensors of bytes instead, "description" (the JSON,
deflated; its "tensors" is an index, its "streams" say how they are coded) and "data", see ``model_file_coding.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pycompress.model_description import DESCRIPTION, FORMAT, VERSION, ModelFileError, to_json
from pycompress.model_file_coding import BITS, pack_bits
from pycompress.model_file_groups import code_group, coded_tensors, deflated
from pycompress.model_file_load import description_of, load_into
from pycompress.model_file_reader import DATA, Contents, opened
from pycompress.model_file_state import Found, collect
from pycompress.report import megabytes
from pycompress.tensor_file import DTYPES, Pending, checksum, dtype_name, layout_bytes, tensor_bytes, write_tensors
from pycompress.text_table import TextTable

__all__ = ["FileSizes", "ModelFileError", "file_bytes", "load_model", "read_model_header", "save_model", "tensor_sizes"]


def save_model(
    model: nn.Module, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None, compact: bool = False
) -> int:
    """Write `model` to `path`, whole or not at all; returns the bytes of the file.

    extra: JSON to keep in the file, which read_model_header gives back.
    compact: the smallest form: lossless entropy coding, slower to write and to read.

    Raises:
        TypeError, ValueError: what cannot be kept (tensors without values, state that is no tensor), by its name.
        OSError: as the system says; the old file is then what it was.
    """
    found = collect(model)
    header = description_of(model, found, extra)
    tensors, metadata = _compact(found, header) if compact else _plain(found, header)
    return write_tensors(path, tensors, metadata)


def file_bytes(model: nn.Module, *, extra: Mapping[str, Any] | None = None) -> int:
    """The bytes that save_model would write, not compact. Raises as it does."""
    found = collect(model)
    return layout_bytes(*_plain(found, description_of(model, found, extra)))


def _plain(found: Found, header: dict[str, Any]) -> tuple[dict[str, Pending], dict[str, str]]:
    tensors = dict(found.tensors)
    for name, item in found.tensors.items():
        if item.dtype is torch.bool:
            tensors[name] = _bits(item)
            header["tensors"][name] = {"coding": BITS, "shape": list(item.shape)}
    header["sums"] = {name: checksum(tensor_bytes(item.make())) for name, item in tensors.items()}
    text = to_json(header)
    return tensors, {**_metadata(text.encode()), DESCRIPTION: text}


def _metadata(description: bytes) -> dict[str, str]:
    return {"format": FORMAT, "version": str(VERSION), "sum": str(checksum(description))}


def _bits(item: Pending) -> Pending:
    return Pending(torch.uint8, (-(-item.nbytes // 8),), lambda: pack_bits(item.make()))


def _compact(found: Found, header: dict[str, Any]) -> tuple[dict[str, Pending], dict[str, str]]:
    header["tensors"], header["streams"], data = code_group(found.tensors, found.bitmaps)
    description = deflated(to_json(header))
    return coded_tensors({DESCRIPTION: description, DATA: data}), _metadata(description)


def read_model_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model file says about itself, tensors left aside: "structure", "extra", "pycompress" and the rest.

    Raises:
        OSError, ModelFileError: no such file; damaged, of a newer version, or none.
    """
    with opened(path) as contents:
        return contents.header


def load_model(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Give `model` the structure and the tensors of a file that save_model wrote, and return it.

    model: a fresh one of the saved one's class, built with the same sizes: with float layers, or on the meta device,
        which spares the memory for weights that are replaced. Tensors come to the device of those they replace, to the
        CPU for meta ones, in the file's dtypes. Training flags and requires_grad are those of the saved model.

    Raises:
        OSError, ModelFileError: a file that is missing, damaged, of a newer version, or of another model, by the name
            of the layer or tensor that does not fit. The model is then what it was.
    """
    with opened(path, ". The model is unchanged") as contents:
        return load_into(contents, model, "load_model")


# ---- sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileSizes(TextTable):
    """What the tensors of a model file take of it. `print(sizes)` shows a table.

    layers: by tensor: name, dtype, shape, how it is kept, bytes of the file. Tensors that are coded together share
    their bytes in proportion. file_bytes: of the whole file, description included.
    """

    file_bytes: int
    tensors: tuple[tuple[str, str, tuple[int, ...], str, float], ...]

    header: ClassVar[tuple[str, ...]] = ("tensor", "dtype", "shape", "kept", "bytes", "of plain")
    right: ClassVar[frozenset[str]] = frozenset(("bytes", "of plain"))

    def rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, dtype, shape, how, size in self.tensors:
            plain = math.prod(shape) * DTYPES[dtype].itemsize
            ratio = f"{size / plain:.3f}" if plain else ""
            rows.append((name, dtype, "x".join(map(str, shape)), how, f"{size:.0f}", ratio))
        return rows

    def summary(self) -> str:
        rest = self.file_bytes - sum(size for *_, size in self.tensors)
        return f"{len(self.tensors)} tensors, {megabytes(self.file_bytes)} MB, of which {rest:.0f} bytes of description"


def tensor_sizes(path: str | os.PathLike[str]) -> FileSizes:
    """How many bytes of a model file each of its tensors takes. Raises as read_model_header."""
    with opened(path) as contents:
        return FileSizes(contents.file_bytes, tensor_rows(contents))


def tensor_rows(contents: Contents) -> tuple[tuple[str, str, tuple[int, ...], str, float], ...]:
    """FileSizes.tensors of what a file or folder holds."""
    sizes, likes = contents.sizes(), contents.likes()
    return tuple((name, dtype_name(likes[name][0]), likes[name][1], *sizes[name]) for name in sizes)
