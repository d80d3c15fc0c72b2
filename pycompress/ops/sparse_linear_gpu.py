"""Sparse linear layer on a GPU: what the CUDA and the Triton backend share around their kernels.

=======  ===================================================  =========================================================
form     what it is there                                     who multiplies it
=======  ===================================================  =========================================================
bitmap   bitmap and values, ``row_start`` on the device       CUDA, Triton
index    blocks of 64, 32 or 16; or two of every four:        Triton; CUDA
         ``sparse_linear_forms.py``
dense    plain (N, K) on the device                           ``F.linear`` (cuBLAS); int8: int8_linear, same backend
=======  ===================================================  =========================================================

What a call was not given is made on the spot, which waits for the device. Given all of it, no call waits for anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pycompress import gpu
from pycompress.ops import int8_matmul
from pycompress.ops.sparse_linear_cuda import MOST_INT8_K, cuda_sparse_linear, cuda_sparse_missing, pack_2to4
from pycompress.ops.sparse_linear_forms import (
    BLOCK,
    KIND_NAMES,
    TWO_OF_FOUR,
    block_of,
    check_form,
    is_2to4,
    kept_blocks,
    pack_blocks,
)
from pycompress.ops.sparse_linear_reference import BITMAP, DENSE, INDEX, MOST, Call, dense_linear
from pycompress.ops.sparse_linear_weight import sparse_to_dense, validate_sparse

GPU_BACKENDS = ("cuda", "triton")
MISSING = {"cuda": gpu.cuda_missing, "triton": gpu.triton_missing}  # why a tensor is none of theirs
_KINDS = {"cuda": TWO_OF_FOUR, "triton": BLOCK}  # of the index form, that they multiply


def gpu_backends(tensor: Tensor, backend: str) -> tuple[str, ...]:
    """Those of the GPU backends that can take calls with this tensor, where `backend` is what was asked for."""
    asked = GPU_BACKENDS if backend == "auto" else (backend,)
    return tuple(name for name in asked if name in MISSING and MISSING[name](tensor) is None)


# ---- rows of the table --------------------------------------------------------------------------------------------


def cuda_missing(call: Call) -> str | None:
    """Why the CUDA backend cannot take a call, or None."""
    reason = gpu.cuda_missing(call.x)
    if reason is not None:
        return reason
    if call.format() == INDEX and call.index is None and _is_for_triton(call):
        return "the mask is of blocks, which the Triton kernels multiply"
    return None if call.format() == DENSE else cuda_sparse_missing(call)


def _is_for_triton(call: Call) -> bool:
    return gpu.triton_missing(call.x) is None and block_of(call.bitmap, call.x.shape[-1]) is not None


def triton_missing(call: Call) -> str | None:
    """Why the Triton backend cannot take a call, or None."""
    reason = gpu.triton_missing(call.x)
    if reason is not None or call.format() == DENSE:
        return reason
    from pycompress.kernels.sparse_linear import missing

    return missing(call)


def run_cuda(call: Call) -> Tensor:
    return _run(call, "cuda", cuda_sparse_linear)


def run_triton(call: Call) -> Tensor:
    from pycompress.kernels.sparse_linear import sparse_linear

    return _run(call, "triton", sparse_linear)


def _run(call: Call, backend: str, kernels: Callable[[Call], Tensor]) -> Tensor:
    if call.format() == DENSE:
        return _dense(call, backend)
    return kernels(with_forms(call, backend))


def with_forms(call: Call, backend: str) -> Call:
    """The call with row_start, and with the index form where it takes that; as bitmap where its mask has none.

    Raises:
        ValueError: a damaged weight or index.
    """
    bitmap, values, k = call.bitmap, call.values, call.x.shape[-1]
    if call.row_start is None:
        call = replace(call, row_start=validate_sparse(bitmap, values, bitmap.shape[0], k))
    if call.format() == BITMAP:
        return call
    if call.index is not None:
        check_form(call.index, bitmap, values, k)
        return call
    index = make_index(bitmap, values, k, (backend,))
    return replace(call, choice=(MOST, BITMAP)) if index is None else replace(call, index=index, choice=(MOST, INDEX))


def _dense(call: Call, backend: str) -> Tensor:
    weight = call.dense
    if weight is None:
        weight = sparse_to_dense(call.bitmap, call.values, call.x.shape[-1])
    if call.values.dtype != torch.int8:
        return dense_linear(call.x, weight, call.bias, call.activation)
    dense = call.int8(weight)
    return int8_matmul.pick(backend, dense).run(dense)


# ---- forms ----------------------------------------------------------------------------------------------------------


def make_index(bitmap: Tensor, values: Tensor, k: int, backends: tuple[str, ...]) -> Tensor | None:
    """The index form for many tokens, on the weight's device: blocks where the mask is of mostly full ones, else two of
    every four where no group keeps more; None where it has neither structure, or none of the backends multiplies it.
    """
    structure, _ = structure_of(bitmap, values, k, backends)
    if structure.startswith("block"):
        return pack_blocks(bitmap, values, k, int(structure.removeprefix("block")))
    if structure:
        return pack_2to4(bitmap, values, k)
    return None


def structure_of(bitmap: Tensor, values: Tensor, k: int, backends: tuple[str, ...]) -> tuple[str, int]:
    """ "block64", "block32", "block16", "2:4" or "", and how many places of the weight that form stores."""
    kinds = {_KINDS[name] for name in backends}
    block = block_of(bitmap, k) if BLOCK in kinds else None
    if block is not None:
        return f"block{block}", kept_blocks(bitmap, k, block) * block * block
    # mma.sp has no float32.
    fits = values.numel() > 0 and values.dtype != torch.float32 and (values.dtype != torch.int8 or k <= MOST_INT8_K)
    if TWO_OF_FOUR in kinds and fits and is_2to4(bitmap, k):
        return KIND_NAMES[TWO_OF_FOUR], bitmap.shape[0] * -(-k // 4) * 2
    return "", 0
