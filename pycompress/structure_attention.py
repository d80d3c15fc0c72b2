"""The kinds of attention: rows of the table of ``structure_kinds.py``."""

from __future__ import annotations

import torch
from torch import nn

from pycompress.nn import Int8MultiheadAttention
from pycompress.pruning.shrink_attention import FewerHeadsAttention
from pycompress.structure_kind import FLAG, SIZE, TEXT, Field, Kind, Options, maker, sizes_why_not, type_name
from pycompress.tensor_header import are_sizes


def _attention_why_not(options: Options, old: nn.Module) -> str:
    if not isinstance(old, nn.MultiheadAttention):
        return f"the model has a {type_name(old)} there; expected nn.MultiheadAttention"
    width, heads = options["embed_dim"], options["original_heads"]
    if old.embed_dim != width or getattr(old, "original_heads", old.num_heads) != heads:
        return (
            f"it is {width} wide with {heads} heads, the model's {old.embed_dim} with {old.num_heads}; build the model "
            "with the same sizes"
        )
    kept = options["kept_heads"]
    if not kept or any(head >= heads for head in kept) or sorted(set(kept)) != kept:
        return f"kept_heads={kept}; expected some of the {heads} heads, in order"
    if type(old) is FewerHeadsAttention and list(old.kept_heads) != kept:
        return f"it keeps the heads {kept} and the model's {list(old.kept_heads)}; pass a fresh model"
    return ""


def _make_attention(options: Options, old: nn.Module) -> nn.Module | None:
    assert isinstance(old, nn.MultiheadAttention)
    if type(old) is FewerHeadsAttention:
        return None
    width, embed = len(options["kept_heads"]) * old.head_dim, old.embed_dim
    # Not on the meta device at once: the first torch.cat of meta tensors in a process imports for seconds.
    projections = [_unfilled_linear(embed, width, old.in_proj_bias is not None) for _ in range(3)]
    output = _unfilled_linear(width, embed, old.out_proj.bias is not None)
    return FewerHeadsAttention(old, projections, output, options["kept_heads"]).to("meta")


def _unfilled_linear(k: int, n: int, bias: bool) -> nn.Linear:
    """An nn.Linear with memory that nothing was written to; no random number is drawn."""
    linear = nn.Linear(k, n, bias, device="meta")
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, nn.Parameter(torch.empty(parameter.shape)))
    return linear


def _int8_why_not(options: Options, old: nn.Module) -> str:
    why_not = sizes_why_not(options, old, (nn.MultiheadAttention, Int8MultiheadAttention), _SIZES)
    if why_not or type(old) is FewerHeadsAttention:
        return why_not or "the model's has fewer heads already; pass a fresh float model of the same class"
    for key, read in (("bias", _bias_of), ("add_bias_kv", _has_bias_kv)):
        if options[key] != read(old):
            return f"it has {key}={options[key]}, unlike the model's; build the model with the same options"
    return ""


def _bias_of(attention: nn.Module) -> bool:
    return getattr(attention.out_proj, "bias", None) is not None


def _has_bias_kv(attention: nn.Module) -> bool:
    return attention.bias_k is not None


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


_SIZES = ("embed_dim", "num_heads", "kdim", "vdim", "batch_first", "add_zero_attn")
_INT8 = {
    "embed_dim": SIZE,
    "num_heads": SIZE,
    "dropout": Field(_is_rate, "a rate"),
    "bias": FLAG._replace(read=_bias_of),
    "add_bias_kv": FLAG._replace(read=_has_bias_kv),
    "add_zero_attn": FLAG,
    "kdim": SIZE,
    "vdim": SIZE,
    "batch_first": FLAG,
    "mode": TEXT,
    "packed": FLAG,
    "backend": TEXT,
}
_HEADS = Field(are_sizes, "numbers of heads", lambda module: list(module.kept_heads))

ATTENTION_KINDS = (
    Kind(
        FewerHeadsAttention,
        {"embed_dim": SIZE, "original_heads": SIZE, "kept_heads": _HEADS},
        _attention_why_not,
        _make_attention,
    ),
    # Its projections are layers with rows of their own.
    Kind(Int8MultiheadAttention, _INT8, _int8_why_not, maker(Int8MultiheadAttention, tuple(_INT8))),
)
