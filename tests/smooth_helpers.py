"""What the tests of smooth_ share: batches, a pre-norm transformer block, a model's outputs, a report's reasons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pycompress.calibration import evaluating, feed
from pycompress.readers import tensors_in

TOKENS = [torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]


def outputs(model: nn.Module, batches) -> list[torch.Tensor]:
    with evaluating(model):
        found = [t for batch in batches for t in tensors_in(feed(model, batch, "test"))]
    return [t.clone() for t in found if t.is_floating_point()]


def reasons(report) -> dict[str, str]:
    return {row.name: row.reason for row in report.left}


class Block(nn.Module):
    """Attention and feed-forward with the norm before each: q, k, v read one norm, fc1 the other."""

    def __init__(self, width: int = 16, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = activation or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.proj(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def with_outliers(block: Block, channels=(3, 7), size: float = 60.0) -> Block:
    """The function stays; two channels of what q, k, v and fc1 read become large, as in trained transformers."""
    with torch.no_grad():
        for norm, readers in ((block.norm1, (block.q, block.k, block.v)), (block.norm2, (block.fc1,))):
            for channel in channels:
                norm.weight[channel] *= size
                for reader in readers:
                    reader.weight[:, channel] /= size
    return block
