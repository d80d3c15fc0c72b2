"""Operators: plain functions on tensors, registered with torch so that they compile, export and differentiate."""

from pycompress.codes import ACTIVATIONS, MODES
from pycompress.ops.distill_loss import DISTILL_BACKENDS, DistillLossParts, distill_loss
from pycompress.ops.distill_loss_call import DIVERGENCES, REDUCTIONS, TopKLogits
from pycompress.ops.distill_loss_native import distill_kernel_name
from pycompress.ops.fake_quant import fake_quant_linear
from pycompress.ops.int4_matmul import INT4_BACKENDS, int4_linear
from pycompress.ops.int4_matmul_weight import FORMATS as INT4_FORMATS
from pycompress.ops.int4_matmul_weight import (
    dequantize_weight_int4,
    int4_kernel_name,
    pack_weight_int4,
    quantize_weight_int4,
    unpack_weight_int4,
)
from pycompress.ops.int8_conv2d import CONV_BACKENDS, int8_conv2d
from pycompress.ops.int8_conv2d_weight import (
    conv_kernel_name,
    pack_conv_weight,
    quantize_conv_weight,
    unpack_conv_weight,
)
from pycompress.ops.int8_embedding import (
    EMBEDDING_BACKENDS,
    embedding_kernel_name,
    int8_embedding,
    int8_embedding_bag,
)
from pycompress.ops.int8_matmul import BACKENDS, int8_linear
from pycompress.ops.int8_matmul_weight import (
    affine_qparams,
    kernel_name,
    pack_weight,
    quantize_weight,
    unpack_weight,
)
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
    "CONV_BACKENDS",
    "DISTILL_BACKENDS",
    "DIVERGENCES",
    "EMBEDDING_BACKENDS",
    "FORMATS",
    "INT4_BACKENDS",
    "INT4_FORMATS",
    "MODES",
    "REDUCTIONS",
    "SPARSE_BACKENDS",
    "SPARSE_DTYPES",
    "DistillLossParts",
    "TopKLogits",
    "affine_qparams",
    "conv_kernel_name",
    "dequantize_weight_int4",
    "distill_kernel_name",
    "distill_loss",
    "embedding_kernel_name",
    "fake_quant_linear",
    "int4_kernel_name",
    "int4_linear",
    "int8_conv2d",
    "int8_embedding",
    "int8_embedding_bag",
    "int8_linear",
    "kernel_name",
    "linear_distill_loss",
    "pack_conv_weight",
    "pack_index",
    "pack_weight",
    "pack_weight_int4",
    "quantize_conv_weight",
    "quantize_weight",
    "quantize_weight_int4",
    "row_starts",
    "sparse_from_dense",
    "sparse_kernel_names",
    "sparse_linear",
    "sparse_to_dense",
    "unpack_conv_weight",
    "unpack_weight",
    "unpack_weight_int4",
    "validate_sparse",
]
