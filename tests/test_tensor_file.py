"""TensorFile and write_tensors against the safetensors library, both ways, and files that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pycompress.tensor_file import DTYPES, Pending, TensorFile, TensorFileError, layout_bytes, write_tensors


def _tensors() -> dict[str, Tensor]:
    values = torch.arange(24).view(2, 3, 4)
    found = {name: values.to(dtype) for name, dtype in DTYPES.items()}
    return {**found, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": torch.randn(5, 4).t()}


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype.itemsize == 1:
        a, b = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors, metadata = _tensors(), {"b": "ü", "a": "1"}
    size = write_tensors(path, tensors, metadata)
    assert (
        size
        == path.stat().st_size
        == layout_bytes({k: Pending.of(t) for k, t in _tensors().items()}, {"b": "ü", "a": "1"})
    )
    read = load_file(path)
    torch.manual_seed(0)
    assert all(_equal(read[name], tensor) for name, tensor in _tensors().items() if name != "turned")
    assert read.keys() == _tensors().keys()
    with TensorFile(path) as file:
        assert file.metadata == {"b": "ü", "a": "1"}
        assert all(_equal(file.read(name), read[name]) for name in read)
        assert all(file.read(name).data_ptr() % 64 == 0 for name in ("F32", "F64", "turned"))
        # A tensor of wide elements lies at a multiple of their size, as memory-mapping readers want it.
        assert all(entry.begin % entry.dtype.itemsize == 0 for entry in file.entries.values())


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in _tensors().items()}
    save_file(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    with TensorFile(tmp_path / "t.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.entries) == set(tensors)
        assert all(_equal(file.read(name), tensor) for name, tensor in tensors.items())


def test_tensors_are_made_when_it_is_their_turn(tmp_path: Path) -> None:
    alive: list[str] = []

    def make(name: str) -> Pending:
        return Pending(torch.float32, (3,), lambda: alive.append(name) or torch.ones(3))

    write_tensors(tmp_path / "t", {name: make(name) for name in "cab"}, {})
    assert alive == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match="'a' changed while the file was written"):
        write_tensors(tmp_path / "t", {"a": Pending(torch.float32, (4,), lambda: torch.ones(3))}, {})
    with TensorFile(tmp_path / "t") as file:
        assert set(file.entries) == {"a", "b", "c"}


def test_a_dtype_that_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"torch.complex128 is none that a safetensors file can hold"):
        write_tensors(tmp_path / "t", {"a": torch.ones(2, dtype=torch.complex128)}, {})


def _file(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (_entry(dtype="F33"), None, "dtype 'F33'; expected one of"),
        (_entry(dtype=["F32"]), None, "has dtype"),
        (_entry(shape=[-2]), None, "has shape"),
        (_entry(shape=[True, 2]), None, "has shape"),
        (_entry(shape=[2.0]), None, "has shape"),
        (_entry(shape="2"), None, "has shape"),
        (_entry(shape=[2**62, 2**62, 2**62]), None, "in bytes 0 to 8"),
        (_entry(shape=[2**62], offsets=[0, 2**64]), None, "data_offsets"),
        (_entry(shape=[4], offsets=[0, 16]), None, "end at byte"),
        (_entry(offsets=[8, 0]), None, "in bytes 8 to 0"),
        (_entry(offsets=[0]), None, "data_offsets"),
        (_entry(shape=[1], offsets=[4, 8]), None, "'a' begins at byte"),
        ({**_entry(), "b": _entry()["a"]}, None, "'b' begins at byte"),
        ({}, None, "tensors end at byte"),
        ({**_entry(), "b": 1}, None, "'b' has dtype None"),
        ({**_entry(), "__metadata__": {"a": 1}}, None, "metadata is not text"),
        ({**_entry(), "__metadata__": []}, None, "metadata is not text"),
        ([], None, "no JSON object"),
        (b'{"a":1,"a":2}', None, "a key occurs twice"),
        (b"[" * 100_000, None, "header is no JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", None, "header is no JSON"),
        (b"{", None, "header is no JSON"),
        (b"\xff\xfe{}", None, "header is no JSON"),
        (_entry(), 2**63, "would be 9223372036854775808 bytes long"),
        (_entry(), 3, "header is no JSON"),
    ],
)
def test_headers_that_lie(header: Any, length: int | None, message: str, tmp_path: Path) -> None:
    path = _file(tmp_path / "t", header, length=length)
    with pytest.raises(TensorFileError, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 8, 9])
def test_files_that_are_hardly_there(size: int, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\2" + b"\0" * (size - 1) if size else b"")
    with pytest.raises(TensorFileError, match="damaged, cut off or no safetensors file"):
        TensorFile(tmp_path / "t")


def test_a_file_cut_off_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, {"a": torch.ones(100_000)}, {})
    with TensorFile(path) as file:
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(TensorFileError, match="cut off meanwhile"):
            file.read("a")
