"""Masks put into a model, in place and all or nothing: nn.Linear becomes MaskedLinear, MaskedLinear gets a new mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pycompress.convert import apply_edits, carry_marks, shape_of
from pycompress.fuse import Edit, fast_path_edits
from pycompress.nn import MaskedLinear
from pycompress.nn.masked_linear import check_mask
from pycompress.pruning.choose import HeadNames
from pycompress.pruning.heads import attention_heads
from pycompress.pruning.patterns import Pattern
from pycompress.selection import FLOATS, OURS, FilterFn, Layer, ModuleMap, select
from pycompress.tracing import Shadow


@dataclass(frozen=True)
class Found:
    """The linear layers of a model, each with the reason that keeps it as it is, or none."""

    modules: ModuleMap
    layers: list[Layer]
    heads: list[HeadNames]  # for pattern "head": the attentions whose layers are all chosen

    @property
    def chosen(self) -> dict[str, nn.Module]:
        return {layer.name: layer.module for layer in self.layers if not layer.reason}

    def without(self, names: Iterable[str], reason: str, op: str) -> Found:
        """The same with these layers left, and every attention of which one is; an error where nothing is chosen."""
        out = set(names)
        broken = [attention for attention in self.heads if not out.isdisjoint(attention.names)]
        why = {name: f"of a layer of its heads: {reason}" for attention in broken for name in attention.names}
        why.update(dict.fromkeys(out, reason))
        layers = [replace(layer, reason=why.get(layer.name, layer.reason)) for layer in self.layers]
        if out and all(layer.reason for layer in layers):
            raise ValueError(f"{op}: nothing to prune: of every layer that could be, {reason}")
        return Found(self.modules, layers, [attention for attention in self.heads if attention not in broken])


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """Every MaskedLinear of the model by its first qualified name, in the model's order; no FakeQuantLinear that has no
    mask.
    """
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, MaskedLinear) and m.mask is not None}


def find_layers(
    model: nn.Module,
    pattern: Pattern,
    *,
    op: str,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
) -> Found:
    """The layers that can carry a mask: nn.Linear, Conv1D and MaskedLinear; see selection.select for what cannot.

    Raises ValueError for a skip that matches nothing, and for a chosen layer that is too small for the pattern.
    """
    modules = ModuleMap(model)
    shadow = Shadow(model, opaque=OURS)
    layers = select(
        modules,
        shadow,
        op=op,
        skip=skip,
        filter_fn=filter_fn,
        takes=(MaskedLinear,),
        dtypes=(*FLOATS, torch.float64),
    )
    heads: list[HeadNames] = []
    if pattern.kind == "head":
        layers, heads = _only_heads(model, layers, op)
    else:
        for layer in layers:
            if not layer.reason:
                pattern.check(shape_of(layer.module), layer.name, op=op)
    return Found(modules, layers, heads)


def _only_heads(model: nn.Module, layers: list[Layer], op: str) -> tuple[list[Layer], list[HeadNames]]:
    """Leaves what belongs to no attention, and an attention of which one layer is left."""
    by_module = {layer.module: layer for layer in layers}
    reasons: dict[nn.Module, str] = {}
    heads = []
    known = attention_heads(model)
    for attention in known:
        stays = next((m for m in attention.layers if m not in by_module or by_module[m].reason), None)
        if stays is None:
            query, key, value, output = (by_module[module].name for module in attention.layers)
            heads.append(HeadNames(attention.name, (query, key, value), output, attention.heads))
            why = ""
        elif stays in by_module:
            why = f"its heads go through {by_module[stays].name} too, which is left: {by_module[stays].reason}"
        else:
            why = f"its heads go through a {type(stays).__name__} too"
        reasons.update(dict.fromkeys(attention.layers, why))
    if not known:
        raise ValueError(
            f"{op}: pattern 'head' found no attention that it knows (Hugging Face's BERT family, DistilBERT, ALBERT); "
            "use pattern 'row' or 'column'"
        )
    usual = "is no projection of an attention that is known"
    return [
        layer if layer.reason else replace(layer, reason=reasons.get(layer.module, usual)) for layer in layers
    ], heads


def swap_in(
    found: Found, masks: Mapping[str, Tensor], gradient: str | None = None, *, op: str = "prune_"
) -> dict[str, MaskedLinear]:
    """Make the chosen layers MaskedLinear with these masks, and return them by name.

    masks: by layer name, bool (N, K); a layer that has none keeps every weight, a MaskedLinear its mask.
    gradient: of the new layers, "masked" by default; a MaskedLinear keeps its own unless it is given.

    Whenever it raises, the model is what it was.
    """
    made: dict[str, MaskedLinear] = {}
    edits: list[Edit] = []
    for layer in found.layers:
        if layer.reason:
            continue
        old = layer.module
        if isinstance(old, MaskedLinear):
            made[layer.name] = old
            if gradient is not None:
                edits += [Edit(old.__dict__, "gradient", gradient), Edit(old.__dict__, "_fold", None)]
        else:
            new = MaskedLinear._around(old, gradient or "masked")
            carry_marks(old, new)
            made[layer.name] = new
            edits += [Edit(parent._modules, key, new) for parent, key in layer.slots]
    swapped = {layer.module for layer in found.layers if not layer.reason}
    edits += fast_path_edits(found.modules, swapped)
    set_masks({name: made[name] for name in masks}, masks, edits, op=op)
    return made


def set_masks(
    layers: Mapping[str, MaskedLinear],
    masks: Mapping[str, Tensor],
    edits: Iterable[Edit] = (),
    *,
    op: str = "set_masks",
) -> None:
    """Give every layer its mask (and make `edits`) or, where that fails, none.

    Raises ValueError for a mask of another shape, dtype or device than the layer's.
    """
    for name, layer in layers.items():
        check_mask(masks[name], layer.mask, f"{op}: layer {name!r}")
    before = {name: layer.mask.clone() for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.mask.copy_(masks[name])
        apply_edits(list(edits))
    except BaseException:
        for name, layer in layers.items():
            layer.mask.copy_(before[name])
        raise
    # Only now are weights lost. Were this interrupted, the next forward would go on with it.
    for layer in layers.values():
        layer.set_mask(layer.mask)
