"""Checkpoints of compressed-tensors, the format of llm-compressor, vLLM and transformers, written and read.

>>> pycompress.export_compressed_tensors(model, "folder")           # model.safetensors and config.json
>>> pycompress.import_compressed_tensors("folder", fresh_model)     # Int8Linear, Int4Linear, SparseLinear

The library itself is not needed. ``formats.py`` says how tensors correspond, ``config.py`` reads and writes what
config.json tells of them.
"""

from __future__ import annotations

from pycompress.compressed_tensors.config import CompressedTensorsError
from pycompress.compressed_tensors.exporter import ExportReport, export_compressed_tensors
from pycompress.compressed_tensors.importer import import_compressed_tensors

__all__ = ["CompressedTensorsError", "ExportReport", "export_compressed_tensors", "import_compressed_tensors"]
