"""Compressed models of every kind that a file can keep, each with the function that builds the fresh one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import pycompress
from pycompress.low_rank import factorize_
from pycompress.nn import Int8Conv2d, MaskedLinear
from pycompress.qat import prepare_qat_
from pycompress.smooth import smooth_


class Case(NamedTuple):
    fresh: Callable[[], nn.Module]
    compress: Callable[[nn.Module, Tensor], object]
    inputs: Callable[[], Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 12))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


class Mixed(nn.Module):
    """A shared layer, a tied weight, buffers of both sorts, a recurrent layer, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.arange(16) - 3, persistent=False)
        self.register_buffer("flags", torch.arange(16) % 3 == 0)
        self.scale = nn.Parameter(torch.rand(()), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(torch.relu(self.first(self.embedding(ids)))) + self.offset * self.flags
        x = self.lstm(x)[0]
        return self.head(self.norm(x.mT).mT * self.scale)


class Words(nn.Module):
    """Both kinds of embeddings, and attention with a bias for key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, padding_idx=0)
        self.bag = nn.EmbeddingBag(20, 16, mode="sum", include_last_offset=False)
        self.attention = nn.MultiheadAttention(16, 4, add_bias_kv=True, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.attention(x, x, x)[0] + self.bag(ids)[:, None]


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding="same", bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1, stride=2),
        nn.Flatten(),
        nn.Linear(144, 5),
    )


def _convolutions(model: nn.Module, x: Tensor) -> object:
    """As quantize_ does with larger ones: a norm is folded in, and leaves a bias that the class does not build."""
    folded = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    model[0], model[1] = Int8Conv2d.from_float(folded, activation="relu"), nn.Identity()
    model[2], model[3] = nn.Identity(), Int8Conv2d.from_float(model[3], "static", input_range=(0.0, 3.0))
    return model.eval()


def _quantize(mode: str) -> Callable[[nn.Module, Tensor], object]:
    def compress(model: nn.Module, x: Tensor) -> object:
        ranges = pycompress.calibrate(model, [x]) if mode == "static" else None
        return pycompress.quantize_(model, mode, calibration=ranges)

    return compress


def _quantize_all(mode: str, **options: object) -> Callable[[nn.Module, Tensor], object]:
    return lambda model, x: pycompress.quantize_(model, mode, layers="all", **options)  # type: ignore[arg-type]


def _prune(sparsity: float = 0.75, pattern: str = "4x4", **options: str) -> Callable[[nn.Module, Tensor], object]:
    return lambda model, x: pycompress.prune_(model, sparsity, pattern=pattern, **options)


def _sparsify(dtype: str, format: str, pattern: str = "unstructured") -> Callable[[nn.Module, Tensor], object]:
    def compress(model: nn.Module, x: Tensor) -> object:
        pycompress.prune_(model, 0.75, pattern=pattern)
        return pycompress.sparsify_(model, dtype, format)

    return compress


def _qat(mode: str, prune: bool) -> Callable[[nn.Module, Tensor], object]:
    def compress(model: nn.Module, x: Tensor) -> object:
        if prune:
            pycompress.prune_(model, 0.5)
        return prepare_qat_(model, mode, calibration=pycompress.calibrate(model, [x]) if mode == "static" else None)

    return compress


def _low_rank(model: nn.Module, x: Tensor) -> object:
    factorize_(model, rank=4)
    return pycompress.quantize_(model, skip="0")


def _shrunk_low_rank(model: nn.Module, x: Tensor) -> object:
    """Smaller layers as products whose parts are scaled: each wrapped in the other's."""
    shrink(model, x)
    factorize_(model, ratio=0.7)
    smooth_(model, [x], where="anywhere")
    return pycompress.quantize_(model)


def _smooth(model: nn.Module, x: Tensor) -> object:
    smooth_(model, [x], where="anywhere")
    return pycompress.quantize_(model)


def shrink(model: nn.Module, x: Tensor) -> object:
    with torch.no_grad():
        for module in model.modules():
            if type(module) is nn.Linear and module.out_features > 16:
                module.weight[::3] = 0
            if isinstance(module, nn.MultiheadAttention):
                module.out_proj.weight[:, :8] = 0
    return pycompress.shrink_(model)


def _shrunk_int8(model: nn.Module, x: Tensor) -> object:
    shrink(model, x)
    return pycompress.quantize_(model)


def _latent(model: nn.Module, x: Tensor) -> object:
    """Weights behind the mask, a kept one that is zero, and layers in different modes."""
    report = pycompress.prune_(model, 0.5, gradient="dense")
    for layer in model.modules():
        if isinstance(layer, MaskedLinear):
            with torch.no_grad():
                layer.weight[layer.mask] *= torch.arange(int(layer.mask.sum())) % 5
    model[2].eval()
    return report


def _half(model: nn.Module, x: Tensor) -> object:
    model.to(torch.bfloat16)
    return pycompress.quantize_(model, skip="0")


def rows() -> Tensor:
    return torch.randn(7, 32)


def sequences() -> Tensor:
    return torch.randn(2, 5, 16)


CASES = {
    "float": Case(mlp, lambda model, x: None, rows),
    "bfloat16": Case(mlp, _half, lambda: rows().bfloat16()),
    "int8 dynamic": Case(mlp, _quantize("dynamic"), rows),
    "int8 static": Case(mlp, _quantize("static"), rows),
    "int8 weight_only": Case(mlp, _quantize("weight_only"), rows),
    "masked": Case(mlp, _prune(), rows),
    "masked dense": Case(mlp, _latent, rows),
    "sparse float32": Case(mlp, _sparsify("float32", "bitmap"), rows),
    "sparse bfloat16": Case(mlp, _sparsify("bfloat16", "index", "1x4"), rows),
    "sparse int8": Case(mlp, _sparsify("int8", "auto", "4x4"), rows),
    "qat": Case(mlp, _qat("dynamic", False), rows),
    "qat static, masked": Case(mlp, _qat("static", True), rows),
    "low rank": Case(mlp, _low_rank, rows),
    "shrunk, low rank, scaled": Case(mlp, _shrunk_low_rank, rows),
    "smoothed": Case(mlp, _smooth, rows),
    "shrunk": Case(mlp, shrink, rows),
    "shrunk int8": Case(mlp, _shrunk_int8, rows),
    "encoder int8": Case(encoder, _quantize("dynamic"), sequences),
    "encoder masked": Case(encoder, _prune(0.5, "1x4"), sequences),
    "encoder shrunk": Case(encoder, shrink, sequences),
    "int4": Case(mlp, _quantize_all("int4", group_size=16, symmetric=False), rows),
    "nf4": Case(mlp, _quantize_all("nf4"), rows),
    "images int8": Case(images, _convolutions, lambda: torch.randn(2, 3, 6, 6)),
    "words int8": Case(Words, _quantize_all("dynamic"), lambda: torch.randint(0, 20, (3, 5))),
    "mixed": Case(Mixed, lambda model, x: pycompress.quantize_(model), lambda: torch.randint(0, 20, (3, 5))),
}


def compressed(name: str) -> tuple[nn.Module, Tensor]:
    """The model of a case, in eval mode, and inputs for it."""
    case = CASES[name]
    model, x = case.fresh().eval(), case.inputs()
    case.compress(model, x)
    return model, x


def fresh(name: str, device: str) -> nn.Module:
    with torch.device(device):
        return CASES[name].fresh()
