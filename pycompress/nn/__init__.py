"""Drop-in modules."""

from pycompress.nn.int8_linear import Int8Linear

__all__ = ["Int8Linear"]
