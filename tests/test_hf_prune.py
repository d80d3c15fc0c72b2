"""Every family of tests/hf_models.py: pruned, made sparse, saved and loaded to the bit, by transformers and by us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import pycompress
from pycompress.nn import MaskedLinear, SparseLinear
from tests.hf_models import HUGGING_FACE, make, run, same

pytest.importorskip("pycompress.hf")
pytestmark = pytest.mark.usefixtures("one_thread")

# Relative errors of the outputs: of float sparse layers that of another order of summation.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.03}


def _masked(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module) is MaskedLinear}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_pruned_then_sparse(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    dtype = ("float32", "int8", "bfloat16")[list(HUGGING_FACE).index(name) % 3]
    report = pycompress.prune_(model, 0.6)
    assert report.layers
    assert all(row.reason for row in report.layers if row.action == "left")
    masked = _masked(model)
    assert masked
    for module in masked.values():
        assert not module.weight[~module.mask].any()
    kept = sum(int(module.mask.sum()) for module in masked.values())
    assert kept / sum(module.mask.numel() for module in masked.values()) == pytest.approx(0.4, abs=0.01)
    outputs = run(model, inputs)
    _check(model, inputs, tmp_path / "pruned")

    report = pycompress.sparsify_(model, dtype=dtype)
    for layer in masked:
        row = next(row for row in report.layers if layer in (row.name, *row.aliases))
        assert (type(model.get_submodule(layer)) is SparseLinear) == (row.action == "swapped"), row
        assert row.action == "swapped" or row.reason
    for new, old in zip(run(model, inputs), outputs, strict=True):
        assert float((new - old).norm() / old.norm()) < TOLERANCE[dtype]
    _check(model, inputs, tmp_path / "sparse")


def _check(model: Any, inputs: Any, folder: Path) -> None:
    """Saved by either, it is loaded by transformers to the bit; what we saved by us too."""
    expected = run(model, inputs)
    model.save_pretrained(folder / "theirs")
    pycompress.save_pretrained(model, folder / "ours")
    for each in ("theirs", "ours"):
        loaded, info = type(model).from_pretrained(folder / each, output_loading_info=True)
        assert not any(info.values()), info
        assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
        assert same(run(loaded, inputs), expected)
    assert same(run(pycompress.load_pretrained(folder / "ours"), inputs), expected)
