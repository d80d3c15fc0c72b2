"""A compressed model in a folder: safetensors shards, and pycompress.json that says what each layer is.

>>> print(pycompress.save_pretrained(model, "folder"))  # sizes, tensor by tensor; compact=True: the smallest form
>>> model = pycompress.load_pretrained("folder")         # a Hugging Face model, from its configuration
>>> pycompress.load_pretrained("folder", model)          # any model, built as the saved one: float or on meta
"""

from pycompress.checkpoint.load import load_pretrained, read_pretrained_header
from pycompress.checkpoint.save import CheckpointReport, pretrained_sizes, save_pretrained

__all__ = ["CheckpointReport", "load_pretrained", "pretrained_sizes", "read_pretrained_header", "save_pretrained"]
