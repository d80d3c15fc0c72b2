"""Every family of tests/hf_models.py: quantised, reported, saved and loaded to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress
from tests.hf_models import HUGGING_FACE, make, run, same

pytest.importorskip("pycompress.hf")
pytestmark = pytest.mark.usefixtures("one_thread")

# The relative error of an output, ||y - float|| / ||float||, for random weights and two layers.
TOLERANCE = {"dynamic": 0.03, "weight_only": 0.02, "static": 0.05, "int4": 0.25, "nf4": 0.25}
TIED = {
    "roberta": "lm_head.decoder",
    "gpt2": "lm_head",
    "tied_llama": "lm_head",
    "t5": "lm_head",
    "whisper": "proj_out",
}


def _error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, expected, strict=True))


def _quantized(model: nn.Module, inputs: Any, mode: str, layers: str) -> Any:
    calibration = pycompress.calibrate(model, [inputs], layers=layers) if mode == "static" else None
    return pycompress.quantize_(model, mode, layers=layers, calibration=calibration)


def _loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded


CASES = [
    *((name, mode, "all") for name in HUGGING_FACE for mode in ("dynamic", "int4")),
    *((name, mode, "linear") for name in ("bert", "gpt2", "t5") for mode in ("weight_only", "static", "nf4")),
    ("whisper", "static", "all"),
]


@pytest.mark.parametrize(("name", "mode", "layers"), CASES)
def test_quantised_saved_and_loaded(name: str, mode: str, layers: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    expected, before = run(model, inputs), dict(model.named_modules())
    report = _quantized(model, inputs, mode, layers)
    _check_report(report, before, model)
    outputs = run(model, inputs)
    assert 0 < _error(outputs, expected) < TOLERANCE[mode]
    loaded = _loaded(model, tmp_path)
    assert same(run(loaded, inputs), outputs)
    state, other = model.state_dict(), loaded.state_dict()
    assert list(other) == list(state)
    assert all(other[key].dtype == state[key].dtype and torch.equal(other[key], state[key]) for key in state)


def _check_report(report: Any, before: dict[str, nn.Module], model: nn.Module) -> None:
    """Each layer is either replaced, or still what it was and reported with a reason."""
    swapped = {name for row in report.layers if row.action == "swapped" for name in (row.name, *row.aliases)}
    left = {name for row in report.layers if row.action == "left" for name in (row.name, *row.aliases)}
    assert swapped
    assert all(row.reason for row in report.layers if row.action == "left")
    for name, module in before.items():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            assert (name in swapped) != (name in left), name
        new = model.get_submodule(name)
        if type(new) is not nn.Identity:  # an activation that was folded in
            assert (new is module) == (name not in swapped), name


@pytest.mark.parametrize("name", TIED)
def test_tied_heads_are_left_and_stay_tied(name: str, tmp_path: Path) -> None:
    model, _ = make(name)
    report = pycompress.quantize_(model, layers="all")
    reasons = {row.name: row.reason for row in report.layers if row.action == "left"}
    assert "tied" in reasons[TIED[name]]
    loaded = _loaded(model, tmp_path)
    for each in (model, loaded):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
        assert type(each.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize(("name", "experts"), [("mixtral", "MixtralExperts"), ("qwen_moe", "Qwen2MoeExperts")])
def test_experts_kept_in_one_parameter_are_reported_with_their_size(name: str, experts: str) -> None:
    model, _ = make(name)
    parameters = dict(model.named_parameters())
    names = [key for key, parameter in parameters.items() if parameter.dim() == 3]
    if not names:
        pytest.skip("this version of transformers keeps experts as layers")
    report = pycompress.quantize_(model, layers="all")
    rows = {row.name: row for row in report.others}
    for key in names:
        row, parameter = rows[key], parameters[key]
        assert row.shape == tuple(parameter.shape)
        assert row.bytes_after == parameter.numel() * 4
        assert experts in row.reason
    assert "experts.gate_up_proj" in str(report)


def test_a_weight_that_code_reads_is_left() -> None:
    model, _ = make("vit")
    report = pycompress.quantize_(model, layers="all")
    reasons = {row.name: row.reason for row in report.layers}
    assert "ViTModel.forward reads its weight" in reasons["vit.embeddings.patch_embeddings.projection"]
    model, _ = make("t5")
    assert any(row.name.endswith("wo") and row.action == "swapped" for row in pycompress.quantize_(model).layers)
    model, _ = make("t5")
    report = pycompress.quantize_(model, "int4")  # T5 casts its activations to the dtype of this weight
    assert all("reads its weight" in row.reason for row in report.layers if row.name.endswith("wo"))
