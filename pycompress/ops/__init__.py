"""Operators: plain functions on tensors, registered with torch so that they compile, export and differentiate."""

from pycompress.ops.distill_loss import DISTILL_BACKENDS, DistillLossParts, distill_loss
from pycompress.ops.distill_loss_call import DIVERGENCES, REDUCTIONS, TopKLogits
from pycompress.ops.distill_loss_native import distill_kernel_name
from pycompress.ops.int8_matmul import ACTIVATIONS, BACKENDS, MODES, int8_linear
from pycompress.ops.int8_matmul_weight import (
    affine_qparams,
    kernel_name,
    pack_weight,
    quantize_weight,
    unpack_weight,
)
from pycompress.ops.linear_distill_loss import linear_distill_loss

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "DISTILL_BACKENDS",
    "DIVERGENCES",
    "MODES",
    "REDUCTIONS",
    "DistillLossParts",
    "TopKLogits",
    "affine_qparams",
    "distill_kernel_name",
    "distill_loss",
    "int8_linear",
    "kernel_name",
    "linear_distill_loss",
    "pack_weight",
    "quantize_weight",
    "unpack_weight",
]
