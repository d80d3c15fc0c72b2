"""What the linear operators share: activations, checks of their common arguments, the rule for autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress._native import DTYPE_CODES
from pycompress.codes import ACTIVATION_CODES, ACTIVATIONS, check_option

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_CODES",
    "activation_backward",
    "autocast_linear",
    "bias_backward",
    "check_bias",
    "check_devices",
    "check_input",
    "check_option",
]

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


# ---- checks: each raises ValueError in the name of `op` -----------------------------------------------------------


def check_input(op: str, x: Tensor) -> None:
    """Raises unless x is dense, floating and ``(..., K)``."""
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"{op}: x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if x.layout is not torch.strided:
        raise ValueError(f"{op}: x is {x.layout}, expected a dense tensor; use x.to_dense()")
    if x.dim() == 0:
        raise ValueError(f"{op}: x is a scalar, expected (..., K)")


def check_bias(op: str, bias: Tensor | None, n: int) -> None:
    """Raises unless bias is None, or contiguous, floating and ``(N,)``."""
    if bias is not None and (bias.shape != (n,) or bias.dtype not in DTYPE_CODES or not bias.is_contiguous()):
        got = f"{bias.dtype} {tuple(bias.shape)}" + ("" if bias.is_contiguous() else f" with strides {bias.stride()}")
        raise ValueError(f"{op}: bias has {got}, expected contiguous float32, bfloat16 or float16 ({n},)")


def check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raises unless the tensors are where x is."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} but {name} is on {tensor.device}; move one with .to(device)")


# ---- torch --------------------------------------------------------------------------------------------------------


def autocast_linear(op: torch._ops.OpOverload, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """As ``nn.Linear`` under autocast: x goes to the autocast dtype, float64 excepted. Scales and bias stay."""
    device = x.device.type
    if device in ("cpu", "cuda") and x.dtype in DTYPE_CODES:
        x = x.to(torch.get_autocast_dtype(device))
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return op(x, *args, **kwargs)


def activation_backward(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    """The gradient before the activation, in formulas that are differentiable in their turn."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, before, 0)
    if activation == "silu":
        gate = torch.sigmoid(before)
        return grad * gate * (1 + before * (1 - gate))
    return aten.gelu_backward(grad, before, approximate="tanh" if activation == "gelu_tanh" else "none")


def bias_backward(grad: Tensor, bias: Tensor) -> Tensor:
    """The gradient of the bias: summed over the tokens in float32."""
    if bias.numel() == 0:  # reshape could not tell how many tokens there are
        return torch.zeros_like(bias)
    return grad.reshape(-1, bias.numel()).sum(0, dtype=torch.float32).to(bias.dtype)
