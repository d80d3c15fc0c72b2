"""The forms of its weight that a ``SparseLinear`` holds besides bitmap and values: those that its choices name.

Who computes decides what they are: the native kernels, or the GPU backends that can, see
``pycompress/ops/sparse_linear_gpu.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pycompress import ops
from pycompress.ops.sparse_linear_eager import Forms
from pycompress.ops.sparse_linear_forms import BLOCK, KIND_NAMES, form_header
from pycompress.ops.sparse_linear_gpu import gpu_backends, make_index
from pycompress.ops.sparse_linear_reference import BITMAP, DENSE, INDEX, dense_dtype
from pycompress.ops.sparse_linear_weight import bitmap_kernel_name, index_info

if TYPE_CHECKING:
    from pycompress.nn.sparse_linear import SparseLinear


NATIVE = ("native",)


def backends_of(values: Tensor, backend: str) -> tuple[str, ...]:
    """Who computes with these values, best first: NATIVE, GPU backends, or nobody who wants a form of them."""
    if values.device.type == "cpu" and backend in ("auto", "native"):
        return NATIVE if values.dtype != torch.float16 else ()
    return () if values.is_meta else gpu_backends(values, backend)


def make_forms(
    state: tuple[Tensor, Tensor, Tensor | None],
    row_start: Tensor,
    choices: Mapping[int, tuple[int, ...]],
    layer: SparseLinear,
    backends: tuple[str, ...] = NATIVE,
) -> Forms:
    """state: checked bitmap, values and scale. choices: by number of threads, which on a GPU changes nothing."""
    bitmap, values, _ = state
    k, native = layer.in_features, backends == NATIVE
    index = dense = None
    if INDEX in _codes(choices):
        index = ops.pack_index(bitmap, values, row_start, k) if native else make_index(bitmap, values, k, backends)
        if index is None:  # no list can hold it; on a GPU: its mask has neither blocks nor two of every four
            choices = {threads: _without_index(choice, layer.format) for threads, choice in choices.items()}
    if DENSE in _codes(choices):
        dense = ops.sparse_to_dense(bitmap, values, k)
        if dense.dtype != torch.int8:
            dense = dense.to(dense_dtype(dense.dtype, dtype_of_x(layer)))
        elif native:
            dense = ops.pack_weight(dense)
    return Forms(state, row_start, index, dense, choices, backends)


def dtype_of_x(layer: SparseLinear) -> torch.dtype:
    """What x will most likely be, and a 16-bit weight is multiplied by only that: the bias tells. Without one: float32
    on the CPU; on a GPU, where layers without a bias are those of language models, what the weight is.
    """
    if layer.bias is not None:
        return layer.bias.dtype
    values = layer.weight_values
    return values.dtype if values.is_cuda and values.dtype != torch.int8 else torch.float32


def kernel_names(layer: SparseLinear, forms: Forms) -> str:
    """Of the kernels that the layer's choice names, in the order of the number of tokens."""
    backends, native = forms.backends, forms.backends == NATIVE

    def name(code: int) -> str:
        if code == BITMAP:
            return bitmap_kernel_name(layer.weight_values.dtype) if native else f"{backends[0]}:bitmap"
        if code == DENSE:
            if layer.dtype != "int8" or forms.dense is None:
                return "torch"
            return ops.kernel_name(forms.dense) if native else f"{backends[0]}:int8"
        if forms.index is None:
            return "none"
        if native:
            return str(index_info(forms.index)["kernel"])
        header = form_header(forms.index)
        return f"triton:block{header.block}" if header.kind == BLOCK else f"cuda:{KIND_NAMES[header.kind]}"

    return "+".join(name(code) for code in dict.fromkeys(layer.choice[1::2]))


def _codes(choices: Mapping[int, tuple[int, ...]]) -> set[int]:
    return {code for choice in choices.values() for code in choice[1::2]}


def _without_index(choice: tuple[int, ...], format: str) -> tuple[int, ...]:
    """The choice for a weight that has no index form: dense there, or bitmap where the index form was asked for."""
    instead = DENSE if format == "auto" else BITMAP
    codes = [instead if code == INDEX else code for code in choice[1::2]]
    return tuple(value for pair in zip(choice[::2], codes, strict=True) for value in pair)
