"""Compression kernels for PyTorch, in drop-in modules.

>>> import pycompress
>>> report = pycompress.quantize_(model)          # nn.Linear -> pycompress.nn.Int8Linear, in place
>>> report = pycompress.prune_(model, 0.8)        # nn.Linear -> pycompress.nn.MaskedLinear, to be trained
>>> report = pycompress.sparsify_(model)          # and to pycompress.nn.SparseLinear, to be run
>>> result = pycompress.compress(model, "recipe.yaml", ...)  # all of it in stages: prune, distil, quantise, evaluate
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pycompress import cost_model, nn, ops, peaks
from pycompress.calibration import Calibration, calibrate
from pycompress.convert import QuantizeReport, quantize_
from pycompress.cost_model import calibrate_cost_model
from pycompress.low_rank import FactorizeReport, factorize_
from pycompress.pruning import PruneReport, PruningSchedule, ShrinkReport, prune_, shrink_
from pycompress.qat import QatReport, prepare_qat_
from pycompress.sensitivity import SensitivityReport, sensitivity
from pycompress.smooth import SmoothReport, smooth_
from pycompress.sparsify import SparsifyReport, sparsify_
from pycompress.version import __version__

if TYPE_CHECKING:
    from pycompress.model_file import load_model, save_model
    from pycompress.recipe import Recipe, RecipeError
    from pycompress.workflow import CompressError, CompressResult, compress

__all__ = [
    "Calibration",
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
    "factorize_",
    "load_model",
    "nn",
    "ops",
    "peaks",
    "prepare_qat_",
    "prune_",
    "quantize_",
    "save_model",
    "sensitivity",
    "shrink_",
    "smooth_",
    "sparsify_",
]

# What needs pydantic, yaml or jinja2 is imported when it is asked for: most programs only swap layers.
_LAZY = {
    "CompressError": "pycompress.workflow",
    "CompressResult": "pycompress.workflow",
    "Recipe": "pycompress.recipe",
    "RecipeError": "pycompress.recipe",
    "compress": "pycompress.workflow",
    "load_model": "pycompress.model_file",
    "save_model": "pycompress.model_file",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'pycompress' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
