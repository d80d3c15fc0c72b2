"""Compression kernels for PyTorch, in drop-in modules.

>>> import pycompress
>>> report = pycompress.quantize_(model)          # nn.Linear -> pycompress.nn.Int8Linear, in place
>>> report = pycompress.prune_(model, 0.8)        # nn.Linear -> pycompress.nn.MaskedLinear, to be trained
>>> report = pycompress.sparsify_(model)          # and to pycompress.nn.SparseLinear, to be run
"""

from pycompress import cost_model, nn, ops, peaks
from pycompress.calibration import Calibration, calibrate
from pycompress.convert import QuantizeReport, quantize_
from pycompress.cost_model import calibrate_cost_model
from pycompress.pruning import PruneReport, PruningSchedule, ShrinkReport, prune_, shrink_
from pycompress.sparsify import SparsifyReport, sparsify_
from pycompress.version import __version__

__all__ = [
    "Calibration",
    "PruneReport",
    "PruningSchedule",
    "QuantizeReport",
    "ShrinkReport",
    "SparsifyReport",
    "__version__",
    "calibrate",
    "calibrate_cost_model",
    "cost_model",
    "nn",
    "ops",
    "peaks",
    "prune_",
    "quantize_",
    "shrink_",
    "sparsify_",
]
