"""``native.load_layers`` and ``load_arrays``: what save_model and save_pretrained wrote, read with numpy alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pycompress
from pycompress import native
from pycompress.nn import Int4Linear, Int8Embedding, Int8Linear, SparseLinear
from pycompress.tensor_file import TensorFile, checksum, write_tensors
from tests.test_native import as_numpy, floats, same


def model() -> nn.Sequential:
    shared = Int8Linear.from_float(nn.Linear(24, 24, bias=False), "weight_only")
    return nn.Sequential(
        Int8Linear.from_float(nn.Linear(30, 24), "dynamic", "gelu"),
        Int8Linear.from_float(nn.Linear(24, 24), "static", input_range=(-1, 2)),
        shared,
        shared,
        SparseLinear.from_dense(nn.Linear(24, 17), torch.rand(17, 24) > 0.6, dtype="int8", format="index"),
        SparseLinear.from_dense(nn.Linear(17, 8), torch.rand(8, 17) > 0.6, dtype="bfloat16", format="bitmap"),
        Int4Linear.from_float(nn.Linear(8, 7), "int4", group_size=5, symmetric=False),
        nn.Linear(7, 3).bfloat16(),
        Int8Embedding.from_float(nn.Embedding(9, 4)),
    ).eval()


def saved(where: Path, compact: bool = False) -> tuple[nn.Sequential, Path, Path]:
    whole = model()
    whole.register_buffer("kept", torch.tensor([True, False, True]))
    pycompress.save_model(whole, where / "model.safetensors", compact=compact)
    pycompress.save_pretrained(whole, where / "folder", compact=compact)
    return whole, where / "model.safetensors", where / "folder"


def test_layers_give_the_same_bits(tmp_path: Path, isa: str) -> None:
    whole, *places = saved(tmp_path)
    for place in places:
        layers = native.load_layers(place, threads=2)
        assert list(layers) == ["0", "1", "2", "3", "4", "5", "6"]
        assert layers["3"] is layers["2"]
        for name, layer in layers.items():
            module = whole[int(name)]
            assert layer.threads == 2
            assert layer.activation == module.activation
            for x in (floats(3, layer.in_features), floats(2, 20, layer.in_features)):
                same(layer, module, x)


def test_arrays_are_the_state_dict(tmp_path: Path) -> None:
    whole, *places = saved(tmp_path)
    state = whole.state_dict()
    for place in places:
        arrays = native.load_arrays(str(place))
        assert set(arrays) == set(state)
        for name, tensor in state.items():
            expected = as_numpy(tensor)
            assert arrays[name].dtype == expected.dtype, name
            np.testing.assert_array_equal(arrays[name], expected)


def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    layer = Int8Linear.from_float(nn.Linear(5, 4))
    pycompress.save_model(layer, tmp_path / "one.safetensors")
    found = native.load_layers(tmp_path / "one.safetensors")
    assert list(found) == [""]
    same(found[""], layer, floats(3, 5))


def test_compact_files_are_refused(tmp_path: Path) -> None:
    for place in saved(tmp_path, compact=True)[1:]:
        with pytest.raises(ValueError, match="is compact, which is read with torch only"):
            native.load_layers(place)


def rewritten(source: Path, change: Callable[[dict], object]) -> Path:
    """The file with another description, its checksum made anew."""
    with TensorFile(source) as file:
        tensors = {name: file.read(name) for name in file.entries}
        metadata = dict(file.metadata)
    description = json.loads(metadata["description"])
    change(description)
    metadata["description"] = json.dumps(description, separators=(",", ":"))
    metadata["sum"] = str(checksum(metadata["description"].encode()))
    write_tensors(source, tensors, metadata)
    return source


def layer(description: dict, name: str) -> dict:
    return description["structure"]["layers"][name]


DAMAGE: dict[str, tuple[str, Callable[[dict], object]]] = {
    "no layers": ("its structure has no layers", lambda d: d["structure"].pop("layers")),
    "a field": ("layer '0' is no Int8Linear: it does not say 'mode'", lambda d: layer(d, "0").pop("mode")),
    "a size": (
        "its tensors are of (30, 24) inputs and outputs, expected (31, 24)",
        lambda d: layer(d, "0").update(in_features=31),
    ),
    "a mode": ("mode='fast'", lambda d: layer(d, "0").update(mode="fast")),
    "a kind": ("has no tensor '0.weight_bitmap'", lambda d: layer(d, "0").update(kind="SparseLinear")),
    "a tensor": ("has no tensor '9.weight'", lambda d: d["structure"]["layers"].update({"9": layer(d, "0")})),
    "sums": ("its checksums are not those of its tensors", lambda d: d["sums"].pop("0.weight")),
    "a sum": ("0.weight is damaged: its checksum", lambda d: d["sums"].update({"0.weight": 1})),
    "text for a size": ("layer '4' is no SparseLinear", lambda d: layer(d, "4").update(in_features="24")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_descriptions(tmp_path: Path, case: str) -> None:
    message, change = DAMAGE[case]
    path = rewritten(saved(tmp_path)[1], change)
    with pytest.raises(ValueError, match=re.escape(message)):
        native.load_layers(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = saved(tmp_path)[1]
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged, cut off or no safetensors file"):
            native.load_layers(path)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="checksum"):
        native.load_arrays(path)
    write_tensors(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="is no model file of pycompress"):
        native.load_layers(path)
    with pytest.raises(ValueError, match=r"has no pycompress\.json"):
        native.load_layers(tmp_path)
    with pytest.raises(FileNotFoundError):
        native.load_layers(tmp_path / "absent")
