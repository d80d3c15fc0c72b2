"""Models and checkpoints for the tests of compressed-tensors: ours, and the library's own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor, nn

from pycompress.nn import Int4Linear, Int8Linear, SparseLinear

SIZES = (64, 96, 35)


def net(bias: bool = True) -> nn.Sequential:
    first, second, third = SIZES
    return nn.Sequential(nn.Linear(first, second, bias), nn.Tanh(), nn.Linear(second, third), nn.LayerNorm(third))


def with_layers(make: object, *args: object, **options: object) -> nn.Sequential:
    """The net with its linear layers made by `make`, a from_float or from_dense."""
    model = net()
    for key in ("0", "2"):
        layer = model.get_submodule(key)
        setattr(model, key, make(layer, *args, **options))
    return model


def pruned(model: nn.Module, sparsity: float = 0.7) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            kept = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(3)) > sparsity
            module.weight.data *= kept
    return model


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def local(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {key[len(layer) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{layer}.")}


def library_scheme(folder: Path, layer: str) -> QuantizationScheme:
    """What the library makes of our config for this layer."""
    config = QuantizationConfig.model_validate(config_of(folder))
    groups = list(config.config_groups.values())
    return next((group for group in groups if layer in group.targets), groups[0])


def library_weight(folder: Path, layer: str) -> Tensor:
    """The float weight that the library reads."""
    scheme = library_scheme(folder, layer)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(local(tensors_of(folder), layer), scheme)["weight"]


def library_tensors(folder: Path, layer: str) -> dict[str, Tensor]:
    """The tensors that the library writes for the float weight that it reads."""
    scheme = library_scheme(folder, layer)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.compress(compressor.decompress(local(tensors_of(folder), layer), scheme), scheme)


def our_weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, (Int4Linear, Int8Linear, SparseLinear))
    return layer.to_float().weight.detach()


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
    kinds = [(name, type(module)) for name, module in one.named_modules()]
    assert kinds == [(name, type(module)) for name, module in other.named_modules()]
