"""The files of a compressed-tensors checkpoint: config.json, and the tensors in one safetensors file or several."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pycompress.atomic_file import write_text
from pycompress.checkpoint.shards import INDEX_FILE, file_names, index_json, is_shard, split
from pycompress.compressed_tensors.config import CompressedTensorsError
from pycompress.model_description import FOLDER_FILE
from pycompress.tensor_file import Pending, TensorFile, write_tensors

CONFIG_FILE, GENERATION_FILE, WHOLE_FILE = "config.json", "generation_config.json", "model.safetensors"
Tensors = dict[str, Pending]
_LARGEST_JSON = 25_000_000
_OF_TORCH = {"format": "pt"}  # transformers reads no file without it


# ---- writing --------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, tensors: Tensors, texts: Mapping[str, Any], most: int, op: str) -> None:
    """Write the tensors, in files of at most `most` bytes, and the JSON texts; what a former export left is replaced.

    Raises:
        ValueError: the folder holds a checkpoint of pycompress's own, or whatever making a tensor raises; no file was
            then changed.
        OSError: as the system says.
    """
    if (folder / FOLDER_FILE).exists():
        raise ValueError(f"{op}: {folder} holds a checkpoint that save_pretrained wrote; export to another folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    shards = split(((name, item.nbytes) for name, item in tensors.items()), most)
    files = dict(zip(file_names(len(shards)), shards, strict=True))
    hidden = {file: folder / f".{file}.{secrets.token_hex(4)}.partial" for file in files}
    try:
        for file, names in files.items():
            write_tensors(hidden[file], {name: tensors[name] for name in names}, _OF_TORCH)
    except BaseException:
        for path in hidden.values():
            path.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise
    stale = {path.name for path in folder.iterdir() if is_shard(path.name) or path.name == INDEX_FILE} - set(files)
    for name in stale:
        (folder / name).unlink()
    for file, path in hidden.items():
        os.replace(path, folder / file)
    if len(files) > 1:
        write_text(folder / INDEX_FILE, index_json(files, sum(item.nbytes for item in tensors.values())))
    for name, value in texts.items():
        write_text(folder / name, json.dumps(value, indent=2, sort_keys=True) + "\n")


# ---- reading --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError, CompressedTensorsError: no such file; no JSON object."""
    if path.stat().st_size > _LARGEST_JSON:
        raise CompressedTensorsError(f"{path.name} has more than {_LARGEST_JSON} bytes; it is damaged")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CompressedTensorsError(f"{path.name} is no JSON ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise CompressedTensorsError(f"{path.name} is no JSON object")
    return value


def open_tensors(folder: Path, files: ExitStack) -> Tensors:
    """Every tensor of the checkpoint, to be read when it is asked for, while the files are open.

    Raises:
        OSError, TensorFileError: a file that is missing, damaged, or none.
    """
    names = [WHOLE_FILE]
    if not (folder / WHOLE_FILE).exists() and (folder / INDEX_FILE).exists():
        shards = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CompressedTensorsError(f"{INDEX_FILE} has no weight_map of names")
        names = sorted(set(shards.values()))
        if bad := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise CompressedTensorsError(f"{INDEX_FILE} names {bad[0][:100]!r}; expected a safetensors file beside it")
    found: Tensors = {}
    for name in names:
        file = files.enter_context(TensorFile(folder / name))
        for key, entry in file.entries.items():
            if key in found:
                raise CompressedTensorsError(f"the tensor {key[:100]!r} is in two of its files")
            found[key] = Pending(entry.dtype, entry.shape, lambda file=file, key=key: file.read(key))  # type: ignore[misc]
    return found
