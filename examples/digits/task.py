"""A small vision transformer on scikit-learn's 1797 digits, 8x8 pixels: model, data and accuracy for recipe.yaml.

An image is cut into 16 patches of 2x2 pixels, a token each. A quarter of the images is for the test, a fifth of the
others for validation: every choice (width, steps, rates, temperature) was made by the validation images. All splits
are the same for every seed, which draws the first weights and the batches.
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from pycompress.model_file import load_model, save_model

CLASSES, SIDE, PATCH = 10, 8, 2
TOKENS = (SIDE // PATCH) ** 2
BATCH = 64


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(images, tokens, self.heads, -1).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        return self.out(mixed.transpose(1, 2).reshape(images, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """images (B, 8, 8) fp32 in 0..1 -> logits (B, 10)."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(0.5 * torch.randn(TOKENS, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        cells = SIDE // PATCH
        patches = images.view(-1, cells, PATCH, cells, PATCH).transpose(2, 3).reshape(-1, TOKENS, PATCH * PATCH)
        x = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(x.mean(1)))


@cache
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 8, 8) fp32 in 0..1 and labels (n,) int64 of "train", "validation" and "test"."""
    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target, dtype=torch.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=data.target)
    train, validation = train_test_split(rest, test_size=0.2, random_state=0, stratify=data.target[rest])
    splits = {"train": train, "validation": validation, "test": test}
    return {name: (images[places], labels[places]) for name, places in splits.items()}


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to one pixel each way."""
    windows = functional.pad(images, (1, 1, 1, 1)).unfold(1, SIDE, 1).unfold(2, SIDE, 1)
    down, across = torch.randint(0, 3, (2, len(images)))
    return windows[torch.arange(len(images)), down, across]


def train_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images once, shuffled and shifted; drawn from torch's generator, which is seeded by the epoch."""
    images, labels = digits()["train"]
    for places in torch.randperm(len(images)).split(BATCH):
        if len(places) == BATCH:
            yield shifted(images[places]), labels[places]


@torch.no_grad()
def accuracy(model: nn.Module) -> dict[str, float]:
    """In %: on the test images, and on those that choices were made by."""
    right = {}
    for name, split in (("accuracy", "test"), ("validation", "validation")):
        images, labels = digits()[split]
        right[name] = 100 * (model(images).argmax(1) == labels).float().mean().item()
    return right


def model(
    seed: int, width: int = 192, depth: int = 3, heads: int = 6, steps: int = 800, kept: str = "runs/digits-models"
) -> nn.Module:
    """The transformer to compress, trained; kept in a file, so that the next call need not train it again."""
    torch.manual_seed(seed)
    transformer = VisionTransformer(width, depth, heads)
    path = Path(kept) / f"seed-{seed}-{width}x{depth}-{heads}-heads-{steps}-steps.safetensors"
    if path.is_file():
        return load_model(path, transformer).eval()
    print(f"training the model to compress, {steps} steps; it will be kept as {path}", file=sys.stderr, flush=True)
    train(transformer, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(transformer, path)
    return transformer.eval()


def train(model: nn.Module, steps: int, rate: float = 1e-3) -> None:
    """On the labels; the rate rises for a twentieth of the steps and falls to 0 in the others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    warmup = max(1, steps // 20)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    step = 0
    while step < steps:
        for images, labels in train_batches(0):
            functional.cross_entropy(model(images), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            step += 1
            if step == steps:
                break
