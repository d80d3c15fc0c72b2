"""Which batch norms can move into the convolution before them, and what has to change for it.

norm(conv(x)) in eval mode is another convolution: the norm's running statistics are numbers. As with activations
(fuse.py) it is done only where nothing can tell: on every path through the forward around them the convolution is read
once, by that norm, and the norm reads nothing else. An identity takes the norm's place.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pycompress.fuse import Edit, FusionPlan, NormFusion, by_owner, source, why_apart
from pycompress.layer_kinds import CONV2D
from pycompress.selection import Layer, ModuleMap, relative_name, weight_read_reason
from pycompress.tracing import Shadow


def plan_norms(modules: ModuleMap, layers: Iterable[Layer], shadow: Shadow) -> FusionPlan:
    """For each convolution to be swapped the batch norm to fold into it, or a note why not. Changes nothing."""
    plan = FusionPlan()
    norms: dict[nn.Module, list[nn.BatchNorm2d]] = {}
    for module in modules.names:
        if type(module) is nn.BatchNorm2d and (owner := modules.owner(module)) is not None:
            norms.setdefault(owner, []).append(module)
    groups = by_owner(modules, (layer for layer in layers if layer.kind is CONV2D), plan) if norms else {}
    for owner, group in groups.items():
        traces = shadow.explore(modules.names[owner][0])
        convs = {relative_name(modules, owner, layer.module): layer for layer in group}
        for norm in norms.get(owner, []):
            name = relative_name(modules, owner, norm)
            sources = {source(node) for node in traces.calls(name)}
            for conv in sources & convs.keys():
                module = convs[conv].module
                why_not = _why_not(norm, module, len(sources))
                why_not = why_not or why_apart(modules, owner, shadow, {conv: module}, norm)
                why_not = why_not or weight_read_reason(norm, modules, shadow, keeps_weight=False)
                if why_not:
                    plan.norm_notes[module] = f"{name} not folded in: {why_not}"
                    continue
                parent, key = modules.slots[norm][0]
                edit = Edit(parent._modules, key, nn.Identity().train(norm.training))
                plan.norms[module] = NormFusion(norm, name, edit)
    return plan


def _why_not(norm: nn.BatchNorm2d, conv: nn.Module, sources: int) -> str:
    if norm.training:
        return "it is in training mode; call model.eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if norm.num_features != conv.out_channels:
        return f"it has {norm.num_features} features, the convolution {conv.out_channels} channels"
    if norm.running_mean.is_meta or norm.running_mean.device != conv.weight.device:
        return f"it is on {norm.running_mean.device}"
    return "it is also called on another value" if sources > 1 else ""
