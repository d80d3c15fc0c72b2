"""A compressed model in one safetensors file: its tensors, and JSON that says what each layer is.

    metadata     "format": "pycompress.model", "version": "1", "sum": of the description, "description": JSON:
    "structure"  as describe() gives it
    "tensors"    {name: {"coding": "bits", "shape": [...]}} for bool tensors, kept at a bit a value
    "tied"       {name: the name under which its memory is kept}
    "sums"       {name: checksum of its bytes}
    "frozen"     parameters without gradient; "transient": buffers that a state_dict leaves out
    "pycompress" the version that wrote it; "extra": what the caller wants to keep

Tensors have the names of a state_dict. A compact file holds two tensors of bytes instead, "description" (the JSON,
deflated; its "tensors" is an index, its "streams" say how they are coded) and "data", see ``model_file_coding.py``.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pycompress.convert import apply_edits
from pycompress.model_file_coding import BITS, as_tensor, encode_stream, itemsize_of, pack_bits, take_apart
from pycompress.model_file_reader import DATA, DESCRIPTION, FORMAT, VERSION, Contents, ModelFileError, opened
from pycompress.model_file_state import Found, Slot, collect, fill, slots_of
from pycompress.report import megabytes
from pycompress.structure import describe, plan
from pycompress.tensor_file import DTYPES, Pending, checksum, dtype_name, layout_bytes, tensor_bytes, write_tensors
from pycompress.text_table import TextTable
from pycompress.version import __version__

__all__ = ["FileSizes", "ModelFileError", "file_bytes", "load_model", "read_model_header", "save_model", "tensor_sizes"]

_MOST_IDLE = 1 << 26  # bytes of transient buffers, as caches, that a fresh model may not have made yet


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
    header = _header(model, found, extra)
    tensors, metadata = _compact(found, header) if compact else _plain(found, header)
    return write_tensors(path, tensors, metadata)


def file_bytes(model: nn.Module, *, extra: Mapping[str, Any] | None = None) -> int:
    """The bytes that save_model would write, not compact. Raises as it does."""
    found = collect(model)
    return layout_bytes(*_plain(found, _header(model, found, extra)))


def _header(model: nn.Module, found: Found, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    header = {
        "structure": describe(model),
        "tensors": {},
        "tied": found.tied,
        "frozen": found.frozen,
        "transient": found.transient,
        "pycompress": __version__,
        "extra": dict(extra or {}),
    }
    _json(header)  # complains before the work
    return header


def _plain(found: Found, header: dict[str, Any]) -> tuple[dict[str, Pending], dict[str, str]]:
    tensors = dict(found.tensors)
    for name, item in found.tensors.items():
        if item.dtype is torch.bool:
            tensors[name] = _bits(item)
            header["tensors"][name] = {"coding": BITS, "shape": list(item.shape)}
    header["sums"] = {name: checksum(tensor_bytes(item.make())) for name, item in tensors.items()}
    text = _json(header)
    return tensors, {**_metadata(text.encode()), DESCRIPTION: text}


def _metadata(description: bytes) -> dict[str, str]:
    return {"format": FORMAT, "version": str(VERSION), "sum": str(checksum(description))}


def _bits(item: Pending) -> Pending:
    return Pending(torch.uint8, (-(-item.nbytes // 8),), lambda: pack_bits(item.make()))


def _compact(found: Found, header: dict[str, Any]) -> tuple[dict[str, Pending], dict[str, str]]:
    streams: dict[str, list[memoryview]] = {}
    for name, item in found.tensors.items():
        part, pieces = take_apart(item.make(), found.bitmaps.get(name))
        header["tensors"][name] = part.to_json()
        for stream, piece in pieces.items():
            streams.setdefault(stream, []).append(piece)
    data, header["streams"] = [], {}
    for stream in list(streams):
        planes = encode_stream(streams.pop(stream), itemsize_of(stream), every=stream == BITS)
        header["streams"][stream] = [(coder, len(coded), checksum(coded)) for coder, coded in planes]
        data += [coded for _, coded in planes]
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    description = coder.compress(_json(header).encode()) + coder.flush()
    coded = {DESCRIPTION: description, DATA: b"".join(data)}
    tensors = {name: Pending.of(as_tensor(value, torch.uint8)) for name, value in coded.items()}
    return tensors, _metadata(description)


def _json(value: object) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"save_model: extra is no JSON ({error}); expected texts, numbers, lists and dicts") from error


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
        rebuilt = plan(model, contents.header["structure"], op="load_model")
        slots = slots_of(rebuilt)
        sources = _sources(contents, slots)
        try:
            edits = fill(rebuilt, slots, sources, contents.read, set(contents.header["frozen"]))
        except RuntimeError as error:  # what load_state_dict says of a layer
            raise ModelFileError(f"the file is damaged, or does not fit the model: {error}") from error
    apply_edits(edits)
    return model


def _sources(contents: Contents, slots: Mapping[str, Slot]) -> dict[str, str]:
    """For each slot the name of its tensor in the file; every dtype and shape fits. Nothing was read yet."""
    header, likes = contents.header, contents.likes()
    tied, cls = header["tied"], header["structure"]["class"]
    sources = {name: tied.get(name, name) for name in slots if name in tied or name in likes}
    remedy = f"build the model as the saved {cls} was built"
    lacking = [name for name, slot in slots.items() if slot.is_needed and sources.get(name) not in likes]
    if lacking:
        raise ModelFileError(f"there is no tensor for {_few(lacking)}, which the model has; {remedy}")
    extra = sorted((set(likes) | set(tied)) - set(slots) - set(header["transient"]))
    if extra:
        raise ModelFileError(f"there are tensors that the model has no place for: {_few(extra)}; {remedy}")
    sources = {name: source for name, source in sources.items() if source in likes}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in likes.items()}
    idle = sum(sizes[name] for name in set(likes).difference(sources.values()))
    if idle > sum(sizes.values()) - idle + _MOST_IDLE:  # a compact file decodes them with what lies beside them
        raise ModelFileError(f"{idle} bytes of its transient buffers have no place in the model; it is damaged")
    for name, source in sources.items():
        if why_not := slots[name].why_not(*likes[source]):
            raise ModelFileError(f"{name} {why_not}; {remedy}")
    return sources


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


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
        sizes, likes = contents.sizes(), contents.likes()
        rows = [(name, dtype_name(likes[name][0]), likes[name][1], *sizes[name]) for name in sizes]
        return FileSizes(contents.file_bytes, tuple(rows))
