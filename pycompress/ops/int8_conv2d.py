"""Int8 2-D convolution as a torch operator: checks, reference, backend table, registration.

``y[n, o, i, j] = act(x_scale[n] * weight_scale[o] * sum (qx[n, c, i', j'] - zero_point) * qw[o, c, a, b] + bias[o])``

over the channels c of o's group and the taps (a, b) of the kernel, with ``i' = stride * i - top + dilation * a`` and
``j'`` likewise; outside the image the real value is 0.

=============  ====================================================================================================
mode           activations
=============  ====================================================================================================
dynamic        per image: ``x_scale[n] = max |x[n]| / 127``, ``qx = round(x * (1 / x_scale))``, zero point 0
static         per tensor, calibrated: ``qx = clamp(round(x * (1 / input_scale)) + input_zero_point, 0, 255)``
weight_only    stay float: ``F.conv2d`` with the dequantised weight, accumulated in fp32. It saves memory, not time
=============  ====================================================================================================

Weights are symmetric int8 with one scale an output channel. No image depends on the others of its batch; one that holds
NaN or Inf gives NaN, and the others do not. The contract of the kernels is ``csrc/int8_conv2d/int8_conv2d.h``;
``int8_conv2d_reference.py`` is the same in torch and runs on any device.

=============  ====================================================================================================
backend        runs
=============  ====================================================================================================
native         on the CPU, dynamic and static mode
reference      anywhere, slowly
=============  ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycompress._native import DTYPE_CODES, has_values
from pycompress.codes import MODES
from pycompress.ops.backend import Backend, Backends
from pycompress.ops.int8_conv2d_native import native_conv_missing, native_int8_conv2d
from pycompress.ops.int8_conv2d_reference import ConvCall, Window, reference_int8_conv2d
from pycompress.ops.int8_conv2d_weight import packed_conv_shape, plain_conv
from pycompress.ops.linear_common import (
    ACTIVATIONS,
    activation_backward,
    autocast_linear,
    check_bias,
    check_devices,
    check_option,
)

_OP = "int8_conv2d"

_TABLE = Backends(
    _OP,
    Backend("native", native_conv_missing, native_int8_conv2d),
    Backend("reference", lambda call: None, reference_int8_conv2d),
)
CONV_BACKENDS, pick_conv = _TABLE.names, _TABLE.pick


# ---- checks ---------------------------------------------------------------------------------------------------


def check_conv_options(mode: str, activation: str, backend: str = "auto") -> None:
    """Raises ``ValueError`` for a name that is not in MODES, ACTIVATIONS or CONV_BACKENDS."""
    check_option(_OP, "mode", mode, MODES)
    check_option(_OP, "activation", activation, ACTIVATIONS)
    check_option(_OP, "backend", backend, CONV_BACKENDS)


def check_conv(call: ConvCall) -> None:
    """Everything that can be told from shapes, dtypes and devices; the kernels check the values."""
    x, weight, scale, window = call.x, call.weight, call.weight_scale, call.window
    check_option(_OP, "mode", call.mode, MODES)
    check_option(_OP, "activation", call.activation, ACTIVATIONS)
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"{_OP}: x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if x.layout is not torch.strided or x.dim() != 4:
        raise ValueError(f"{_OP}: x is {x.layout} {tuple(x.shape)}, expected a dense (N, C, H, W) or (C, H, W) tensor")
    if scale.dtype != torch.float32 or scale.dim() != 1 or not scale.is_contiguous():
        got = f"{scale.dtype} {tuple(scale.shape)}"
        raise ValueError(f"{_OP}: weight_scale has {got}, expected contiguous float32 (O,)")
    check_window(window)
    _check_weight(call)
    rows, columns = window.out_size(x.shape[2], x.shape[3])
    if rows < 1 or columns < 1:
        raise ValueError(
            f"{_OP}: the kernel {window.kernel} with dilation {window.dilation} is larger than the padded image: "
            f"x is {x.shape[2]} x {x.shape[3]}, padding (top, bottom, left, right) {window.padding}"
        )
    check_bias(_OP, call.bias, scale.shape[0])
    check_devices(
        _OP, x, weight=weight, weight_scale=scale, bias=call.bias, input_scale=call.input_scale,
        input_zero_point=call.input_zero_point,
    )  # fmt: skip
    _check_static(call)


def check_window(window: Window) -> None:
    """Raises ``ValueError`` for a number that is too small, whatever the input."""
    for name, values, least in (
        ("kernel_size", window.kernel, 1),
        ("stride", window.stride, 1),
        ("padding", window.padding, 0),
        ("dilation", window.dilation, 1),
        ("groups", (window.groups,), 1),
    ):
        if min(values) < least:
            raise ValueError(f"{_OP}: {name}={values}, expected at least {least}")


def _check_weight(call: ConvCall) -> None:
    x, weight, groups = call.x, call.weight, call.window.groups
    out, channels = call.weight_scale.shape[0], x.shape[1]
    if channels % groups or out % groups:
        raise ValueError(f"{_OP}: x has C={channels} and the weight O={out}, expected multiples of groups={groups}")
    expected = (out, channels // groups, *call.window.kernel)
    if weight.dtype == torch.int8 and weight.dim() == 4:
        got = tuple(weight.shape)
    elif weight.dtype == torch.uint8 and weight.dim() == 1:
        if not has_values(weight):
            return
        *shape, packed_groups = packed_conv_shape(weight)
        got = tuple(shape)
        if packed_groups != groups:
            raise ValueError(f"{_OP}: the weight was packed for groups={packed_groups}, expected groups={groups}")
    else:
        raise ValueError(
            f"{_OP}: weight has {weight.dtype} {tuple(weight.shape)}, expected int8 (O, I / groups, kh, kw) or the "
            "result of pack_conv_weight"
        )
    if got != expected:
        raise ValueError(
            f"{_OP}: weight is (O, I / groups, kh, kw) = {got}, expected {expected} for x with C={channels}, "
            f"groups={groups} and weight_scale with O={out}"
        )


def _check_static(call: ConvCall) -> None:
    scale, zero_point = call.input_scale, call.input_zero_point
    if call.mode != "static":
        if scale is not None or zero_point is not None:
            raise ValueError(f"{_OP}: input_scale and input_zero_point belong to mode='static', not {call.mode!r}")
        return
    if scale is None or zero_point is None:
        raise ValueError(
            f"{_OP}: mode='static' needs input_scale and input_zero_point; calibrate gives them, or use mode='dynamic'"
        )
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(f"{_OP}: input_scale has {scale.dtype} {tuple(scale.shape)}, expected one float32")
    if zero_point.dtype != torch.int32 or zero_point.numel() != 1:
        raise ValueError(
            f"{_OP}: input_zero_point has {zero_point.dtype} {tuple(zero_point.shape)}, expected one int32"
        )


# ---- registration ---------------------------------------------------------------------------------------------

_LIB = torch.library.Library("pycompress", "FRAGMENT")
_LIB.define(
    "int8_conv2d(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int[2] kernel_size, int[2] stride=1, "
    "int[4] padding=0, int[2] dilation=1, int groups=1, str mode='dynamic', Tensor? input_scale=None, "
    "Tensor? input_zero_point=None, str activation='none', str backend='auto') -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def _call(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    mode: str = "dynamic",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str = "none",
) -> ConvCall:
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    top, bottom, left, right = padding
    window = Window((kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw), groups)
    call = ConvCall(x, weight, weight_scale, bias, window, mode, input_scale, input_zero_point, activation)
    check_conv(call)
    return call


def run_int8_conv2d(*args: object, backend: str = "auto", **kwargs: object) -> Tensor:
    """What the operator computes, without its dispatcher: for plain eager mode, see ``ops/eager.py``."""
    *args, backend = args if len(args) == 14 else (*args, backend)  # type: ignore[assignment]
    call = _call(*args, **kwargs)  # type: ignore[arg-type]
    return pick_conv(backend, call).run(call)


def _fake(*args: object, backend: str = "auto", **kwargs: object) -> Tensor:
    call = _call(*args[:13], **kwargs)  # type: ignore[arg-type]
    return torch.empty(
        call.out_shape, dtype=call.x.dtype, device=call.x.device, memory_format=call.memory_format
    )


def _autocast(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return autocast_linear(torch.ops.pycompress.int8_conv2d.default, x, *args, **kwargs)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, weight_scale, bias, *window, mode, input_scale, input_zero_point, activation, backend = inputs
    ctx.save_for_backward(x, weight, weight_scale, bias, input_scale, input_zero_point)
    ctx.options = (window, mode, activation, backend)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding: the gradient of ``act(conv2d(x, scale * qw) + bias)`` to x and to bias."""
    x, weight, weight_scale, bias, input_scale, input_zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
    window, mode, activation, backend = ctx.options  # type: ignore[attr-defined]
    if activation != "none":
        before = torch.ops.pycompress.int8_conv2d.default(
            x, weight, weight_scale, bias, *window, mode, input_scale, input_zero_point, "none", backend
        )
        grad = activation_backward(grad, before, activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        kernel_size, _, _, _, groups = window
        if weight.dtype == torch.uint8:
            shape = (weight_scale.shape[0], x.shape[1] // groups, *kernel_size)
            weight = torch.ops.pycompress.int8_conv2d_unpack.default(weight, shape)
        grad_x = _input_gradient(grad, x, weight.to(torch.float32) * weight_scale[:, None, None, None], window)
    if bias is not None and ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return (grad_x, None, None, grad_bias, *(None,) * 10)


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, window: Sequence) -> Tensor:
    _, stride, (top, bottom, left, right), dilation, groups = window
    n, c, h, w = x.shape
    padded = x.new_empty((1,)).expand(n, c, h + top + bottom, w + left + right)  # only its shape is read
    grad_x = torch.ops.aten.convolution_backward(
        grad, padded, weight.to(grad.dtype), None, stride, [0, 0], dilation, False, [0, 0], groups, [True, False, False]
    )[0]
    return grad_x[:, :, top : top + h, left : left + w]


# An operator, so that a compiled backward can hold it: only its fake kernel is run while tracing.
_LIB.define("int8_conv2d_unpack(Tensor packed, SymInt[] shape) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    weight = plain_conv(packed)
    if tuple(weight.shape) != tuple(shape):
        raise ValueError(f"int8_conv2d_unpack: the packed weight is {tuple(weight.shape)}, expected {tuple(shape)}")
    return weight


_LIB.impl("int8_conv2d_unpack", _unpack, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pycompress::int8_conv2d_unpack", lambda packed, shape: packed.new_empty(shape, dtype=torch.int8), lib=_LIB
)
_LIB.impl(_OP, run_int8_conv2d, "CompositeExplicitAutograd")
_LIB.impl(_OP, _autocast, "AutocastCPU")
_LIB.impl(_OP, _autocast, "AutocastCUDA")
torch.library.register_fake("pycompress::int8_conv2d", _fake, lib=_LIB)
torch.library.register_autograd("pycompress::int8_conv2d", _backward, setup_context=_setup_context, lib=_LIB)


# ---- the function ---------------------------------------------------------------------------------------------


def sides(
    padding: int | Sequence[int] | str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """``padding`` as ``nn.Conv2d`` takes it, as (top, bottom, left, right).

    Raises:
        ValueError: an unknown word, or ``"same"`` with a stride.
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"{_OP}: padding='same' with stride={stride}, expected stride 1; pad by numbers instead")
        rows, columns = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
        return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2
    if isinstance(padding, str):
        raise ValueError(f"{_OP}: padding={padding!r}, expected numbers, 'same' or 'valid'")
    height, width = pair(padding)
    return height, height, width, width


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width), from one number for both or from two.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int):
        return value, value
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (1, 2):
        raise ValueError(f"{_OP}: {value!r} for height and width, expected a whole number or two")
    return int(value[0]), int(value[-1])


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    mode: str = "dynamic",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
    kernel_size: int | Sequence[int] | None = None,
) -> Tensor:
    """``act(conv2d(x, weight * weight_scale) + bias)`` with an int8 weight; see the module docstring for the formula.

    Args:
        x: ``(N, C, H, W)`` or ``(C, H, W)``, float32, bfloat16 or float16, any strides. The result has its dtype, and
            is channels last where x is.
        weight: int8 ``(O, C / groups, kh, kw)``, or what :func:`pack_conv_weight` made of it.
        weight_scale: float32 ``(O,)``.
        bias: floating ``(O,)`` or None.
        stride, padding, dilation, groups: as ``F.conv2d`` takes them.
        mode: ``"dynamic"``, ``"static"`` or ``"weight_only"``.
        input_scale, input_zero_point: static mode only: one float32, one int32 in 0..255.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, applied before rounding to
            x's dtype.
        backend: ``"auto"`` (the first that can take the call), ``"native"`` or ``"reference"``; a named one runs or
            raises.
        kernel_size: of a packed weight whose values are not known (a tracer's); else it is the weight's.

    Returns:
        ``(N, O, OH, OW)``, or without N where x has none. In dynamic and static mode an image that holds NaN or Inf
        gives NaN. The gradient reaches x and bias, straight through the rounding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown option, a damaged packed weight.
    """
    if kernel_size is not None:
        kernel = pair(kernel_size)
    elif weight.dtype == torch.uint8:
        _, _, *found, _ = packed_conv_shape(weight)
        kernel = pair(found)
    else:
        kernel = (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else (1, 1)  # another shape is refused below
    steps, spread = pair(stride), pair(dilation)
    single = x.dim() == 3
    y = torch.ops.pycompress.int8_conv2d.default(
        x[None] if single else x, weight, weight_scale, bias, kernel, steps, sides(padding, kernel, steps, spread),
        spread, groups, mode, input_scale, input_zero_point, activation, backend,
    )  # fmt: skip
    return y[0] if single else y
