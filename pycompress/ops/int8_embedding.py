"""Embedding with an int8 table as torch operators: checks, backend table, registration.

``int8_embedding``: ``y[..., d] = weight_scale[i] * weight[i, d]`` for each index ``i``, gathered and scaled in one
pass.

``int8_embedding_bag``: the same rows reduced by bags, as ``nn.EmbeddingBag`` does: ``"sum"`` (each row times the weight
of its sample, where there are any), ``"mean"``, ``"max"``. An index equal to ``padding_idx`` is no term of its bag; a
bag without terms gives 0.

The contract of the kernels is ``csrc/int8_embedding/int8_embedding.h``; ``int8_embedding_reference.py`` is the same in
torch and runs on any device. The int8 table has no gradient; the weights of the samples have one.

=============  ====================================================================================================
backend        runs
=============  ====================================================================================================
native         on the CPU
reference      anywhere; on a GPU it is torch's own gathering of int8 rows, followed by one product
=============  ====================================================================================================

An index outside the table raises ``IndexError`` before anything is read. On a GPU, where a check would wait for the
device, torch's own assertion speaks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import DTYPE_CODES
from pycompress.ops.backend import Backend, Backends
from pycompress.ops.int8_embedding_reference import (
    REDUCTIONS,
    Bags,
    Lookup,
    bag_of_each,
    reference_int8_embedding,
    reference_int8_embedding_bag,
)
from pycompress.ops.linear_common import check_devices, check_option

_REDUCTION_CODES = {"sum": 1, "mean": 2, "max": 3}
_INDICES = (torch.int64, torch.int32)


# ---- native ---------------------------------------------------------------------------------------------------


def native_int8_embedding(call: Lookup) -> Tensor:
    """The native backend: checked arguments, on the CPU."""
    return run_rows(plan_of(call.weight, call.weight_scale), call.indices, call.weight.shape[1], call.dtype)


def plan_of(weight: Tensor, weight_scale: Tensor) -> _C.EmbeddingPlan:
    """The table as addresses: both tensors, contiguous, must outlive the plan."""
    v, d = weight.shape
    return _C.EmbeddingPlan(weight.data_ptr(), v, d, weight_scale.data_ptr())


def run_rows(plan: _C.EmbeddingPlan, indices: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """The rows of ``indices``, int64 or int32 on the CPU."""
    index = indices.contiguous()
    y = torch.empty((*indices.shape, d), dtype=dtype)
    wide = index.dtype is torch.int64
    plan.run_rows(index.data_ptr(), wide, index.numel(), DTYPE_CODES[dtype], y.data_ptr(), torch.get_num_threads())
    return y


def native_int8_embedding_bag(call: Bags) -> Tensor:
    """The native backend: checked arguments, on the CPU."""
    if call.bags == 0:  # offsets without memory would mean that there are none
        return reference_int8_embedding_bag(call)
    weights = None if call.weights is None else call.weights.detach().to(torch.float32).contiguous()
    y = torch.empty((call.bags, call.weight.shape[1]), dtype=call.dtype)
    plan_of(call.weight, call.weight_scale).run_bags(
        call.indices.data_ptr(),
        call.indices.dtype is torch.int64,
        call.indices.numel(),
        0 if call.offsets is None else call.offsets.data_ptr(),
        call.bags,
        _REDUCTION_CODES[call.mode],
        call.padding,
        0 if weights is None else weights.data_ptr(),
        DTYPE_CODES[call.dtype],
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


# ---- backend tables -------------------------------------------------------------------------------------------


def _native_missing(call: Lookup | Bags) -> str | None:
    device = call.indices.device
    return None if device.type == "cpu" else f"the indices are on {device}, the native kernels run on the CPU"


_ROWS_TABLE = Backends(
    "int8_embedding",
    Backend("native", _native_missing, native_int8_embedding),
    Backend("reference", lambda call: None, reference_int8_embedding),
)
_BAGS_TABLE = Backends(
    "int8_embedding_bag",
    Backend("native", _native_missing, native_int8_embedding_bag),
    Backend("reference", lambda call: None, reference_int8_embedding_bag),
)
EMBEDDING_BACKENDS = _ROWS_TABLE.names
pick_rows = _ROWS_TABLE.pick


def embedding_kernel_name() -> str:
    """Name of the native kernel that runs here, e.g. ``int8_embedding_avx512``."""
    return str(_C.embedding_kernel_name())


# ---- checks ---------------------------------------------------------------------------------------------------


def check_embedding_options(op: str, dtype: torch.dtype, backend: str) -> None:
    """Raises ``ValueError`` for a dtype that is no result's, or a name that is not in EMBEDDING_BACKENDS."""
    if dtype not in DTYPE_CODES:
        raise ValueError(f"{op}: dtype={dtype}, expected float32, bfloat16 or float16")
    check_option(op, "backend", backend, EMBEDDING_BACKENDS)


def check_table(op: str, weight: Tensor, scale: Tensor) -> None:
    """Raises ``ValueError`` unless these are an int8 table and its scales."""
    if weight.dtype != torch.int8 or weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(f"{op}: weight has {weight.dtype} {tuple(weight.shape)}, expected contiguous int8 (V, D)")
    if scale.dtype != torch.float32 or scale.shape != weight.shape[:1] or not scale.is_contiguous():
        raise ValueError(
            f"{op}: weight_scale has {scale.dtype} {tuple(scale.shape)}, expected contiguous float32 "
            f"({weight.shape[0]},)"
        )


def _check_call(op: str, weight: Tensor, scale: Tensor, indices: Tensor, dtype: torch.dtype, backend: str) -> None:
    check_embedding_options(op, dtype, backend)
    check_table(op, weight, scale)
    if indices.dtype not in _INDICES or indices.layout is not torch.strided:
        raise ValueError(f"{op}: the indices are {indices.dtype}, {indices.layout}, expected dense int64 or int32")
    check_devices(op, indices, weight=weight, weight_scale=scale)


def _bags(
    weight: Tensor,
    weight_scale: Tensor,
    bags_of: tuple[Tensor, Tensor | None, Tensor | None, bool],
    mode: str,
    dtype: torch.dtype,
    padding_idx: int,
    backend: str,
) -> Bags:
    """The arguments, checked as far as shapes and dtypes tell.

    bags_of: indices, offsets, per_sample_weights and include_last_offset.
    """
    op, (indices, offsets, per_sample_weights, include_last_offset) = "int8_embedding_bag", bags_of
    _check_call(op, weight, weight_scale, indices, dtype, backend)
    check_option(op, "mode", mode, REDUCTIONS)
    check_devices(op, indices, offsets=offsets, per_sample_weights=per_sample_weights)
    if indices.dim() not in (1, 2):
        raise ValueError(
            f"{op}: the indices are {tuple(indices.shape)}, expected (count,) with offsets, or (bags, count)"
        )
    if (indices.dim() == 1) != (offsets is not None):
        raise ValueError(
            f"{op}: the indices are {tuple(indices.shape)} and there are {'no ' if offsets is None else ''}offsets; "
            "1-D indices need offsets, 2-D ones are bags of equal size and take none"
        )
    if per_sample_weights is not None and mode != "sum":
        raise ValueError(f"{op}: per_sample_weights with mode={mode!r}; they belong to mode='sum'")
    if per_sample_weights is not None and (
        per_sample_weights.shape != indices.shape or per_sample_weights.dtype not in DTYPE_CODES
    ):
        raise ValueError(
            f"{op}: per_sample_weights are {per_sample_weights.dtype} {tuple(per_sample_weights.shape)}, expected "
            f"float32, bfloat16 or float16 {tuple(indices.shape)}, as the indices"
        )
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    if offsets is None:
        bags, flat = indices.shape[0], indices.contiguous().reshape(-1)
        return Bags(weight, weight_scale, flat, None, bags, mode, dtype, weights, padding_idx)
    if offsets.dtype not in _INDICES or offsets.dim() != 1:
        raise ValueError(f"{op}: offsets are {offsets.dtype} {tuple(offsets.shape)}, expected 1-D int64 or int32")
    if include_last_offset and offsets.shape[0] == 0:
        raise ValueError(f"{op}: offsets are empty; with include_last_offset there is at least one, the end")
    if offsets.dtype != indices.dtype:
        offsets, indices = offsets.long(), indices.long()
    bags = offsets.shape[0] - include_last_offset
    starts = offsets[:bags].contiguous()
    return Bags(weight, weight_scale, indices.contiguous(), starts, bags, mode, dtype, weights, padding_idx)


# ---- registration ---------------------------------------------------------------------------------------------

_LIB = torch.library.Library("pycompress", "FRAGMENT")
_LIB.define(
    "int8_embedding(Tensor weight, Tensor weight_scale, Tensor indices, ScalarType dtype, str backend='auto') "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "int8_embedding_bag(Tensor weight, Tensor weight_scale, Tensor indices, Tensor? offsets, str mode, "
    "ScalarType dtype, Tensor? per_sample_weights=None, bool include_last_offset=False, int padding_idx=-1, "
    "str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(
    weight: Tensor, weight_scale: Tensor, indices: Tensor, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    _check_call("int8_embedding", weight, weight_scale, indices, dtype, backend)
    call = Lookup(weight, weight_scale, indices, dtype)
    return pick_rows(backend, call).run(call)


def _fake(
    weight: Tensor, weight_scale: Tensor, indices: Tensor, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    _check_call("int8_embedding", weight, weight_scale, indices, dtype, backend)
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)


def run_int8_embedding_bag(
    weight: Tensor,
    weight_scale: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    backend: str = "auto",
) -> Tensor:
    """What the operator does, past the dispatcher: for a caller who knows that nothing watches (ops/eager.py)."""
    bags = indices, offsets, per_sample_weights, include_last_offset
    call = _bags(weight, weight_scale, bags, mode, dtype, padding_idx, backend)
    if include_last_offset and offsets is not None and offsets.device.type == "cpu":
        last, count = int(offsets[-1]), call.indices.shape[0]
        if last != count:
            raise ValueError(
                f"int8_embedding_bag: the last offset is {last}, expected {count}, the number of indices, where the "
                "last bag ends; or use include_last_offset=False"
            )
    return _BAGS_TABLE.pick(backend, call).run(call)


def _fake_bag(
    weight: Tensor,
    weight_scale: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    backend: str = "auto",
) -> Tensor:
    bags = indices, offsets, per_sample_weights, include_last_offset
    call = _bags(weight, weight_scale, bags, mode, dtype, padding_idx, backend)
    return weight.new_empty((call.bags, weight.shape[1]), dtype=dtype)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    weight, weight_scale, indices, offsets, _, _, per_sample_weights, include_last_offset, padding_idx, backend = inputs
    ctx.save_for_backward(weight, weight_scale, indices, offsets, per_sample_weights)
    ctx.options = (include_last_offset, padding_idx, backend)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """To the weights of the samples: the row that a weight multiplied, times the gradient of its bag."""
    weight, weight_scale, indices, offsets, per_sample_weights = ctx.saved_tensors  # type: ignore[attr-defined]
    include_last_offset, padding_idx, backend = ctx.options  # type: ignore[attr-defined]
    grad_weights = None
    if per_sample_weights is not None and ctx.needs_input_grad[6]:  # type: ignore[attr-defined]
        flat, starts = indices.reshape(-1), offsets
        if offsets is not None and include_last_offset:
            starts = offsets[:-1]
        rows = torch.ops.pycompress.int8_embedding.default(weight, weight_scale, flat, torch.float32, backend)
        of_bag = grad.to(torch.float32)[bag_of_each(starts, grad.shape[0], flat)]
        products = (rows * of_bag).sum(-1)
        if padding_idx >= 0:
            products = products * (flat != padding_idx)
        grad_weights = products.to(per_sample_weights.dtype).reshape(per_sample_weights.shape)
    return None, None, None, None, None, None, grad_weights, None, None, None


_LIB.impl("int8_embedding", _run, "CompositeExplicitAutograd")
_LIB.impl("int8_embedding_bag", run_int8_embedding_bag, "CompositeExplicitAutograd")
torch.library.register_fake("pycompress::int8_embedding", _fake, lib=_LIB)
torch.library.register_fake("pycompress::int8_embedding_bag", _fake_bag, lib=_LIB)
torch.library.register_autograd("pycompress::int8_embedding_bag", _backward, setup_context=_setup_context, lib=_LIB)


def int8_embedding(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """The rows of an int8 table, times their scales.

    Args:
        indices: int64 or int32 of any shape, each in 0 to V-1.
        weight: int8 ``(V, D)``; :func:`quantize_weight` makes it and its scales.
        weight_scale: float32 ``(V,)``.
        dtype: of the result: float32, bfloat16 or float16; the product is rounded once.
        backend: ``"auto"``, ``"native"`` or ``"reference"``; a named one runs or raises.

    Returns:
        ``(*indices.shape, D)`` of ``dtype``.

    Raises:
        IndexError: an index outside the table (nothing was read).
        ValueError: any other argument that does not fit.
    """
    return torch.ops.pycompress.int8_embedding.default(weight, weight_scale, indices, dtype, backend)


def int8_embedding_bag(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: str = "mean",
    dtype: torch.dtype = torch.float32,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bags of rows of an int8 table, reduced, as ``F.embedding_bag`` does with a float one.

    Args:
        indices: int64 or int32: ``(count,)`` with offsets, or ``(bags, count)``.
        weight, weight_scale, dtype, backend: as of :func:`int8_embedding`; sums are float32.
        offsets: ``(bags,)`` (one more with ``include_last_offset``): where each bag starts; 0 first, never falling.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        per_sample_weights: as the indices, for ``"sum"`` only; a gradient flows to them.
        padding_idx: 0 to V-1: indices equal to it are left out.

    Returns:
        ``(bags, D)`` of ``dtype``; a bag without terms gives 0.

    Raises:
        IndexError: an index outside the table (nothing was read).
        ValueError: any other argument that does not fit, falling offsets among them.
    """
    padding = -1 if padding_idx is None else padding_idx
    return torch.ops.pycompress.int8_embedding_bag.default(
        weight, weight_scale, indices, offsets, mode, dtype, per_sample_weights, include_last_offset, padding, backend
    )
