"""save_pretrained: the files of a checkpoint, written so that a crash leaves the old one or the new one.

    1  every shard under a hidden name of its own, flushed to the disk
    2  pycompress.json, in one step: from here on the new checkpoint is what is read, each shard under the hidden name
    3  the shards get their proper names: the reader takes the hidden one as long as there is one
    4  what Hugging Face reads beside it, and old shards that no one names any more are removed
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pycompress.atomic_file import write_text
from pycompress.checkpoint import transformers_model
from pycompress.checkpoint.shards import INDEX_FILE, file_names, index_json, is_shard, size_of, split
from pycompress.model_description import DESCRIPTION, FOLDER_FILE, FOLDER_FORMAT, FOLDER_VERSION, to_json
from pycompress.model_file import FileSizes, tensor_rows
from pycompress.model_file_groups import GROUP_BYTES, code_group, coded_tensors, deflated
from pycompress.model_file_load import description_of
from pycompress.model_file_reader import DATA, opened_folder
from pycompress.model_file_state import Found, collect
from pycompress.report import megabytes
from pycompress.tensor_file import DTYPES, Pending, checksum, tensor_bytes, write_tensors

_OP = "save_pretrained"
_OF_TORCH = {"format": "pt"}  # transformers reads no file without it


@dataclass(frozen=True)
class CheckpointReport(FileSizes):
    """What the tensors of a checkpoint take of it; `print(report)` shows a table. file_bytes: of all shards."""

    folder: str
    files: int

    def summary(self) -> str:
        plain = sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape, _, _ in self.tensors)
        ratio = f", {self.file_bytes / plain:.3f} of their plain size" if plain else ""
        shards = "1 file" if self.files == 1 else f"{self.files} files"
        return f"{self.folder}: {len(self.tensors)} tensors, {megabytes(self.file_bytes)} MB in {shards}{ratio}"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    compact: bool = False,
    max_shard_size: int | str = "5GB",
    extra: Mapping[str, Any] | None = None,
) -> CheckpointReport:
    """Write `model` to `folder`, which is made where there is none; a checkpoint that is there is replaced as a whole.

    A model of Hugging Face's transformers is written with its configuration, from which load_pretrained builds it.

    Args:
        compact: the smallest form: lossless entropy coding, slower to write and to read. Only pycompress reads it.
        max_shard_size: of a file, in bytes or as "5GB"; a larger tensor has a file of its own.
        extra: JSON to keep in it, which read_pretrained_header gives back.

    Raises:
        TypeError, ValueError: what cannot be kept, by its name; a size that is none.
        OSError: as the system says; an old checkpoint is then what it was.
    """
    most = size_of(max_shard_size, _OP)
    found = collect(model, _OP)
    header = {**description_of(model, found, extra, _OP), "transformers": transformers_model.describe(model)}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _Writer(path, most).write(model, found, header, compact)
    return pretrained_sizes(folder)


def pretrained_sizes(folder: str | os.PathLike[str]) -> CheckpointReport:
    """How many bytes of a checkpoint each tensor takes. Raises as load_pretrained."""
    with opened_folder(folder) as contents:
        return CheckpointReport(contents.file_bytes, tensor_rows(contents), os.fspath(folder), contents.file_count)


class _Writer:
    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most, self.token = folder, most, secrets.token_hex(4)
        self.written: list[tuple[str, str, int]] = []  # hidden name, proper name, bytes

    def write(self, model: nn.Module, found: Found, header: dict[str, Any], compact: bool) -> None:
        old = {path.name for path in self.folder.iterdir()}
        try:
            index = None
            if compact:
                text, total = "null", self._compact(found, header)
            else:
                index = self._plain(found, header)
                text = to_json(header)
                total = checksum(text.encode(errors="surrogatepass"))
            write_text(self.folder / FOLDER_FILE, self._json(total, text))
        except BaseException:
            for hidden, _, _ in self.written:
                with suppress(OSError):
                    (self.folder / hidden).unlink()
            raise
        for hidden, proper, _ in self.written:
            os.replace(self.folder / hidden, self.folder / proper)
        self._others(model, index, old)

    def _json(self, total: int, description: str) -> str:
        shards = [{"file": proper, "bytes": size, "written": hidden} for hidden, proper, size in self.written]
        head = {"format": FOLDER_FORMAT, "version": FOLDER_VERSION, "sum": str(total), "shards": shards}
        return to_json(head)[:-1] + f',"description":{description}}}'

    def _shard(self, proper: str, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> None:
        hidden = f".{proper.removesuffix('.safetensors')}.{self.token}.partial"
        self.written.append((hidden, proper, 0))
        size = write_tensors(self.folder / hidden, tensors, metadata)
        self.written[-1] = (hidden, proper, size)

    def _plain(self, found: Found, header: dict[str, Any]) -> str | None:
        """Writes the shards; what Hugging Face wants to know of several."""
        shards = split(((name, item.nbytes) for name, item in found.tensors.items()), self.most)
        sums: dict[str, int] = {}

        def summed(name: str, item: Pending) -> Tensor:
            tensor = item.make()
            sums[name] = checksum(tensor_bytes(tensor))
            return tensor

        files = dict(zip(file_names(len(shards)), shards, strict=True))
        for file, names in files.items():
            items = {name: found.tensors[name] for name in names}
            self._shard(
                file,
                {
                    name: Pending(item.dtype, item.shape, lambda name=name, item=item: summed(name, item))  # type: ignore[misc]
                    for name, item in items.items()
                },
                _OF_TORCH,
            )
        header["sums"] = {name: sums.get(name, 0) for name in found.tensors}
        return index_json(files, sum(item.nbytes for item in found.tensors.values())) if len(files) > 1 else None

    def _compact(self, found: Found, header: dict[str, Any]) -> int:
        """Writes the shards, the description in the first; the checksum of the description."""
        groups: list[tuple[dict[str, Any], bytes]] = []
        for names in split(((name, item.nbytes) for name, item in found.tensors.items()), GROUP_BYTES):
            index, streams, data = code_group({name: found.tensors[name] for name in names}, found.bitmaps)
            header["tensors"].update(index)
            groups.append(({"tensors": len(names), "streams": streams}, data))
        shards = split(((group, len(group[1])) for group in groups), self.most)
        header["groups"] = [{"file": n, **fields} for n, shard in enumerate(shards) for fields, _ in shard]
        description = deflated(to_json(header))
        for number, (file, shard) in enumerate(zip(file_names(len(shards)), shards, strict=True)):
            coded = {DATA: b"".join(data for _, data in shard)}
            self._shard(file, coded_tensors({DESCRIPTION: description, **coded} if number == 0 else coded), {})
        return checksum(description)

    def _others(self, model: nn.Module, index: str | None, old: set[str]) -> None:
        """The files beside the checkpoint; load_pretrained needs none of them."""
        for name, text in self._texts(model, index):
            write_text(self.folder / name, text)
        stale = {name for name in old if is_shard(name) or (name.startswith(".") and name.endswith(".partial"))}
        stale |= {INDEX_FILE} if index is None else set()
        for name in stale - {proper for _, proper, _ in self.written}:
            with suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def _texts(self, model: nn.Module, index: str | None) -> Iterator[tuple[str, str]]:
        if index is not None:
            yield INDEX_FILE, index
        yield from transformers_model.config_files(model)
