"""What from_pretrained and save_pretrained of compressed Hugging Face models refuse, and what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pycompress
from pycompress.structure import StructureError
from tests.hf_models import make, transformers

pytest.importorskip("pycompress.hf")
pytestmark = pytest.mark.usefixtures("one_thread")
AutoBert = transformers.AutoModelForSequenceClassification


def _sparse(model: nn.Module) -> None:
    pycompress.prune_(model, 0.5)
    pycompress.sparsify_(model, dtype="int8")


def _saved(folder: Path, compress: Any = pycompress.quantize_) -> dict[str, Any]:
    model = make("bert")[0]
    compress(model)
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def _change(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_damaged_tensors_are_told_by_name(tmp_path: Path) -> None:
    _saved(tmp_path)
    _change(tmp_path, lambda tensors: tensors.pop("classifier.weight_scale"))
    with pytest.raises(StructureError, match=r"classifier\.weight_scale is not in the checkpoint; save the model"):
        AutoBert.from_pretrained(tmp_path)
    _saved(tmp_path)
    _change(tmp_path, lambda tensors: tensors.update({"classifier.weight": torch.randn(2, 32)}))
    with pytest.raises(StructureError, match=r"classifier.weight is torch.float32 \(2, 32\) in the file, expected"):
        AutoBert.from_pretrained(tmp_path)
    _saved(tmp_path)
    _change(tmp_path, lambda tensors: tensors.update({"classifier.weight_scale": torch.randn(3)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoBert.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [None, 1 << 40])
def test_a_lying_number_of_values_is_told(length: int | None, tmp_path: Path) -> None:
    config = _saved(tmp_path, _sparse)
    config["quantization_config"]["lengths"]["classifier.weight_values"] = length
    if length is None:
        del config["quantization_config"]["lengths"]["classifier.weight_values"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StructureError, match=f"gives classifier.weight_values {length} values; expected at most 64"):
        AutoBert.from_pretrained(tmp_path)


def test_a_structure_of_other_sizes_is_told(tmp_path: Path) -> None:
    config = _saved(tmp_path)
    config["intermediate_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StructureError, match=r"intermediate.dense' \(Int8Linear\): .* build the model with the same"):
        AutoBert.from_pretrained(tmp_path)


def test_a_device_map_over_several_devices_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path)
    with pytest.raises(ValueError, match="spreads a model compressed by pycompress over cpu, disk; give it one device"):
        AutoBert.from_pretrained(tmp_path, device_map={"bert": "cpu", "classifier": "disk"})


def test_two_quantisers_cannot_be_saved_in_one_config(tmp_path: Path) -> None:
    model = make("bert")[0]
    pycompress.quantize_(model)
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(ValueError, match="compressed by pycompress and others by awq"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
