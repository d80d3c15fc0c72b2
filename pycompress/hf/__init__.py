"""Hugging Face: ``from_pretrained`` and ``save_pretrained`` of compressed models, and a Trainer that distils.

>>> import pycompress.hf                                              # registers with transformers
>>> config = pycompress.hf.PyCompressConfig("dynamic", skip="lm_head")
>>> model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
>>> print(model.hf_quantizer.report)                                  # what became of each layer
>>> model.save_pretrained(folder)
>>> model = AutoModelForCausalLM.from_pretrained(folder)              # compressed as it was, to the bit

Importing this package needs transformers. pycompress imports it by itself where a model of a process that has imported
transformers is compressed; a process that only loads one imports it before ``from_pretrained``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pycompress import hf_support

if reason := hf_support.why_not():
    raise ImportError(f"pycompress.hf: {reason}")

from pycompress.hf.config import PyCompressConfig
from pycompress.hf.quantizer import PyCompressHfQuantizer
from pycompress.hf.saving import load, quantization_config

if TYPE_CHECKING:
    from pycompress.hf.distillation_trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "PyCompressConfig", "PyCompressHfQuantizer", "load", "quantization_config"]


def __getattr__(name: str) -> object:
    if name != "DistillationTrainer":  # transformers.Trainer imports much that loading a model does not need
        raise AttributeError(f"module 'pycompress.hf' has no attribute {name!r}")
    return importlib.import_module("pycompress.hf.distillation_trainer").DistillationTrainer


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
