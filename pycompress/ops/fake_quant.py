"""Operators of quantisation-aware training: what the int8 layer computes, with a gradient for its weight too.

``fake_quant_linear`` returns what ``int8_linear`` returns for the same integers, from the same kernel. Backward takes
rounding for the identity (straight-through, Bengio et al. 2013), with the quantised values on the other side of each
product, ``wq[n, k] = weight_scale[n] * qw[n, k]`` and ``xq[m, k] = x_scale[m] * (qx[m, k] - zero_point)``:

    grad_x = grad @ wq            static: 0 where x lies outside the range that the integers 0..255 stand for
    grad_weight = grad^T @ xq     weight_only: xq = x
    grad_bias = sum over the tokens of grad

A row of x that holds NaN or Inf gives a row of NaN, and with it a grad_weight of NaN, as in nn.Linear. Gradients have
the dtypes of their tensors; the products are taken in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.ops.int8_matmul import check, pick
from pycompress.ops.int8_matmul_reference import Call
from pycompress.ops.int8_matmul_weight import SMALLEST_SCALE, quantize_weight
from pycompress.ops.linear_common import autocast_linear, bias_backward

_AT_ONCE = 1 << 17  # values quantised at once, so that what lies between the steps stays in a core's cache
_LIB = torch.library.Library("pycompress", "FRAGMENT")

# ---- quantised weight and activations, as operators: a compiled graph holds them whole ------------------------------

_LIB.define("quantize_weight(Tensor weight) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.impl("quantize_weight", quantize_weight, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pycompress::quantize_weight",
    lambda weight: (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    ),
    lib=_LIB,
)

_LIB.define(
    "fake_quant_rows(Tensor x, str mode, Tensor? input_scale=None, Tensor? input_zero_point=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake_quant_rows(
    x: Tensor, mode: str, input_scale: Tensor | None = None, input_zero_point: Tensor | None = None
) -> Tensor:
    """x ``(M, K)`` rounded to what its integers stand for, contiguous and of x's dtype; dynamic and static mode."""
    rounded = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = max(1, _AT_ONCE // max(1, x.shape[1]))
    if x.numel():
        for part, out in zip(x.split(rows), rounded.split(rows), strict=True):
            out.copy_(_rounded(part.float(), mode, input_scale, input_zero_point))
    return rounded


def _rounded(x: Tensor, mode: str, input_scale: Tensor | None, input_zero_point: Tensor | None) -> Tensor:
    largest = x.abs().amax(1, keepdim=True)  # 7 times as fast as aminmax along a dimension
    if mode == "dynamic":
        # Inf and NaN: the scale is Inf or NaN, and 0 * Inf is NaN.
        scale = (largest / 127.0).clamp_min_(SMALLEST_SCALE)
        return (x * (1.0 / scale)).round_().mul_(scale)
    assert input_scale is not None, "checked before"
    assert input_zero_point is not None, "checked before"
    scale = torch.where(largest.isfinite(), input_scale, torch.nan)
    low, high = -input_zero_point.float(), 255 - input_zero_point.float()
    return torch.minimum(torch.maximum(x * (1.0 / input_scale), low), high).round_().mul_(scale)


_LIB.impl("fake_quant_rows", _fake_quant_rows, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pycompress::fake_quant_rows",
    lambda x, mode, input_scale=None, input_zero_point=None: x.new_empty(x.shape),
    lib=_LIB,
)

# ---- the layer ------------------------------------------------------------------------------------------------------

_LIB.define(
    "fake_quant_linear(Tensor x, Tensor weight, Tensor quantized, Tensor weight_scale, Tensor? bias=None, "
    "str mode='dynamic', Tensor? input_scale=None, Tensor? input_zero_point=None, str backend='auto') -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def _checked(
    x: Tensor,
    weight: Tensor,
    quantized: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    mode: str,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> Call:
    if quantized.dtype != torch.int8 or quantized.shape != weight.shape:
        raise ValueError(
            f"fake_quant_linear: quantized has {quantized.dtype} {tuple(quantized.shape)}, expected int8 "
            f"{tuple(weight.shape)}, what quantize_weight makes of the weight"
        )
    call = Call(x, quantized, weight_scale, bias, mode, input_scale, input_zero_point, "none")
    check(call)
    return call


def _run(
    x: Tensor,
    weight: Tensor,
    quantized: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    mode: str = "dynamic",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    call = _checked(x, weight, quantized, weight_scale, bias, mode, input_scale, input_zero_point)
    return pick(backend, call).run(call)


def _fake(
    x: Tensor,
    weight: Tensor,
    quantized: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    mode: str = "dynamic",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    _checked(x, weight, quantized, weight_scale, bias, mode, input_scale, input_zero_point)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


def _autocast(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return autocast_linear(torch.ops.pycompress.fake_quant_linear.default, x, *args, **kwargs)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, quantized, weight_scale, bias, mode, input_scale, input_zero_point, _ = inputs
    ctx.save_for_backward(x, quantized, weight_scale, bias, input_scale, input_zero_point)
    ctx.options = (mode, weight.dtype)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, quantized, weight_scale, bias, input_scale, input_zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
    mode, weight_dtype = ctx.options  # type: ignore[attr-defined]
    wants = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_x = grad_weight = grad_bias = None
    if wants[0]:
        grad_x = grad @ (quantized.to(torch.float32) * weight_scale[:, None]).to(grad.dtype)
        if mode == "static":
            steps = x.to(torch.float32) * (1.0 / input_scale)
            inside = (steps >= -input_zero_point) & (steps <= 255 - input_zero_point)
            grad_x = torch.where(inside, grad_x, 0)
    if wants[1]:
        n, k = quantized.shape
        tokens = x.shape[:-1].numel()
        rows = x.reshape(tokens, k)
        if mode != "weight_only":
            rows = torch.ops.pycompress.fake_quant_rows.default(rows, mode, input_scale, input_zero_point)
        grad_weight = (grad.reshape(tokens, n).t() @ rows).to(weight_dtype)
    if bias is not None and wants[4]:
        grad_bias = bias_backward(grad, bias)
    return grad_x, grad_weight, None, None, grad_bias, None, None, None, None


_LIB.impl("fake_quant_linear", _run, "CompositeExplicitAutograd")
_LIB.impl("fake_quant_linear", _autocast, "AutocastCPU")
_LIB.impl("fake_quant_linear", _autocast, "AutocastCUDA")
torch.library.register_fake("pycompress::fake_quant_linear", _fake, lib=_LIB)
torch.library.register_autograd("pycompress::fake_quant_linear", _backward, setup_context=_setup_context, lib=_LIB)


def fake_quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mode: str = "dynamic",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``int8_linear`` with the integers and scales that ``quantize_weight(weight)`` gives now.

    Args:
        x: ``(..., K)`` float32, bfloat16 or float16. The result has its dtype.
        weight: ``(N, K)``, of the same dtypes.
        bias, mode, input_scale, input_zero_point, backend: as for :func:`int8_linear`.

    Returns:
        ``(..., N)``. The gradient reaches x, weight and bias, straight through the rounding; see the module docstring.

    Raises:
        ValueError: what :func:`int8_linear` refuses, and a weight that holds NaN or Inf.
    """
    quantized, scale = torch.ops.pycompress.quantize_weight.default(weight.detach())
    return torch.ops.pycompress.fake_quant_linear.default(
        x, weight, quantized, scale, bias, mode, input_scale, input_zero_point, backend
    )
