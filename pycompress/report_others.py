"""The weights of a model that quantize_ was not asked to replace, or that no layer here replaces."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from pycompress.layer_kinds import ATTENTION, KINDS, OURS, LayerKind
from pycompress.report import OtherLayer, model_bytes
from pycompress.selection import ModuleMap, own_reason, tensor_owners


def other_rows(modules: ModuleMap, unasked: Iterable[LayerKind]) -> list[OtherLayer]:
    """Layers of the kinds that were not asked for and could go, then parameters of two dimensions that are no layer's.

    unasked: attention is left out, whose parameters have rows of their own.
    """
    kinds = [kind for kind in unasked if kind is not ATTENTION]
    owners = tensor_owners(modules) if kinds else {}
    layers, bare = [], []
    for module, names in modules.names.items():
        kind = next((kind for kind in KINDS if kind.includes(module)), None)
        if kind is None:
            bare += _bare_rows(module, names[0])
        elif kind in kinds and names[0] and not own_reason(module, modules, owners, kind):
            reason, size = f"not asked for; layers={kind.name!r} takes it", model_bytes(module)
            row = names[0], "float", reason, kind.shape(module), "", size, size, tuple(names[1:])
            layers.append(OtherLayer(*row, kind.name))
    return layers + bare


def _bare_rows(module: nn.Module, name: str) -> list[OtherLayer]:
    reason = f"a parameter of {type(module).__name__}, which no layer here replaces"
    rows = []
    for key, tensor in module._parameters.items():
        if not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor) or isinstance(module, OURS):
            continue
        if tensor.is_floating_point() and sum(size > 1 for size in tensor.shape) > 1:
            size = tensor.numel() * tensor.element_size()
            rows.append(
                OtherLayer(f"{name}.{key}".lstrip("."), "float", reason, tuple(tensor.shape), "", size, size)
            )
    return rows
