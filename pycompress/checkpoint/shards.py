"""How tensors are shared out between files, and what the files are called: as Hugging Face does both."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Item = TypeVar("Item")

INDEX_FILE = "model.safetensors.index.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", re.IGNORECASE)


def size_of(value: int | str, op: str) -> int:
    """Bytes of a size such as 5_000_000_000, "5GB" or "500MiB". Raises ValueError for what is none."""
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    unit = _UNITS.get(found[2].upper()) if found else None
    size: object = value
    if found and unit and math.isfinite(count := float(found[1]) * unit):
        size = int(count)
    if type(size) is not int or size < 1:
        raise ValueError(f"{op}: max_shard_size={value!r}; expected bytes as a number, or a text as '5GB' or '500MiB'")
    return size


def split(items: Iterable[tuple[Item, int]], most: int) -> list[list[Item]]:
    """Consecutive items with their bytes, in groups of at most `most` bytes; a larger item is a group of its own."""
    groups: list[list[Item]] = [[]]
    total = 0
    for item, size in items:
        if groups[-1] and total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size
    return groups


def file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def is_shard(name: str) -> bool:
    """Whether a file of this name would be taken for weights of the model in its folder."""
    return re.fullmatch(r"model(-\d{5,9}-of-\d{5,9})?\.safetensors", name) is not None


def index_json(files: Mapping[str, Iterable[str]], total_bytes: int) -> str:
    """The text of INDEX_FILE. files: the names of the tensors of each."""
    weights = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weights.items()))}
    return json.dumps(index, indent=2) + "\n"
