"""The float layer that a compressed one comes from and goes back to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


def is_conv1d(linear: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, which keeps its weight as (K, N)."""
    return any(c.__name__ == "Conv1D" for c in type(linear).__mro__)


def float_weight(linear: nn.Module, caller: str) -> Tensor:
    """The (N, K) weight of ``nn.Linear`` or of transformers' ``Conv1D``; of a MaskedLinear 0 where it is pruned.

    Raises:
        ValueError: the module has no such weight.
    """
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"{caller}: expected an nn.Linear, got {type(linear).__name__}")
    if is_conv1d(linear):
        return weight.t()
    mask = getattr(linear, "mask", None)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == weight.shape:
        return torch.where(mask, weight, 0)
    return weight


def float_bias(linear: nn.Module) -> nn.Parameter | None:
    """A copy of the bias, float32 where it is float64: the kernels take no such bias."""
    bias, mask = getattr(linear, "bias_orig", None), getattr(linear, "bias_mask", None)
    if isinstance(bias, Tensor) and isinstance(mask, Tensor):  # torch.nn.utils.prune: `bias` is of the last forward
        trained = bias.requires_grad
        bias = bias.detach() * mask
        bias.requires_grad_(trained)
    else:
        bias = linear.bias
    if not isinstance(bias, Tensor):
        return None
    dtype = torch.float32 if bias.dtype == torch.float64 else bias.dtype
    return nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=bias.requires_grad)


def make_float(weight: Tensor, bias: Tensor | None, activation: str, training: bool) -> nn.Module:
    """The ``nn.Linear`` with this (N, K) weight, in the bias's dtype (float32 without one).

    An activation other than ``"none"`` follows it, in an ``nn.Sequential``.
    """
    n, k = weight.shape
    dtype = torch.float32 if bias is None else bias.dtype
    linear = nn.Linear(k, n, bias is not None, device=weight.device, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias).requires_grad_(bias.requires_grad)
    if activation == "none":
        return linear.train(training)
    return nn.Sequential(linear, ACTIVATION_MODULES[activation]()).train(training)
