"""4-bit weight-only linear layer as a torch operator: checks, reference, backend table, registration.

``y = act(sum_k x[m, k] * w[n, k] + bias[n])``, ``w[n, k] = weight_scale[n, g] * value``, ``g = k // group_size``

======  ===============================================================================================================
format  value of a weight
======  ===============================================================================================================
int4    ``q[n, k] - weight_zero_point[n, g]``, q in 0..15; without zero points (symmetric) they are 8 everywhere
nf4     ``NF4[q[n, k]]``: the 16 values of QLoRA, spaced for weights that are normally distributed
======  ===============================================================================================================

x stays float; products are summed in fp32. ``int4_matmul_weight.py`` says how weights are quantised and kept. The
contract of the kernels, edge cases included, is ``csrc/int4_matmul/int4_matmul.h``; ``int4_matmul_reference.py`` is
the same in torch and runs on any device.

=============  ====================================================================================================
backend        runs
=============  ====================================================================================================
native         on the CPU
triton         on NVIDIA GPUs, where Triton is installed
reference      anywhere, slowly
=============  ====================================================================================================

On a GPU the kernels take the plain weight: a packed one goes to the reference, which unpacks it at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import _C, gpu
from pycompress._native import DTYPE_CODES, has_values
from pycompress.ops.backend import Backend, Backends
from pycompress.ops.int4_matmul_reference import Call, reference_int4_linear
from pycompress.ops.int4_matmul_weight import (
    check_plain,
    check_weight_options,
    group_size_of,
    pack_weight_int4,
    packed_info,
)
from pycompress.ops.int8_matmul_weight import aligned
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

# ---- native ---------------------------------------------------------------------------------------------------


def native_int4_linear(call: Call) -> Tensor:
    """The native backend: checked arguments, on the CPU."""
    x, layout = row_layout(call.x)
    packed = packed_weight(call)
    y = torch.empty((*call.x.shape[:-1], call.out_features), dtype=x.dtype)
    plan = native_plan(packed, call.bias, call.activation)
    plan.run_strided(x.data_ptr(), layout, DTYPE_CODES[x.dtype], y.data_ptr(), torch.get_num_threads())
    return y


def packed_weight(call: Call) -> Tensor:
    """The weight as the native kernels read it."""
    if call.packed:
        return aligned(call.weight)
    assert call.weight_scale is not None, "checked before"
    return pack_weight_int4(
        call.weight,
        call.weight_scale,
        call.weight_zero_point,
        in_features=call.in_features,
        format=call.format,
        group_size=call.group_size,
    )


def native_plan(packed: Tensor, bias: Tensor | None, activation: str) -> _C.Int4Plan:
    """All but x and y, as addresses: the tensors must outlive the plan."""
    return _C.Int4Plan(
        packed.data_ptr(),
        packed.numel(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        ACTIVATION_CODES[activation],
    )


# ---- backend table --------------------------------------------------------------------------------------------


def _native_missing(call: Call) -> str | None:
    return None if call.x.device.type == "cpu" else f"x is on {call.x.device}, the native kernels run on the CPU"


def _triton_missing(call: Call) -> str | None:
    reason = gpu.triton_missing(call.x)
    if reason is None and call.packed:
        return "the weight is packed for the CPU; unpack_weight_int4 gives the plain one that a GPU reads"
    return reason


def _triton_int4_linear(call: Call) -> Tensor:
    from pycompress.kernels.int4_matmul import int4_linear as run  # imports triton

    return run(call)


_TABLE = Backends(
    "int4_linear",
    Backend("native", _native_missing, native_int4_linear),
    Backend("triton", _triton_missing, _triton_int4_linear),
    Backend("reference", lambda call: None, reference_int4_linear),
)
INT4_BACKENDS, pick = _TABLE.names, _TABLE.pick


# ---- checks ---------------------------------------------------------------------------------------------------


def check_options(format: str, symmetric: bool, activation: str, backend: str = "auto") -> None:
    """Raises ``ValueError`` for a name that is not in FORMATS, ACTIVATIONS or INT4_BACKENDS, and for nf4 with zero
    points.
    """
    check_weight_options("int4_linear", format, symmetric)
    check_option("int4_linear", "activation", activation, ACTIVATIONS)
    check_option("int4_linear", "backend", backend, INT4_BACKENDS)


def check(call: Call) -> None:
    """Everything that can be told from shapes, dtypes and devices, and from a packed weight's header."""
    x, weight, k, n = call.x, call.weight, call.in_features, call.out_features
    check_options(call.format, True, call.activation)
    group_size_of("int4_linear", call.group_size, k)
    check_input("int4_linear", x)
    if x.shape[-1] != k:
        raise ValueError(f"int4_linear: x has K={x.shape[-1]} but weight has K={k}")
    if call.packed:
        _check_packed(call)
    elif call.weight_scale is None:
        raise ValueError(
            "int4_linear: weight_scale is None, which only a packed weight may come without; pass what "
            "quantize_weight_int4 returned"
        )
    else:
        scale, zero_point = call.weight_scale, call.weight_zero_point
        check_plain("int4_linear", weight, scale, zero_point, k, call.format, call.group_size)
        if scale.shape[0] != n:
            raise ValueError(f"int4_linear: weight has N={scale.shape[0]}, expected N={n}")
        check_devices("int4_linear", x, weight_scale=scale, weight_zero_point=zero_point)
    check_bias("int4_linear", call.bias, n)
    check_devices("int4_linear", x, weight=weight, bias=call.bias)


def _check_packed(call: Call) -> None:
    weight = call.weight
    if weight.dtype != torch.uint8:
        raise ValueError(
            f"int4_linear: weight has {weight.dtype} {tuple(weight.shape)}, expected uint8 (N, ceil(K / 2)) or the "
            "result of pack_weight_int4"
        )
    if call.weight_scale is not None or call.weight_zero_point is not None:
        raise ValueError("int4_linear: a packed weight holds its scales and zero points; pass None for them")
    if not has_values(weight) or weight.device.type != "cpu":
        return
    n, k, size, format, _ = packed_info(aligned(weight))
    for name, got, expected in (
        ("K", k, call.in_features),
        ("N", n, call.out_features),
        ("group_size", size, call.group_size),
        ("format", format, call.format),
    ):
        if got != expected:
            raise ValueError(f"int4_linear: the weight was packed with {name}={got}, not {expected}")


# ---- registration ---------------------------------------------------------------------------------------------

_LIB = torch.library.Library("pycompress", "FRAGMENT")
_LIB.define(
    "int4_linear(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    "SymInt in_features, SymInt out_features, str format='int4', int group_size=128, str activation='none', "
    "str backend='auto') -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def _run(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    format: str = "int4",
    group_size: int = 128,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    call = Call(
        x, weight, weight_scale, weight_zero_point, bias, in_features, out_features, format, group_size, activation
    )
    check(call)
    return pick(backend, call).run(call)


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    format: str = "int4",
    group_size: int = 128,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    call = Call(
        x, weight, weight_scale, weight_zero_point, bias, in_features, out_features, format, group_size, activation
    )
    check(call)
    return x.new_empty((*x.shape[:-1], out_features))


def _autocast(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return autocast_linear(torch.ops.pycompress.int4_linear.default, x, *args, **kwargs)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, weight_scale, weight_zero_point, bias, *options = inputs
    ctx.save_for_backward(x, weight, weight_scale, weight_zero_point, bias)
    ctx.options = options  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of ``act(x @ w^T + bias)`` to x and to bias."""
    x, weight, scale, zero_point, bias = ctx.saved_tensors  # type: ignore[attr-defined]
    *sizes, format, group_size, activation, backend = ctx.options  # type: ignore[attr-defined]
    if activation != "none":
        before = torch.ops.pycompress.int4_linear.default(
            x, weight, scale, zero_point, bias, *sizes, format, group_size, "none", backend
        )
        grad = activation_backward(grad, before, activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        wide = torch.ops.pycompress.int4_dequantize.default(weight, scale, zero_point, *sizes, format, group_size)
        grad_x = grad @ wide.to(grad.dtype)
    if bias is not None and ctx.needs_input_grad[4]:  # type: ignore[attr-defined]
        grad_bias = bias_backward(grad, bias)
    return grad_x, None, None, None, grad_bias, *(None,) * 6


# An operator, so that a compiled backward can hold it: only its fake kernel is run while tracing.
_LIB.define(
    "int4_dequantize(Tensor weight, Tensor? weight_scale, Tensor? weight_zero_point, SymInt in_features, "
    "SymInt out_features, str format, int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dequantize(
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero_point: Tensor | None,
    in_features: int,
    out_features: int,
    format: str,
    group_size: int,
) -> Tensor:
    x = torch.empty(0, in_features, device=weight.device)
    parts = weight, weight_scale, weight_zero_point
    call = Call(x, *parts, None, in_features, out_features, format, group_size, "none")
    check(call)
    return call.float_weight()


_LIB.impl("int4_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pycompress::int4_dequantize",
    lambda weight, scale, zero_point, k, n, format, group_size: weight.new_empty((n, k), dtype=torch.float32),
    lib=_LIB,
)
_LIB.impl("int4_linear", _run, "CompositeExplicitAutograd")
_LIB.impl("int4_linear", _autocast, "AutocastCPU")
_LIB.impl("int4_linear", _autocast, "AutocastCUDA")
torch.library.register_fake("pycompress::int4_linear", _fake, lib=_LIB)
torch.library.register_autograd("pycompress::int4_linear", _backward, setup_context=_setup_context, lib=_LIB)


def int4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    format: str = "int4",
    group_size: int = 128,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """``act(x @ w^T + bias)`` with 4-bit weights; see the module docstring for the formula.

    Args:
        x: ``(..., K)`` float32, bfloat16 or float16, any strides. The result has its dtype.
        weight: uint8 ``(N, ceil(K / 2))`` as :func:`quantize_weight_int4` gives it, or what :func:`pack_weight_int4`
            made of it (do that once: packing costs far more than a multiplication with a few rows).
        weight_scale, weight_zero_point: float32 and uint8 ``(N, G)``, ``G = ceil(K / group_size)``. The zero point is
            None where symmetric; both are where the weight is packed.
        bias: floating ``(N,)`` or None.
        format: ``"int4"`` or ``"nf4"``.
        group_size: weights that share a scale; -1 for a whole row.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, applied before rounding to
            x's dtype.
        backend: ``"auto"`` (the first that can take the call), ``"native"``, ``"triton"`` or ``"reference"``; a named
            one runs or raises.

    Returns:
        ``(..., N)``. A row of x that holds NaN or Inf gives a row that is not finite, and changes no other.
        The gradient reaches x and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown format, activation or backend, a damaged
            packed weight.
    """
    check_input("int4_linear", x)
    k = x.shape[-1]
    if weight.dim() == 1 and weight.dtype == torch.uint8 and weight.device.type == "cpu":
        n = packed_info(aligned(weight))[0]
    else:
        n = weight.shape[0] if weight.dim() else 0
    size = group_size_of("int4_linear", group_size, k)
    return torch.ops.pycompress.int4_linear.default(
        x, weight, weight_scale, weight_zero_point, bias, k, n, format, size, activation, backend
    )
