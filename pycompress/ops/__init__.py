"""Operators: plain functions on tensors, registered with torch so that they compile, export and differentiate."""

from pycompress.ops.distill_loss import DISTILL_BACKENDS, DistillLossParts, distill_loss
from pycompress.ops.distill_loss_call import DIVERGENCES, REDUCTIONS, TopKLogits
from pycompress.ops.distill_loss_native import distill_kernel_name
from pycompress.ops.fake_quant import fake_quant_linear
from pycompress.ops.int8_matmul import BACKENDS, MODES, int8_linear
from pycompress.ops.int8_matmul_weight import (
    affine_qparams,
    kernel_name,
    pack_weight,
    quantize_weight,
    unpack_weight,
)
from pycompress.ops.linear_common import ACTIVATIONS
from pycompress.ops.linear_distill_loss import linear_distill_loss
from pycompress.ops.sparse_linear import FORMATS, SPARSE_BACKENDS, sparse_linear
from pycompress.ops.sparse_linear_weight import (
    SPARSE_DTYPES,
    pack_index,
    row_starts,
    sparse_from_dense,
    sparse_kernel_names,
    sparse_to_dense,
    validate_sparse,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "DISTILL_BACKENDS",
    "DIVERGENCES",
    "FORMATS",
    "MODES",
    "REDUCTIONS",
    "SPARSE_BACKENDS",
    "SPARSE_DTYPES",
    "DistillLossParts",
    "TopKLogits",
    "affine_qparams",
    "distill_kernel_name",
    "distill_loss",
    "fake_quant_linear",
    "int8_linear",
    "kernel_name",
    "linear_distill_loss",
    "pack_index",
    "pack_weight",
    "quantize_weight",
    "row_starts",
    "sparse_from_dense",
    "sparse_kernel_names",
    "sparse_linear",
    "sparse_to_dense",
    "unpack_weight",
    "validate_sparse",
]
