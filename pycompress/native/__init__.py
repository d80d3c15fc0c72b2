"""The native kernels from numpy arrays, without torch.

>>> from pycompress import native
>>> q, scale = native.quantize_weight(weight)                      # float (N, K) -> int8 (N, K), float32 (N,)
>>> layer = native.Int8Linear(q, scale, bias, activation="gelu")   # packed once for this CPU
>>> y = layer(x)                                                   # (..., K) -> (..., N), x's dtype
>>> layers = native.load_layers("model.safetensors")               # what save_model or save_pretrained wrote

Needs numpy and the wheel of pycompress, nothing else: neither ``import pycompress`` nor this module imports torch. The
results are those of ``pycompress.nn``, bit by bit: the same kernels run on the same packed weights.
"""

from pycompress.native.files import load_arrays, load_layers
from pycompress.native.int4_linear import Int4Linear
from pycompress.native.int8_linear import Int8Linear, quantize_weight
from pycompress.native.runtime import available_isas, get_num_threads, selected_isa, set_num_threads
from pycompress.native.sparse_linear import SparseLinear

__all__ = [
    "Int4Linear",
    "Int8Linear",
    "SparseLinear",
    "available_isas",
    "get_num_threads",
    "load_arrays",
    "load_layers",
    "quantize_weight",
    "selected_isa",
    "set_num_threads",
]
