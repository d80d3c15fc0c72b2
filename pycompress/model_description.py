"""The JSON that a saved model carries beside its tensors, read and checked; without torch, for programs that have none.

    "structure"  what each layer is, see ``structure.py``
    "tensors"    {name: {"coding": "bits", "shape": [...]}} for bool tensors, kept at a bit a value
    "tied"       {name: the name under which its memory is kept}
    "sums"       {name: checksum of its bytes}
    "frozen"     parameters without gradient; "transient": buffers that a state_dict leaves out
    "pycompress" the version that wrote it; "extra": what the caller wants to keep

``model_file.py`` keeps it in the file of the tensors. A folder, see ``checkpoint/``, has it in pycompress.json:

    {"format": "pycompress.pretrained", "version": 1, "sum": of the JSON of the description,
     "shards": [{"file": "model.safetensors", "bytes": 1234, "written": "..."}, ...], "description": {...}}

"written" is the name that a shard had while the folder was written: where there is such a file, the writing was
interrupted after its last step, and the file is the shard. A compact folder has "description": null; it is in the first
shard.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pycompress.tensor_header import TensorFileError, checksum, unique_keys

FORMAT, VERSION = "pycompress.model", 1
DESCRIPTION = "description"  # in the metadata of a file; of a compact one the name of a tensor
FOLDER_FORMAT, FOLDER_VERSION = "pycompress.pretrained", 1
FOLDER_FILE = "pycompress.json"
LARGEST_DESCRIPTION = 25_000_000
_SHARD = re.compile(r"model(-\d{5,9}-of-\d{5,9})?\.safetensors")
_WRITTEN = re.compile(r"\.model[-0-9of]{0,30}\.[0-9a-f]{8}\.partial")
_TYPES = {
    "structure": dict, "tensors": dict, "tied": dict, "frozen": list, "transient": list, "pycompress": str,
    "extra": dict,
}  # fmt: skip


class ModelFileError(TensorFileError):
    """A model file or folder that is damaged, of a newer version, or of another model."""


def file_description(metadata: Mapping[str, str], path: str) -> dict[str, Any] | None:
    """What the metadata of a single file says of the model, checked; None where the file is compact.

    Raises:
        ModelFileError: no model file, damaged, or of a newer version.
    """
    if metadata.get("format") != FORMAT:
        raise ModelFileError(
            f"{path} is no model file of pycompress (its format is {metadata.get('format')!r}); save_model writes "
            "them, a plain state_dict is loaded by the model itself"
        )
    version = metadata.get("version", "")
    if version != str(VERSION):
        newer = version.isdecimal() and int(version[:9]) > VERSION
        remedy = "update pycompress to read it" if newer else "the file is damaged"
        raise ModelFileError(f"{path} has version {version[:20]!r} and this pycompress reads {VERSION}; {remedy}")
    if not metadata.get("sum", "").isdecimal():
        raise ModelFileError(f"{path} is damaged: it has no checksum")
    if DESCRIPTION not in metadata:
        return None
    text = metadata[DESCRIPTION].encode(errors="surrogatepass")
    check_sum(text, metadata["sum"], f"{path}: the description")
    return parse_description(text, path)


def parse_description(text: str | bytes, path: str) -> dict[str, Any]:
    """The description of a model. Raises ModelFileError, naming `path`, where the text is none."""
    return checked_description(_parsed(text, path, "description"), path)


def checked_description(value: object, path: str) -> dict[str, Any]:
    """The value itself, its keys and their types checked; raises ModelFileError where it is no description."""
    header = value if isinstance(value, dict) else {}
    for key, kind in _TYPES.items():
        if not isinstance(header.get(key), kind):
            raise ModelFileError(f"{path} is damaged: its description has no {key!r} that is a {kind.__name__}")
    names = (*header["tied"].values(), *header["frozen"], *header["transient"])
    if not all(isinstance(name, str) for name in names):
        raise ModelFileError(f"{path} is damaged: its description names a tensor by something that is no text")
    return header


def check_sum(data: bytes | bytearray | memoryview, expected: object, what: str) -> None:
    """Raises ModelFileError where the data are not those that were written."""
    if str(checksum(data)) != str(expected):
        raise ModelFileError(f"{what} is damaged: its checksum is {checksum(data)}, expected {str(expected)[:20]}")


def to_json(value: object) -> str:
    """The one text that stands for a value; raises TypeError or ValueError where JSON has none."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Shard:
    """A file of a folder: its path now, its proper name, its bytes."""

    path: str
    name: str
    nbytes: int


@dataclass(frozen=True)
class Folder:
    """What pycompress.json says. description: None in a compact folder; total: the checksum of its JSON."""

    path: str
    shards: tuple[Shard, ...]
    description: dict[str, Any] | None
    total: str


def read_folder(folder: str | os.PathLike[str]) -> Folder:
    """pycompress.json of a folder, checked; shards were found and have their sizes, nothing was read of them.

    Raises:
        OSError: no such folder, or the system cannot read the file.
        ModelFileError: no checkpoint of pycompress, damaged, of a newer version, or a shard is missing.
    """
    folder = os.fspath(folder)
    path = os.path.join(folder, FOLDER_FILE)
    if os.path.isdir(folder) and not os.path.lexists(path):
        raise ModelFileError(
            f"{folder} has no {FOLDER_FILE}; save_pretrained writes one, a folder of transformers' save_pretrained is "
            "loaded by its from_pretrained"
        )
    header = _parsed(_text_of(path), path, "text")
    if not isinstance(header, dict) or header.get("format") != FOLDER_FORMAT:
        found = str(header.get("format"))[:40] if isinstance(header, dict) else type(header).__name__
        raise ModelFileError(
            f"{path} is no checkpoint of pycompress: its format is {found!r}, expected {FOLDER_FORMAT!r}"
        )
    version = header.get("version")
    if version != FOLDER_VERSION or isinstance(version, bool):
        newer = type(version) is int and version > FOLDER_VERSION
        remedy = "update pycompress to read it" if newer else "the file is damaged"
        text = str(version)[:20]
        raise ModelFileError(f"{path} has version {text} and this pycompress reads {FOLDER_VERSION}; {remedy}")
    total, description = str(header.get("sum")), header.get("description")
    if description is not None:
        checked_description(description, path)
        check_sum(to_json(description).encode(errors="surrogatepass"), total, f"{path}: the description")
    return Folder(folder, _shards(folder, header.get("shards"), path), description, total)


def _shards(folder: str, value: object, path: str) -> tuple[Shard, ...]:
    if not isinstance(value, list) or not value:
        raise ModelFileError(f"{path} is damaged: it names no shards")
    shards = []
    for item in value:
        fields: Mapping[str, Any] = item if isinstance(item, dict) else {}
        name, written, size = str(fields.get("file")), str(fields.get("written")), fields.get("bytes")
        if not (type(size) is int and 0 <= size < 2**63 and _SHARD.fullmatch(name) and _WRITTEN.fullmatch(written)):
            raise ModelFileError(
                f"{path} is damaged: a shard is {str(item)[:100]!r}; expected the name of a file in the folder itself, "
                "model.safetensors or model-00001-of-00002.safetensors, and its size"
            )
        place = os.path.join(folder, written)
        place = place if os.path.lexists(place) else os.path.join(folder, name)
        if not os.path.lexists(place):
            raise ModelFileError(f"{place} is missing, which {path} names as one of {len(value)} shards; copy it too")
        shards.append(Shard(place, name, size))
    if len({shard.name for shard in shards}) != len(shards):
        raise ModelFileError(f"{path} is damaged: it names a shard twice")
    for shard in shards:
        found = os.stat(shard.path)
        if not stat.S_ISREG(found.st_mode):
            raise ModelFileError(f"{shard.path} is no regular file")
        if found.st_size != shard.nbytes:
            raise ModelFileError(
                f"{shard.path} has {found.st_size} bytes and {path} says {shard.nbytes}; it was cut off, or belongs to "
                "another checkpoint"
            )
    return tuple(shards)


def _text_of(path: str) -> bytes:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ModelFileError(f"{path} is no regular file")
    if found.st_size > LARGEST_DESCRIPTION:
        raise ModelFileError(f"{path} has {found.st_size} bytes; at most {LARGEST_DESCRIPTION} are read")
    with open(path, "rb") as file:
        return file.read(found.st_size + 1)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is none")
    return value


def _parsed(text: str | bytes, path: str, what: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is damaged: its {what} is no JSON ({error})") from error
