"""Linear layer with a pruned weight as a torch operator: checks, backend table, registration.

``y = act(x @ (W ⊙ mask)^T + bias)``

W is float32, bfloat16, float16 (products and sums in float32; float16 on GPUs and in the reference alone) or int8:
symmetric with one scale an output row, the activations quantised per token, exactly as ``int8_linear`` in dynamic mode.
A weight is kept as a bitmap and the kept values; for the kernels there are up to three forms of it:

=======  ==============================================================  ==========================
form     what it is                                                      fast for
=======  ==============================================================  ==========================
bitmap   bitmap and values as they are, expanded in registers            up to 8 tokens
index    lists of columns, shared by groups of outputs; tokens in lanes  more tokens
         on a GPU: blocks, or two of every four (sparse_linear_gpu.py)
dense    the weight with its zeros: ``F.linear``, or int8_linear's       weights with few zeros
=======  ==============================================================  ==========================

``choice`` says which one computes how many tokens. The contract of the kernels, edge cases included, is
``csrc/sparse_linear/sparse_linear.h``; ``sparse_linear_reference.py`` is the same in torch and runs on any device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import DTYPE_CODES
from pycompress.ops.backend import Backend, Backends
from pycompress.ops.int8_matmul import native_int8_linear
from pycompress.ops.int8_matmul_weight import aligned, pack_weight
from pycompress.ops.linear_common import (
    ACTIVATION_CODES,
    ACTIVATIONS,
    activation_backward,
    autocast_linear,
    bias_backward,
    check_bias,
    check_devices,
    check_input,
    check_option,
)
from pycompress.ops.rows import row_layout
from pycompress.ops.sparse_linear_gpu import cuda_missing, run_cuda, run_triton, triton_missing
from pycompress.ops.sparse_linear_reference import (
    BITMAP,
    DENSE,
    INDEX,
    Call,
    dense_linear,
    reference_sparse_linear,
)
from pycompress.ops.sparse_linear_weight import (
    SPARSE_DTYPES,
    WEIGHT_TYPES,
    expand,
    pack_index,
    runs_here,
    sparse_to_dense,
    validate_sparse,
)

FORMATS = ("auto", "bitmap", "index", "dense")
_OP = "sparse_linear"


# ---- native ---------------------------------------------------------------------------------------------------


def _native_sparse_linear(call: Call) -> Tensor:
    k = call.x.shape[-1]
    form = call.format()
    if form == DENSE:
        return _dense(call, k)
    row_start = call.row_start
    if row_start is None:
        row_start = validate_sparse(call.bitmap, call.values, call.bitmap.shape[0], k)
    elif int(row_start[-1]) != call.values.numel():  # the kernels would read past the values
        raise ValueError(
            f"sparse_linear: row_start is of a weight with {int(row_start[-1])} values, but there are "
            f"{call.values.numel()}; make it again with row_starts"
        )
    index = None
    if form == INDEX:
        index = call.index
        if index is None or not runs_here(index):
            index = pack_index(call.bitmap, call.values, row_start, k)
        form = BITMAP if index is None else INDEX
    index = None if index is None else aligned(index)
    x, layout = row_layout(call.x)
    y = torch.empty((*call.x.shape[:-1], call.bitmap.shape[0]), dtype=x.dtype)
    plan = native_plan(call, row_start, index)
    run = plan.run_index_strided if form == INDEX else plan.run_bitmap_strided
    run(x.data_ptr(), layout, DTYPE_CODES[x.dtype], y.data_ptr(), torch.get_num_threads())
    return y


def _dense(call: Call, k: int) -> Tensor:
    weight = sparse_to_dense(call.bitmap, call.values, k) if call.dense is None else call.dense
    if call.values.dtype != torch.int8:
        return dense_linear(call.x, weight, call.bias, call.activation)
    return native_int8_linear(call.int8(pack_weight(weight) if call.dense is None else weight))


def native_plan(call: Call, row_start: Tensor, index: Tensor | None) -> _C.SparsePlan:
    """All but x and y, as addresses: the tensors must outlive the plan."""
    scale, bias = call.weight_scale, call.bias
    return _C.SparsePlan(
        WEIGHT_TYPES[call.values.dtype],
        call.bitmap.shape[0],
        call.x.shape[-1],
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        ACTIVATION_CODES[call.activation],
        call.bitmap.data_ptr(),
        call.values.data_ptr(),
        row_start.data_ptr(),
        0 if index is None else index.data_ptr(),
        0 if index is None else index.numel(),
    )


# ---- backend table --------------------------------------------------------------------------------------------


def _native_missing(call: Call) -> str | None:
    if call.x.device.type != "cpu":
        return f"x is on {call.x.device}, the native kernels run on the CPU"
    if call.values.dtype == torch.float16:
        return "values are float16, the native kernels take bfloat16; backend='reference' takes both"
    return None


_TABLE = Backends(
    _OP,
    Backend("native", _native_missing, _native_sparse_linear),
    Backend("cuda", cuda_missing, run_cuda),
    Backend("triton", triton_missing, run_triton),
    Backend("reference", lambda call: None, reference_sparse_linear),
)
SPARSE_BACKENDS, pick = _TABLE.names, _TABLE.pick


# ---- checks ---------------------------------------------------------------------------------------------------


def check_options(activation: str, backend: str = "auto", format: str = "auto", dtype: str = "float32") -> None:
    """Raises ``ValueError`` for a name that is not in ACTIVATIONS, SPARSE_BACKENDS, FORMATS or SPARSE_DTYPES."""
    check_option(_OP, "activation", activation, ACTIVATIONS)
    check_option(_OP, "backend", backend, SPARSE_BACKENDS)
    check_option(_OP, "format", format, FORMATS)
    check_option(_OP, "dtype", dtype, tuple(SPARSE_DTYPES))


def check(call: Call) -> None:
    """Everything that can be told from shapes, dtypes and devices."""
    x, bitmap, values = call.x, call.bitmap, call.values
    check_option(_OP, "activation", call.activation, ACTIVATIONS)
    check_input(_OP, x)
    if bitmap.dtype != torch.uint8 or bitmap.dim() != 2 or not bitmap.is_contiguous():
        raise ValueError(
            f"sparse_linear: bitmap has {bitmap.dtype} {tuple(bitmap.shape)}, expected contiguous uint8 "
            "(N, ceil(K / 8)); sparse_from_dense makes one"
        )
    k = x.shape[-1]
    if bitmap.shape[1] != (k + 7) // 8:
        raise ValueError(
            f"sparse_linear: x has K={k} but bitmap has {bitmap.shape[1]} bytes a row, which is "
            f"K={max(8 * bitmap.shape[1] - 7, 0)} to {8 * bitmap.shape[1]}"
        )
    if values.dtype not in WEIGHT_TYPES or values.dim() != 1 or not values.is_contiguous():
        raise ValueError(
            f"sparse_linear: values have {values.dtype} {tuple(values.shape)}, expected contiguous float32, "
            "bfloat16, float16 or int8 (nnz,)"
        )
    n = bitmap.shape[0]
    _check_scale(call.weight_scale, values, n)
    check_bias(_OP, call.bias, n)
    _check_derived(call, n, k)
    _check_choice(call.choice)
    check_devices(
        _OP, x, bitmap=bitmap, values=values, weight_scale=call.weight_scale, bias=call.bias,
        row_start=call.row_start, index=call.index, dense=call.dense,
    )  # fmt: skip


def _check_scale(scale: Tensor | None, values: Tensor, n: int) -> None:
    if (scale is not None) != (values.dtype == torch.int8):
        raise ValueError(
            f"sparse_linear: values have {values.dtype} and weight_scale is {'missing' if scale is None else 'given'}; "
            "int8 values need one, others take none"
        )
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != (n,) or not scale.is_contiguous()):
        raise ValueError(
            f"sparse_linear: weight_scale has {scale.dtype} {tuple(scale.shape)}, expected contiguous float32 ({n},)"
        )


def _check_derived(call: Call, n: int, k: int) -> None:
    start, index, dense = call.row_start, call.index, call.dense
    if start is not None and (start.dtype != torch.int64 or start.shape != (n + 1,) or not start.is_contiguous()):
        raise ValueError(
            f"sparse_linear: row_start has {start.dtype} {tuple(start.shape)}, expected contiguous int64 ({n + 1},)"
        )
    if index is not None and (index.dtype != torch.uint8 or index.dim() != 1):
        raise ValueError(
            f"sparse_linear: index has {index.dtype} {tuple(index.shape)}, expected the result of pack_index"
        )
    if dense is None:
        return
    if call.values.dtype == torch.int8:
        packed, plain = dense.dtype == torch.uint8 and dense.dim() == 1, dense.dtype == torch.int8
        if not packed and not (plain and dense.shape == (n, k) and dense.is_contiguous()):
            raise ValueError(
                f"sparse_linear: dense has {dense.dtype} {tuple(dense.shape)}, expected the result of pack_weight, or "
                f"contiguous int8 {(n, k)}"
            )
    elif dense.dtype not in (torch.float32, torch.bfloat16, torch.float16) or dense.shape != (n, k):
        raise ValueError(f"sparse_linear: dense has {dense.dtype} {tuple(dense.shape)}, expected floating {(n, k)}")


def _check_choice(choice: Sequence[int]) -> None:
    tokens, codes = choice[::2], choice[1::2]
    if (
        len(tokens) != len(codes)
        or any(code not in (BITMAP, INDEX, DENSE) for code in codes)
        or any(a >= b for a, b in itertools.pairwise(tokens))
    ):
        raise ValueError(
            f"sparse_linear: choice={list(choice)}, expected pairs (most tokens, code of the form: 0 bitmap, 1 index, "
            "2 dense), ascending"
        )


# ---- registration ---------------------------------------------------------------------------------------------

_LIB = torch.library.Library("pycompress", "FRAGMENT")
_LIB.define(
    "sparse_linear(Tensor x, Tensor bitmap, Tensor values, Tensor? weight_scale=None, Tensor? bias=None, "
    "Tensor? row_start=None, Tensor? index=None, Tensor? dense=None, int[] choice=[], str activation='none', "
    "str backend='auto') -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def _run(
    x: Tensor,
    bitmap: Tensor,
    values: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    row_start: Tensor | None = None,
    index: Tensor | None = None,
    dense: Tensor | None = None,
    choice: Sequence[int] = (),
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    call = Call(x, bitmap, values, weight_scale, bias, row_start, index, dense, choice, activation)
    check(call)
    return pick(backend, call).run(call)


def _fake(
    x: Tensor,
    bitmap: Tensor,
    values: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    row_start: Tensor | None = None,
    index: Tensor | None = None,
    dense: Tensor | None = None,
    choice: Sequence[int] = (),
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    check(Call(x, bitmap, values, weight_scale, bias, row_start, index, dense, choice, activation))
    _TABLE.check(backend)
    return x.new_empty((*x.shape[:-1], bitmap.shape[0]))


def _autocast(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return autocast_linear(torch.ops.pycompress.sparse_linear.default, x, *args, **kwargs)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient to x and to bias; int8: straight through the rounding."""
    x, bitmap, values, weight_scale, bias, *derived = ctx.saved_tensors  # type: ignore[attr-defined]
    choice, activation, backend = ctx.options  # type: ignore[attr-defined]
    if activation != "none":
        before = torch.ops.pycompress.sparse_linear.default(
            x, bitmap, values, weight_scale, bias, *derived, choice, "none", backend
        )
        grad = activation_backward(grad, before, activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        # Who gives row_start has checked the weight, and checking it again would wait for a GPU.
        checked = derived[0] is not None
        weight = torch.ops.pycompress.sparse_unpack.default(bitmap, values, weight_scale, x.shape[-1], checked)
        grad_x = grad @ weight.to(grad.dtype)
    if bias is not None and ctx.needs_input_grad[4]:  # type: ignore[attr-defined]
        grad_bias = bias_backward(grad, bias)
    return grad_x, None, None, None, grad_bias, *[None] * 6


# An operator, so that a compiled backward can hold it: only its fake kernel is run while tracing.
_LIB.define(
    "sparse_unpack(Tensor bitmap, Tensor values, Tensor? weight_scale, SymInt k, bool checked=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def sparse_unpack(bitmap: Tensor, values: Tensor, weight_scale: Tensor | None, k: int, checked: bool = False) -> Tensor:
    """The weight ``(N, K)`` that the layer multiplies with: in the values' dtype, or int8 times scale in float32.

    checked: bitmap and values are known to be a weight; then no call waits for a GPU.
    """
    weight = (expand if checked else sparse_to_dense)(bitmap, values, k)
    return weight if weight_scale is None else weight.to(torch.float32) * weight_scale[:, None]


def _unpack_fake(bitmap: Tensor, values: Tensor, weight_scale: Tensor | None, k: int, checked: bool = False) -> Tensor:
    return values.new_empty((bitmap.shape[0], k), dtype=values.dtype if weight_scale is None else torch.float32)


_LIB.impl("sparse_unpack", sparse_unpack, "CompositeExplicitAutograd")
torch.library.register_fake("pycompress::sparse_unpack", _unpack_fake, lib=_LIB)
_LIB.impl("sparse_linear", _run, "CompositeExplicitAutograd")
_LIB.impl("sparse_linear", _autocast, "AutocastCPU")
_LIB.impl("sparse_linear", _autocast, "AutocastCUDA")
torch.library.register_fake("pycompress::sparse_linear", _fake, lib=_LIB)
torch.library.register_autograd("pycompress::sparse_linear", _backward, setup_context=_setup_context, lib=_LIB)


def sparse_linear(
    x: Tensor,
    bitmap: Tensor,
    values: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    row_start: Tensor | None = None,
    index: Tensor | None = None,
    dense: Tensor | None = None,
    choice: Sequence[int] = (),
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """``act(x @ (W ⊙ mask)^T + bias)``; see the module docstring.

    Args:
        x: ``(..., K)`` float32, bfloat16 or float16, any strides. The result has its dtype.
        bitmap, values: the weight ``(N, K)``, as :func:`sparse_from_dense` makes them: uint8 ``(N, ceil(K / 8))``, and
            float32, bfloat16, float16 or int8 ``(nnz,)``.
        weight_scale: float32 ``(N,)``, with int8 values only.
        bias: floating ``(N,)`` or None.
        row_start: the result of :func:`row_starts` for this bitmap. Without it bitmap and values are checked, which
            waits for a GPU.
        index: the result of :func:`pack_index`, 64-byte aligned or it is copied; on a GPU of ``pack_blocks`` or
            ``pack_2to4``.
        dense: the dense form: floating ``(N, K)``, or with int8 values the result of ``pack_weight``, on a GPU int8
            ``(N, K)``.
        choice: which form computes how many tokens M, flat: ``(most tokens, code, most tokens, code, ...)`` with codes
            0 bitmap, 1 index, 2 dense; the first pair with M <= most counts, or the last. Empty: bitmap for M <= 8,
            above that the index form where it is given. A form that is chosen and not given is made on the spot, which
            costs more than a product with a few tokens; a weight that has no index form is read as bitmap.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, applied before rounding to x's
            dtype.
        backend: ``"auto"``, ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; a named one runs or raises. The
            reference unpacks the weight and reads no other form.

    Returns:
        ``(..., N)``. The gradient reaches x and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation or backend, a damaged bitmap, count
            or index.
    """
    return torch.ops.pycompress.sparse_linear.default(
        x, bitmap, values, weight_scale, bias, row_start, index, dense, choice, activation, backend
    )
