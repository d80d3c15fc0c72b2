"""The models that the tests of measuring share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def half_mask(n: int, k: int) -> Tensor:
    return (torch.arange(n * k).reshape(n, k) % 2).bool()
