"""Damaged, cut off, lying and hostile checkpoints, 10 000 and more: a clear error that names the file, the model
unchanged to the byte, and no memory that the files do not justify."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pycompress.checkpoint import load_pretrained, save, save_pretrained
from pycompress.model_description import FOLDER_FILE, to_json
from pycompress.model_file import ModelFileError
from pycompress.structure import StructureError
from pycompress.tensor_header import TensorFileError, checksum
from tests.model_file_models import compressed, fresh
from tests.test_model_file_damage import mutated

_NAMES = ("sparse int8", "int4", "words int8")
_FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"max_shard_size": 1500},
    "compact": {"compact": True, "max_shard_size": 1500},
}
_ROUNDS = 1200  # times the nine checkpoints
_MOST_MEMORY = 9_000_000  # lzma's dictionary, 4 MiB, and JSON of some kB as objects


class Subject:
    """A sound checkpoint, its files in memory, and the model that has to survive."""

    def __init__(self, name: str, form: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        save_pretrained(compressed(name)[0], folder, **_FORMS[form])
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.shards = [file for file in self.files if file.endswith(".safetensors")]
        self.model = fresh(name, "cpu")
        self.before = self.state()

    def state(self) -> list[object]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        values = [t.detach().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]
        return [*values, *map(type, self.model.modules()), *(id(t) for t in tensors)]

    def write(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            # Not cut to nothing first: a file system that fears for such files writes them to the disk at once.
            with open(self.folder / name, "r+b") as file:
                file.write(data)
                file.truncate()

    def survives(self, changed: dict[str, bytes], compare: bool) -> str:
        """What was said of the folder with these files changed; empty where it loads, which renews the model.

        compare: also the bytes of the model and the memory that was taken; both take longer than the loading.
        """
        self.write(changed)
        if compare:
            tracemalloc.start()
        try:
            load_pretrained(self.folder, self.model)
            said = ""
        except (ModelFileError, StructureError, OSError) as error:
            said = str(error)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < _MOST_MEMORY, (most, said)
        self.write({file: self.files[file] for file in changed if file in self.files})
        if not said:
            self.model = fresh(self.name, "cpu")
            self.before = self.state()
            return ""
        assert str(self.folder) in said, said
        if compare:
            assert self.state() == self.before, said
        return said


# ---- faults ---------------------------------------------------------------------------------------------------------


def bytes_of_a_shard(subject: Subject, rng: random.Random) -> dict[str, bytes]:
    file = rng.choice(subject.shards)
    return {file: mutated(subject.files[file], rng)}


def same_size(subject: Subject, rng: random.Random) -> dict[str, bytes]:
    """What the size does not betray: overwritten bytes, a moved piece, a header that says something else."""
    file = rng.choice(subject.shards)
    data = bytearray(subject.files[file])
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(header) if rng.random() < 0.7 else rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b'0123456789",[]{}:-eIUF')
        elif kind == 2:
            piece = rng.randbytes(min(rng.randrange(1, 9), len(data) - at))
            data[at : at + len(piece)] = piece
        else:
            source = rng.randrange(len(data))
            piece = bytes(data[source : source + rng.randrange(1, 30)])[: len(data) - at]
            data[at : at + len(piece)] = piece
    return {file: bytes(data)}


def bytes_of_the_json(subject: Subject, rng: random.Random) -> dict[str, bytes]:
    text = subject.files[FOLDER_FILE]
    return {FOLDER_FILE: mutated(len(text).to_bytes(8, "little") + text, rng)[8:]}


def swapped_shards(subject: Subject, rng: random.Random) -> dict[str, bytes]:
    first, second = rng.choice(subject.shards), rng.choice(subject.shards)
    return {first: subject.files[second], second: subject.files[first]}


_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**62, 2**64, 10**40, 1.5, "", "x", "../x", "model.safetensors", "0.weight", [], [[]],
    [0], [2**40, 2**40], [-1, 4], {}, {"a": []}, "I8", "F32", "int4", [1, 2, 3], "\ud800", "a" * 5000,
)  # fmt: skip


def changed_somewhere(value: Any, rng: random.Random) -> None:
    """One value, key or entry inside a JSON value is another, twice there, or gone."""
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        top = stack.pop()
        keys = list(top) if isinstance(top, dict) else range(len(top)) if isinstance(top, list) else ()
        places += [(top, key) for key in keys]
        stack += [top[key] for key in keys]
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and type(holder[key]) is int:
        holder[key] += rng.choice((-8, -1, 1, 7, 8, 64, 2**31, 2**53))
    elif kind == 2:
        other, where = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[where])) if not isinstance(other, list) or where < len(other) else 0
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(("x", "../x", "bias", "0.weight", "", str(key) + ".a"))] = holder.pop(key)
    elif kind == 4 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    else:
        holder[key] = rng.choice(_ODD)


def lying_json(subject: Subject, rng: random.Random) -> dict[str, bytes]:
    """pycompress.json with a fault inside, and a checksum that is right again."""
    header = json.loads(subject.files[FOLDER_FILE])
    changed_somewhere(header["description"] if header["description"] and rng.random() < 0.8 else header, rng)
    if isinstance(header.get("description"), dict):
        header["sum"] = str(checksum(to_json(header["description"]).encode()))
    return {FOLDER_FILE: json.dumps(header).encode()}


def lying_description(subject: Subject, rng: random.Random) -> dict[str, bytes]:
    """A compact checkpoint whose deflated description lies, with sizes and checksums that are right again."""
    folder = json.loads(subject.files[FOLDER_FILE])
    if folder["description"] is not None:
        return lying_json(subject, rng)
    file = folder["shards"][0]["file"]
    data = subject.files[file]
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin, end = header["description"]["data_offsets"]
    description = json.loads(zlib.decompress(data[start + begin : start + end], -15))
    changed_somewhere(description, rng)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    coded = coder.compress(json.dumps(description).encode()) + coder.flush()
    values = data[start:][slice(*header["data"]["data_offsets"])]
    tensors = {"data": values, "description": coded}
    folder["sum"] = str(checksum(coded))
    new = safetensors(tensors)
    folder["shards"][0]["bytes"] = len(new)
    return {file: new, FOLDER_FILE: json.dumps(folder).encode()}


def lying_header(subject: Subject, rng: random.Random) -> dict[str, bytes]:
    """A shard whose header lies: dtypes, shapes, offsets, names; its size in pycompress.json is right again."""
    file = rng.choice(subject.shards)
    data = subject.files[file]
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    changed_somewhere(header, rng)
    text = json.dumps(header).encode()
    new = len(text).to_bytes(8, "little") + text + data[start:]
    folder = json.loads(subject.files[FOLDER_FILE])
    for shard in folder["shards"]:
        if shard["file"] == file:
            shard["bytes"] = len(new)
    return {file: new, FOLDER_FILE: json.dumps(folder).encode()}


def safetensors(tensors: dict[str, bytes]) -> bytes:
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


_FAULTS: tuple[Callable[[Subject, random.Random], dict[str, bytes]], ...] = (
    bytes_of_a_shard, same_size, same_size, bytes_of_the_json, swapped_shards, lying_json, lying_json,
    lying_description, lying_description, lying_header,
)  # fmt: skip


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("name", _NAMES)
def test_mutations(name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr(save, "GROUP_BYTES", 300)  # some tensors alone, as large ones are, and some together
    subject = Subject(name, form, tmp_path / "m")
    assert subject.survives({}, False) == ""
    rng = random.Random(f"{name} {form}")
    said = 0
    for number in range(_ROUNDS):
        fault = _FAULTS[number % len(_FAULTS)]
        changed = fault(subject, rng)
        text = subject.survives(changed, compare=number // len(_FAULTS) % 6 == 0)
        unchanged = all(subject.files[file] == data for file, data in changed.items())
        if fault in (bytes_of_a_shard, same_size, bytes_of_the_json) and not text:
            # White space in JSON, and what no one reads: of a shard its metadata.
            assert unchanged or _means_the_same(subject, changed), changed
        said += bool(text)
    assert said > 0.8 * _ROUNDS
    assert subject.survives({}, False) == ""


def _means_the_same(subject: Subject, changed: dict[str, bytes]) -> bool:
    return all(_meaning(file, data) == _meaning(file, subject.files[file]) for file, data in changed.items())


def _meaning(file: str, data: bytes) -> object:
    if file == FOLDER_FILE:
        header = json.loads(data)
        return [{**header, "shards": [{**shard, "written": ""} for shard in header["shards"]]}.get(key) for key in (
            "format", "version", "sum", "shards", "description"
        )]  # fmt: skip
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    known = ("dtype", "shape", "data_offsets")
    return {name: [entry[key] for key in known] for name, entry in header.items()}, data[start:]


# ---- chosen ones ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sound(tmp_path: Path) -> Subject:
    torch.manual_seed(3)
    return Subject("int4", "sharded", tmp_path / "m")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/model.safetensors", "model.safetensors/..", "", "model-1-of-2.safetensors", 3]
)
def test_a_shard_is_a_file_of_the_folder(name: object, sound: Subject) -> None:
    for key in ("file", "written"):
        header = json.loads(sound.files[FOLDER_FILE])
        header["shards"][0][key] = name
        said = sound.survives({FOLDER_FILE: json.dumps(header).encode()}, True)
        assert "expected the name of a file in the folder itself" in said


def test_what_is_no_regular_file_is_not_opened(sound: Subject, tmp_path: Path) -> None:
    """Opening a pipe would wait for ever, and a device has no end."""
    for name in (sound.shards[0], FOLDER_FILE):
        path = sound.folder / name
        kept = path.read_bytes()
        for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"), os.mkdir, lambda p: p.symlink_to(p.name)):
            path.unlink()
            make(path)
            assert sound.survives({}, True)
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(kept)
    assert sound.survives({}, False) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"a":' * 100_000, "is no JSON"),
        (b'{"format": "pycompress.pretrained", "format": "x"}', "a key occurs twice"),
        (b"[]", "is no checkpoint of pycompress: its format is 'list'"),
        (b'{"format": "pt"}', "is no checkpoint of pycompress: its format is 'pt'"),
        (b'{"format": "pycompress.pretrained", "version": 1, "shards": []}', "names no shards"),
        (b'{"version": ' + b"9" * 5000 + b"}", "is no JSON"),
    ],
)
def test_texts_that_are_no_description(text: bytes, message: str, sound: Subject) -> None:
    assert message in sound.survives({FOLDER_FILE: text}, True)


def test_a_huge_json_is_not_read(sound: Subject) -> None:
    with open(sound.folder / FOLDER_FILE, "r+b") as file:
        file.truncate(30_000_000)
    assert "30000000 bytes; at most 25000000 are read" in sound.survives({}, True)


def test_a_bomb_is_stopped(tmp_path: Path) -> None:
    """A compact checkpoint that would decode to a gigabyte, where the model expects some bytes."""
    torch.manual_seed(3)
    subject = Subject("int4", "compact", tmp_path / "m")
    folder = json.loads(subject.files[FOLDER_FILE])
    file = folder["shards"][0]["file"]
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(coder.compress(bytes(1 << 20)) for _ in range(200)) + coder.flush()
    new = safetensors({"data": b"", "description": bomb})
    folder.update(sum=str(checksum(bomb)), shards=[{**folder["shards"][0], "bytes": len(new)}])
    tracemalloc.start()
    subject.write({file: new, FOLDER_FILE: json.dumps(folder).encode()})
    with pytest.raises(ModelFileError, match="its description is cut off or too large"):
        load_pretrained(subject.folder, subject.model)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 60_000_000
    assert subject.state() == subject.before


def test_two_shards_with_one_tensor(tmp_path: Path) -> None:
    subject = Subject("sparse int8", "sharded", tmp_path / "m")
    folder = json.loads(subject.files[FOLDER_FILE])
    first, second = (shard["file"] for shard in folder["shards"][:2])
    folder["shards"][1]["bytes"] = len(subject.files[first])
    said = subject.survives({second: subject.files[first], FOLDER_FILE: json.dumps(folder).encode()}, True)
    assert "is in another shard too" in said


def test_errors_are_of_the_families_that_are_promised() -> None:
    assert issubclass(ModelFileError, TensorFileError)
    assert issubclass(ModelFileError, ValueError)


def test_a_folder_of_another_model_is_no_reason_to_load_half(tmp_path: Path) -> None:
    save_pretrained(compressed("int8 dynamic")[0], tmp_path / "a", max_shard_size=1500)
    save_pretrained(compressed("float")[0], tmp_path / "b", max_shard_size=1500)
    shutil.copy(tmp_path / "b" / FOLDER_FILE, tmp_path / "a" / FOLDER_FILE)
    model: nn.Module = fresh("float", "cpu")
    with pytest.raises(ModelFileError, match=r"belongs to another checkpoint|is missing"):
        load_pretrained(tmp_path / "a", model)
