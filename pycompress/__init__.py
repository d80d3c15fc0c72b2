"""Compression kernels for PyTorch, in drop-in modules.

>>> import pycompress
>>> report = pycompress.quantize_(model)          # nn.Linear -> pycompress.nn.Int8Linear, in place
"""

from pycompress import nn, ops, peaks
from pycompress.calibration import Calibration, calibrate
from pycompress.convert import QuantizeReport, quantize_
from pycompress.version import __version__

__all__ = ["Calibration", "QuantizeReport", "__version__", "calibrate", "nn", "ops", "peaks", "quantize_"]
