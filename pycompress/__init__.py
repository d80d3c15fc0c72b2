"""Compression kernels for PyTorch, in drop-in modules.

>>> import pycompress
>>> report = pycompress.quantize_(model)          # nn.Linear -> pycompress.nn.Int8Linear, in place
>>> report = pycompress.prune_(model, 0.8)        # nn.Linear -> pycompress.nn.MaskedLinear, to be trained
>>> report = pycompress.sparsify_(model)          # and to pycompress.nn.SparseLinear, to be run
>>> result = pycompress.compress(model, "recipe.yaml", ...)  # all of it in stages: prune, distil, quantise, evaluate

Every name is imported when it is first asked for: ``pycompress.native`` needs no torch, and most programs need neither
pydantic, yaml nor jinja2.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from pycompress.after_torch import register_operators
from pycompress.version import __version__

if TYPE_CHECKING:
    from pycompress import cost_model, native, nn, ops, peaks
    from pycompress.calibration import Calibration, calibrate
    from pycompress.checkpoint import CheckpointReport, load_pretrained, save_pretrained
    from pycompress.compressed_tensors import export_compressed_tensors, import_compressed_tensors
    from pycompress.convert import QuantizeReport, quantize_
    from pycompress.cost_model import calibrate_cost_model
    from pycompress.low_rank import FactorizeReport, factorize_
    from pycompress.model_file import load_model, save_model
    from pycompress.pruning import PruneReport, PruningSchedule, ShrinkReport, prune_, shrink_
    from pycompress.qat import QatReport, prepare_qat_
    from pycompress.recipe import Recipe, RecipeError
    from pycompress.sensitivity import SensitivityReport, sensitivity
    from pycompress.smooth import SmoothReport, smooth_
    from pycompress.sparsify import SparsifyReport, sparsify_
    from pycompress.workflow import CompressError, CompressResult, compress

__all__ = [
    "Calibration",
    "CheckpointReport",
    "CompressError",
    "CompressResult",
    "FactorizeReport",
    "PruneReport",
    "PruningSchedule",
    "QatReport",
    "QuantizeReport",
    "Recipe",
    "RecipeError",
    "SensitivityReport",
    "ShrinkReport",
    "SmoothReport",
    "SparsifyReport",
    "__version__",
    "calibrate",
    "calibrate_cost_model",
    "compress",
    "cost_model",
    "export_compressed_tensors",
    "factorize_",
    "import_compressed_tensors",
    "load_model",
    "load_pretrained",
    "native",
    "nn",
    "ops",
    "peaks",
    "prepare_qat_",
    "prune_",
    "quantize_",
    "save_model",
    "save_pretrained",
    "sensitivity",
    "shrink_",
    "smooth_",
    "sparsify_",
]

_HOME = {  # of each public name that is not a module
    "Calibration": "calibration",
    "CheckpointReport": "checkpoint",
    "CompressError": "workflow",
    "CompressResult": "workflow",
    "FactorizeReport": "low_rank",
    "PruneReport": "pruning",
    "PruningSchedule": "pruning",
    "QatReport": "qat",
    "QuantizeReport": "convert",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "SensitivityReport": "sensitivity",
    "ShrinkReport": "pruning",
    "SmoothReport": "smooth",
    "SparsifyReport": "sparsify",
    "calibrate": "calibration",
    "calibrate_cost_model": "cost_model",
    "compress": "workflow",
    "export_compressed_tensors": "compressed_tensors",
    "factorize_": "low_rank",
    "import_compressed_tensors": "compressed_tensors",
    "load_model": "model_file",
    "load_pretrained": "checkpoint",
    "prepare_qat_": "qat",
    "prune_": "pruning",
    "quantize_": "convert",
    "save_model": "model_file",
    "save_pretrained": "checkpoint",
    "sensitivity": "sensitivity",
    "shrink_": "pruning",
    "smooth_": "smooth",
    "sparsify_": "sparsify",
}


class _Package(ModuleType):
    """Importing a submodule sets it as an attribute; where a function has its name, the attribute is the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    if name in __all__ and name != "native":
        # Before any module here is locked for its import: importing torch imports pycompress.ops, see after_torch.py,
        # and two threads that began at opposite ends would wait for each other.
        importlib.import_module("torch")
    if name in _HOME:
        value = getattr(importlib.import_module(f"pycompress.{_HOME[name]}"), name)
    elif name.startswith("__") or "." in name or importlib.util.find_spec(f"pycompress.{name}") is None:
        raise AttributeError(f"module 'pycompress' has no attribute {name!r}")
    else:
        value = importlib.import_module(f"pycompress.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register_operators()
