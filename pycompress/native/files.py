"""Model files and folders read into numpy arrays and layers: what ``save_model`` and ``save_pretrained`` wrote."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pycompress.model_description import ModelFileError, check_sum, file_description, read_folder
from pycompress.native.arrays import Array
from pycompress.native.int4_linear import Int4Linear
from pycompress.native.int8_linear import Int8Linear
from pycompress.native.layer import Layer
from pycompress.native.sparse_linear import SparseLinear
from pycompress.tensor_header import HeaderEntry, TensorFileError, are_sizes, read_header

# What numpy has for the dtypes of a file; bfloat16 and the 8-bit floats come as their bits.
_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "BF16": "<u2",
    "F32": "<f4", "F64": "<f8", "U16": "<u2", "U32": "<u4", "U64": "<u8", "C64": "<c8", "F8_E4M3": "u1",
    "F8_E5M2": "u1",
}  # fmt: skip


class _Contents:
    """The tensors of a model; each is read, and its checksum looked at, when it is asked for."""

    def __init__(self, path: str, files: Mapping[BinaryIO, Mapping[str, HeaderEntry]], header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self._places = {name: (file, entry) for file, entries in files.items() for name, entry in entries.items()}
        self._sums = header.get("sums")
        if not isinstance(self._sums, dict) or set(self._sums) != set(self._places):
            raise ModelFileError(f"{path} is damaged: its checksums are not those of its tensors")
        self.layers = self._objects("layers", dict)
        self.aliases = self._objects("aliases", list)
        if not all(isinstance(name, str) for names in self.aliases.values() for name in names):
            raise ModelFileError(f"{path} is damaged: its aliases are no names")
        self._kept: dict[str, str] = dict(header["tied"])  # by each further name the one that the file has
        for layer, others in self.aliases.items():
            for name in [name for name in self._places if name.startswith(f"{layer}.")]:
                self._kept.update((f"{other}{name[len(layer) :]}", name) for other in others)

    def _objects(self, key: str, kind: type) -> dict[str, Any]:
        found = self.header["structure"].get(key)
        if not isinstance(found, dict) or not all(isinstance(value, kind) for value in found.values()):
            raise ModelFileError(f"{self.path} is damaged: its structure has no {key}")
        return found

    def names(self) -> list[str]:
        return [*self._places, *self._kept]

    def read(self, name: str) -> Array:
        kept = self._kept.get(name, name)
        if kept not in self._places:
            raise ModelFileError(f"{self.path} is damaged: it has no tensor {name!r}")
        file, entry = self._places[kept]
        try:
            array = np.empty(entry.shape, _DTYPES[entry.dtype])
        except ValueError as error:  # nothing in it, and yet a size beyond what numpy counts
            raise ModelFileError(f"{self.path} is damaged: tensor {name!r} is {entry.shape}: {error}") from error
        memory = array.reshape(-1).view(np.uint8).data if entry.nbytes else memoryview(b"")
        file.seek(entry.begin)
        if entry.nbytes and file.readinto(memory) != entry.nbytes:  # type: ignore[attr-defined]
            raise ModelFileError(f"{self.path} ends inside {name!r}; it was cut off meanwhile")
        assert isinstance(self._sums, dict)
        check_sum(memory, self._sums[kept], f"{self.path}: {name}")
        coded = self.header["tensors"].get(kept)
        return array if coded is None else self._bits(array, coded, name)

    def _bits(self, array: Array, coded: object, name: str) -> Array:
        """A bool tensor, kept at a bit a value."""
        shape = coded.get("shape") if isinstance(coded, dict) and coded.get("coding") == "bits" else None
        count = math.prod(shape) if are_sizes(shape) else -1
        if not are_sizes(shape) or array.dtype != np.uint8 or array.shape != (-(-count // 8),):
            raise ModelFileError(f"{self.path} is damaged: tensor {name!r} is said to be {str(coded)[:100]}")
        return np.unpackbits(array.view(np.uint8), count=count, bitorder="little").astype(bool).reshape(shape)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_Contents]:
    path = os.fspath(path)
    with ExitStack() as stack:
        if os.path.isdir(path):
            folder = read_folder(path)
            described, places = folder.description, [shard.path for shard in folder.shards]
            files = {file: found for _, file, found in (_open(stack, place) for place in places)}
        else:
            metadata, file, found = _open(stack, path)
            described, files = file_description(metadata, path), {file: found}
        if described is None:
            raise ModelFileError(
                f"{path} is compact, which is read with torch only; load it there with load_model or load_pretrained, "
                "and save it again with compact=False"
            )
        yield _Contents(path, files, described)


def _open(stack: ExitStack, path: str) -> tuple[dict[str, str], BinaryIO, dict[str, HeaderEntry]]:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
        raise TensorFileError(f"{path} is no regular file, and so no safetensors file")
    file = stack.enter_context(Path(path).open("rb"))  # noqa: SIM115 - closed with the stack
    metadata, entries = read_header(file, os.fstat(file.fileno()).st_size, path)
    return metadata, file, entries


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Every tensor of a model file or folder, by its name in the state_dict; bfloat16 ones as their bits, uint16.

    Raises:
        OSError: no such file, or the system cannot read it.
        ModelFileError (a ValueError): damaged, of a newer version, compact, or no model file.
    """
    with _opened(path) as contents:
        return {name: contents.read(name) for name in contents.names()}


def load_layers(path: str | os.PathLike[str], *, threads: int | None = None) -> dict[str, Layer]:
    """The Int8Linear, SparseLinear and Int4Linear layers of a model file or folder, by their names in the model;
    a layer with several names is one object.

    Layers of other kinds, and float ones, are left out; :func:`load_arrays` has their tensors. threads: of each layer.

    Raises:
        OSError: no such file, or the system cannot read it.
        ModelFileError (a ValueError): damaged, of a newer version, compact, or no model file.
    """
    with _opened(path) as contents:
        layers: dict[str, Layer] = {}
        for name, fields in contents.layers.items():
            kind = fields.get("kind")
            if not isinstance(kind, str) or kind not in _MAKERS:
                continue
            try:
                layer = _MAKERS[kind](_State(contents, name), fields, threads)
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, ModelFileError):
                    raise
                what = f"it does not say {error}" if isinstance(error, KeyError) else str(error)
                raise ModelFileError(f"{contents.path} is damaged: layer {name!r} is no {kind}: {what}") from error
            layers.update((each, layer) for each in (name, *contents.aliases.get(name, ())))
        return layers


class _State:
    """The tensors of one layer."""

    def __init__(self, contents: _Contents, layer: str) -> None:
        self._contents, self._prefix = contents, f"{layer}." if layer else ""
        self._names = set(contents.names())

    def __getitem__(self, name: str) -> Array:
        return self._contents.read(self._prefix + name)

    def get(self, name: str) -> Array | None:
        return self[name] if self._prefix + name in self._names else None


def _sized(layer: Layer, fields: Mapping[str, Any]) -> Layer:
    sizes, expected = (layer.in_features, layer.out_features), (fields["in_features"], fields["out_features"])
    if sizes != expected:
        raise ValueError(f"its tensors are of {sizes} inputs and outputs, expected {expected}")
    return layer


def _int8(state: _State, fields: Mapping[str, Any], threads: int | None) -> Layer:
    statics: dict[str, Any] = {}
    if fields["mode"] == "static":
        statics = {key: state[key].reshape(-1)[0] for key in ("input_scale", "input_zero_point")}
    weight, scale, bias = state["weight"], state["weight_scale"], state.get("bias")
    options = {"mode": fields["mode"], "activation": fields["activation"], "threads": threads}
    return _sized(Int8Linear(weight, scale, bias, **options, **statics), fields)


def _sparse(state: _State, fields: Mapping[str, Any], threads: int | None) -> Layer:
    tensors = state["weight_bitmap"], state["weight_values"], state.get("weight_scale"), state.get("bias")
    format = fields["format"] if fields["format"] in ("bitmap", "index") else "auto"
    options = {"activation": fields["activation"], "format": format, "threads": threads}
    return _sized(SparseLinear(*tensors, in_features=fields["in_features"], **options), fields)


def _int4(state: _State, fields: Mapping[str, Any], threads: int | None) -> Layer:
    tensors = state["weight"], state["weight_scale"], state.get("weight_zero_point"), state.get("bias")
    options = {key: fields[key] for key in ("in_features", "group_size", "format", "activation")}
    return _sized(Int4Linear(*tensors, **options, threads=threads), fields)


_MAKERS: dict[str, Callable[[_State, Mapping[str, Any], int | None], Layer]] = {
    "Int8Linear": _int8,
    "SparseLinear": _sparse,
    "Int4Linear": _int4,
}
