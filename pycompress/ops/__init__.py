"""Operators: plain functions on tensors, registered with torch so that they compile, export and differentiate."""

from pycompress.ops.int8_matmul import ACTIVATIONS, BACKENDS, MODES, int8_linear
from pycompress.ops.int8_matmul_weight import (
    affine_qparams,
    kernel_name,
    pack_weight,
    quantize_weight,
    unpack_weight,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "MODES",
    "affine_qparams",
    "int8_linear",
    "kernel_name",
    "pack_weight",
    "quantize_weight",
    "unpack_weight",
]
