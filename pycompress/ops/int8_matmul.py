"""Int8 linear layer as a torch operator: checks, reference, backend table, registration.

``y = act(x_scale[m] * weight_scale[n] * sum_k (qx[m, k] - zero_point) * qw[n, k] + bias[n])``

=============  ====================================================================================================
mode           activations
=============  ====================================================================================================
dynamic        per token: ``x_scale[m] = max_k |x[m, k]| / 127``, ``qx = round(x * (1 / x_scale))``, zero point 0
static         per tensor, calibrated: ``qx = clamp(round(x * (1 / input_scale)) + input_zero_point, 0, 255)``
weight_only    stay float, accumulated in fp32
=============  ====================================================================================================

Weights are symmetric int8 with one scale an output row. The contract of the kernels, edge cases included, is
``csrc/int8_matmul/int8_matmul.h``; ``int8_matmul_reference.py`` is the same in torch and runs on any device.

=============  ====================================================================================================
backend        runs
=============  ====================================================================================================
native         on the CPU
cuda           on NVIDIA GPUs, where pycompress was built with CUDA; weight_only mode for a few tokens
triton         on NVIDIA GPUs, where Triton is installed
reference      anywhere, slowly
=============  ====================================================================================================

On a GPU the kernels read input_scale and input_zero_point where they are, unchecked, and take the plain weight: a
packed one goes to the reference, which unpacks it at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import _C, gpu
from pycompress._native import DTYPE_CODES
from pycompress.codes import MODE_CODES, MODES
from pycompress.ops.backend import Backend, Backends
from pycompress.ops.int8_matmul_cuda import cuda_int8_linear, cuda_int8_missing
from pycompress.ops.int8_matmul_reference import Call, reference_int8_linear
from pycompress.ops.int8_matmul_weight import aligned, pack_weight, unpack_weight
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


def native_int8_linear(call: Call) -> Tensor:
    """The native backend: checked arguments, on the CPU."""
    weight = aligned(call.weight) if call.weight.dtype == torch.uint8 else pack_weight(call.weight)
    n = call.weight_scale.shape[0]
    x, layout = row_layout(call.x)
    y = torch.empty((*call.x.shape[:-1], n), dtype=x.dtype)
    plan = native_plan(call, weight)
    plan.run_strided(x.data_ptr(), layout, DTYPE_CODES[x.dtype], y.data_ptr(), torch.get_num_threads())
    return y


def native_plan(call: Call, packed: Tensor) -> _C.Int8Plan:
    """All but x and y, as addresses: the tensors must outlive the plan."""
    bias, input_scale, zero_point = call.bias, call.input_scale, call.input_zero_point
    return _C.Int8Plan(
        packed.data_ptr(),
        packed.numel(),
        call.weight_scale.data_ptr(),
        call.weight_scale.shape[0],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        0 if input_scale is None else input_scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        MODE_CODES[call.mode],
        ACTIVATION_CODES[call.activation],
    )


# ---- backend table --------------------------------------------------------------------------------------------


def _native_missing(call: Call) -> str | None:
    return None if call.x.device.type == "cpu" else f"x is on {call.x.device}, the native kernels run on the CPU"


def _many_tokens_on_hopper(call: Call) -> str | None:
    # From compute capability 9.0 on Triton multiplies with the instructions of a warp group (wgmma, tcgen05); mma.sync,
    # which the CUDA kernel has, reaches a part of their rate. They take 64 rows at a time: up to there, and wherever
    # the weight's bytes are the limit, nothing is gained. From the documented rates; not measured.
    many = call.x.shape[:-1].numel() > 64
    return "triton" if many and gpu.capability(call.x) >= 90 else None


def _triton_missing(call: Call) -> str | None:
    reason = gpu.triton_missing(call.x)
    if reason is None and call.weight.dtype != torch.int8:
        return "the weight is packed for the CPU; unpack_weight gives the plain int8 (N, K) that a GPU reads"
    return reason


def _triton_int8_linear(call: Call) -> Tensor:
    from pycompress.kernels.int8_matmul import int8_linear as run  # imports triton

    return run(call)


_TABLE = Backends(
    "int8_linear",
    Backend("native", _native_missing, native_int8_linear),
    Backend("cuda", cuda_int8_missing, cuda_int8_linear, leaves_to=_many_tokens_on_hopper),
    Backend("triton", _triton_missing, _triton_int8_linear),
    Backend("reference", lambda call: None, reference_int8_linear),
)
BACKENDS, pick = _TABLE.names, _TABLE.pick


# ---- checks ---------------------------------------------------------------------------------------------------


def check_options(mode: str, activation: str, backend: str = "auto") -> None:
    """Raises ``ValueError`` for a name that is not in MODES, ACTIVATIONS or BACKENDS."""
    check_option("int8_linear", "mode", mode, MODES)
    check_option("int8_linear", "activation", activation, ACTIVATIONS)
    check_option("int8_linear", "backend", backend, BACKENDS)


def check(call: Call) -> None:
    """Everything that can be told from shapes, dtypes and devices; the kernels check the values."""
    x, weight, scale, bias = call.x, call.weight, call.weight_scale, call.bias
    check_options(call.mode, call.activation)
    check_input("int8_linear", x)
    if scale.dtype != torch.float32 or scale.dim() != 1 or not scale.is_contiguous():
        raise ValueError(
            f"int8_linear: weight_scale has {scale.dtype} {tuple(scale.shape)}, expected contiguous float32 (N,)"
        )
    if weight.dtype == torch.int8 and weight.dim() == 2:
        if weight.shape[1] != x.shape[-1]:
            raise ValueError(f"int8_linear: x has K={x.shape[-1]} but weight has K={weight.shape[1]}")
        if weight.shape[0] != scale.shape[0]:
            raise ValueError(f"int8_linear: weight has N={weight.shape[0]} but weight_scale has N={scale.shape[0]}")
    elif weight.dtype != torch.uint8 or weight.dim() != 1:
        raise ValueError(
            f"int8_linear: weight has {weight.dtype} {tuple(weight.shape)}, expected int8 (N, K) or the result of "
            "pack_weight"
        )
    check_bias("int8_linear", bias, scale.shape[0])
    check_devices("int8_linear", x, weight=weight, weight_scale=scale, bias=bias)
    if call.mode == "static" or call.input_scale is not None or call.input_zero_point is not None:
        _check_static(call)


def _check_static(call: Call) -> None:
    if call.mode != "static":
        raise ValueError(f"int8_linear: input_scale and input_zero_point belong to mode='static', not {call.mode!r}")
    scale, zero_point = call.input_scale, call.input_zero_point
    if scale is None or zero_point is None:
        raise ValueError(
            "int8_linear: mode='static' needs input_scale and input_zero_point; calibrate gives them, or use "
            "mode='dynamic'"
        )
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(f"int8_linear: input_scale has {scale.dtype} {tuple(scale.shape)}, expected one float32")
    if zero_point.dtype != torch.int32 or zero_point.numel() != 1:
        raise ValueError(
            f"int8_linear: input_zero_point has {zero_point.dtype} {tuple(zero_point.shape)}, expected one int32"
        )
    if scale.device != call.x.device or zero_point.device != call.x.device:
        raise ValueError(f"int8_linear: input_scale or input_zero_point is not on {call.x.device}, where x is")


# ---- registration ---------------------------------------------------------------------------------------------

_LIB = torch.library.Library("pycompress", "FRAGMENT")
_LIB.define(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, str mode='dynamic', "
    "Tensor? input_scale=None, Tensor? input_zero_point=None, str activation='none', str backend='auto') -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def _run(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    mode: str = "dynamic",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    call = Call(x, weight, weight_scale, bias, mode, input_scale, input_zero_point, activation)
    check(call)
    return pick(backend, call).run(call)


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    mode: str = "dynamic",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    check(Call(x, weight, weight_scale, bias, mode, input_scale, input_zero_point, activation))
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


def _autocast(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return autocast_linear(torch.ops.pycompress.int8_linear.default, x, *args, **kwargs)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, weight_scale, bias, mode, input_scale, input_zero_point, activation, backend = inputs
    ctx.save_for_backward(x, weight, weight_scale, bias, input_scale, input_zero_point)
    ctx.options = (mode, activation, backend)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding: the gradient of ``act(x @ (scale * qw)^T + bias)`` to x and to bias."""
    x, weight, weight_scale, bias, input_scale, input_zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
    mode, activation, backend = ctx.options  # type: ignore[attr-defined]
    if activation != "none":
        before = torch.ops.pycompress.int8_linear.default(
            x, weight, weight_scale, bias, mode, input_scale, input_zero_point, "none", backend
        )
        grad = activation_backward(grad, before, activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        if weight.dtype == torch.uint8:
            weight = torch.ops.pycompress.int8_unpack.default(weight, weight_scale.shape[0], x.shape[-1])
        grad_x = grad @ (weight.to(torch.float32) * weight_scale[:, None]).to(grad.dtype)
    if bias is not None and ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
        grad_bias = bias_backward(grad, bias)
    return grad_x, None, None, grad_bias, None, None, None, None, None


# An operator, so that a compiled backward can hold it: only its fake kernel is run while tracing.
_LIB.define("int8_unpack(Tensor packed, SymInt n, SymInt k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _unpack(packed: Tensor, n: int, k: int) -> Tensor:
    weight = unpack_weight(packed)
    if tuple(weight.shape) != (n, k):
        raise ValueError(f"int8_unpack: the packed weight is {tuple(weight.shape)}, expected {(n, k)}")
    return weight


_LIB.impl("int8_unpack", _unpack, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pycompress::int8_unpack", lambda packed, n, k: packed.new_empty((n, k), dtype=torch.int8), lib=_LIB
)
_LIB.impl("int8_linear", _run, "CompositeExplicitAutograd")
_LIB.impl("int8_linear", _autocast, "AutocastCPU")
_LIB.impl("int8_linear", _autocast, "AutocastCUDA")
torch.library.register_fake("pycompress::int8_linear", _fake, lib=_LIB)
torch.library.register_autograd("pycompress::int8_linear", _backward, setup_context=_setup_context, lib=_LIB)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    mode: str = "dynamic",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """``act(x @ (weight * weight_scale)^T + bias)`` with int8 weights; see the module docstring for the formula.

    Args:
        x: ``(..., K)`` float32, bfloat16 or float16, any strides. The result has its dtype.
        weight: int8 ``(N, K)``, or what :func:`pack_weight` made of it (do that once: packing costs far more than
            a multiplication with a few rows).
        weight_scale: float32 ``(N,)``.
        bias: floating ``(N,)`` or None.
        mode: ``"dynamic"``, ``"static"`` or ``"weight_only"``.
        input_scale, input_zero_point: static mode only: one float32, one int32 in 0..255.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, applied before rounding to
            x's dtype.
        backend: ``"auto"`` (the first that can take the call), ``"native"``, ``"cuda"``, ``"triton"`` or
            ``"reference"``; a named one runs or raises.

    Returns:
        ``(..., N)``. In dynamic and static mode a row of x that holds NaN or Inf gives a row of NaN.
        The gradient reaches x and bias, straight through the rounding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown mode, activation or backend, a damaged
            packed weight.
    """
    return torch.ops.pycompress.int8_linear.default(
        x, weight, weight_scale, bias, mode, input_scale, input_zero_point, activation, backend
    )
