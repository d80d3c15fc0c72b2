"""Attention heads that can go: which are there, and what is left without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pycompress.fuse import Edit
from pycompress.pruning.heads import attention_heads
from pycompress.pruning.shrink_attention import FewerHeadsAttention
from pycompress.pruning.shrink_find import has_hooks
from pycompress.pruning.shrink_layers import Draft
from pycompress.selection import ModuleMap
from pycompress.tracing import methods_of

# What Hugging Face's forwards read, in one version or another, by the module's attributes.
_HEAD_COUNTS = ("num_attention_heads", "n_heads")
_WIDTHS = ("all_head_size", "dim")
_OUT_PROJECTIONS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)  # of nn.MultiheadAttention


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """One attention module; `layers` are its query, key, value and output projections.

    reason: why its heads cannot go, or nothing.
    """

    kind: ClassVar[str] = "heads"

    name: str
    module: nn.Module
    layers: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]
    head_size: int
    reason: str = ""

    @property
    def size(self) -> int:
        return self.layers[2].out_features // self.head_size


def find_heads(modules: ModuleMap) -> list[HeadGroup]:
    """Every attention module whose heads shrink_ knows."""
    groups = []
    for found in attention_heads(modules.model):
        if all(isinstance(layer, nn.Linear) for layer in found.layers):
            layers: Any = found.layers
            groups.append(HeadGroup(found.name, found.module, layers, found.head_size, _hooked(found.module)))
    for module, names in modules.names.items():
        if isinstance(module, nn.MultiheadAttention):
            groups.append(_torch_heads(names[0], module, modules))
    return groups


def _hooked(module: nn.Module) -> str:
    return "it has hooks" if has_hooks(module) or "forward" in module.__dict__ else ""


def _torch_heads(name: str, module: nn.MultiheadAttention, modules: ModuleMap) -> HeadGroup:
    """nn.MultiheadAttention with views of its packed projection as three layers of their own."""
    reason = _hooked(module) or _hooked(module.out_proj)
    if type(module.out_proj) not in _OUT_PROJECTIONS:
        return _left(name, module, f"its output projection is a {type(module.out_proj).__name__}")
    if type(module) not in (nn.MultiheadAttention, FewerHeadsAttention):
        reason = f"is a {type(module).__name__}, a subclass that may do more"
    elif module.in_proj_weight is None:
        reason = "keeps its three projections apart (kdim or vdim differ from embed_dim)"
    elif module.in_proj_weight.is_meta:
        reason = "its weights are on the meta device; load them first"
    elif module.bias_k is not None or module.add_zero_attn:
        reason = "adds a key and value of its own (add_bias_kv or add_zero_attn)"
    elif {*module._parameters} != {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}:
        reason = reason or "holds parameters of another kind, as torch.nn.utils.prune leaves them; make them permanent"
    elif module in modules.aliases or len(modules.slots.get(module, [])) == 0:
        reason = reason or "is also held in a plain attribute, or is the model itself"
    elif reader := _reader(module, modules):
        reason = f"{reader} reads its weights directly"
    if reason and module.in_proj_weight is None:
        return _left(name, module, reason)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    weights = module.in_proj_weight.chunk(3)
    query, key, value = (_as_linear(w, b) for w, b in zip(weights, biases, strict=True))
    output = _as_linear(module.out_proj.weight, module.out_proj.bias)
    return HeadGroup(name, module, (query, key, value, output), module.head_dim, reason)


def _left(name: str, module: nn.MultiheadAttention, reason: str) -> HeadGroup:
    stand_in = nn.Linear(1, module.num_heads * module.head_dim, device="meta")
    return HeadGroup(name, module, (stand_in,) * 4, module.head_dim, reason)


def _reader(attention: nn.Module, modules: ModuleMap) -> str:
    """A method above that hands the packed weights on, as CLIP's pooling does; torch's own classes are known."""
    methods = (method for above in modules.ancestors(attention) for method in methods_of(above))
    return next((method.label for method in methods if "in_proj_weight" in method.names), "")


def _as_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear


def shrink_heads(drafts: Sequence[Draft], head_size: int) -> int:
    """Take out the heads that carry nothing but a constant, or that nobody reads; one stays. Returns how many went.

    drafts: query, key, value, output. A head whose value weights are all zero gives its value's bias at every token,
    since the attention weights of a token add up to 1.
    """
    query, key, value, output = drafts
    constant = value.zero_rows().view(-1, head_size).all(1)
    unread = output.zero_columns().view(-1, head_size).all(1)
    keep = ~(constant | unread)
    if not bool(keep.any()) and len(keep):
        keep[0] = True
    gone = int((~keep).sum())
    if gone:
        units = keep.repeat_interleave(head_size)
        bias = value.bias if value.bias is not None else value.weight.new_zeros(len(units))
        output.keep_columns(units, bias.double())
        for draft in (query, key, value):
            draft.keep_rows(units)
    return gone


def head_edits(group: HeadGroup, drafts: Sequence[Draft], modules: ModuleMap) -> list[Edit]:
    """What has to change besides the four layers; for nn.MultiheadAttention, which is replaced, everything."""
    module, width = group.module, len(drafts[2].rows)
    if isinstance(module, nn.MultiheadAttention):
        kept = (drafts[2].rows[:: group.head_size] // group.head_size).tolist()
        *projections, output = (draft.build() for draft in drafts)
        new = FewerHeadsAttention(module, projections, output, kept)
        return [Edit(parent._modules, key, new) for parent, key in modules.slots[module]]
    edits = []
    for keys, number in ((_HEAD_COUNTS, width // group.head_size), (_WIDTHS, width)):
        edits += [Edit(module.__dict__, key, number) for key in keys if key in module.__dict__]
    return edits
