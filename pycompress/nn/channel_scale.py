"""``ChannelScale``: what stands before a smoothed linear layer where no layer before it could take the scale in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelScale(nn.Module):
    """``y = x * scale``, a factor a channel (SmoothQuant, Xiao et al. 2023); see :func:`pycompress.smooth_`.

    Args:
        features: K, the size of the last dimension of x.

    State: the buffer ``scale`` (K,), which training leaves alone; a new module holds ones. Input ``(..., K)``; the
    output is of the same shape and dtype.
    """

    scale: Tensor

    def __init__(
        self, features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(features, device=device, dtype=dtype))

    @property
    def features(self) -> int:
        return self.scale.numel()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}"
