"""The plain attributes of modules that conversions change, where a description keeps them."""

from __future__ import annotations

from typing import Any

from torch import nn

from pycompress.fuse import Edit, identity
from pycompress.structure_kind import is_size, type_name

ReadAttributes = dict[str, Any]
_FAST_PATH = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_FUNCTION = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# What Hugging Face's attentions read, and shrink_ changes with the number of heads.
_HEAD_COUNTS = ("num_attention_heads", "n_heads")
_SIZES = (*_HEAD_COUNTS, "all_head_size", "dim")
_IDENTITY = "identity"


def attributes_of(module: nn.Module) -> ReadAttributes:
    """The plain attributes that conversions change, as they are."""
    own = module.__dict__
    found: ReadAttributes = {key: own[key] for cls, key in _FAST_PATH.items() if isinstance(module, cls) and key in own}
    if isinstance(module, _FUNCTION) and own.get("activation") is identity:
        found["activation"] = _IDENTITY
    if any(key in own for key in _HEAD_COUNTS):
        found.update((key, own[key]) for key in _SIZES if is_size(own.get(key)))
    return found


def checked_attribute(module: nn.Module, key: str, value: object) -> list[Edit]:
    """The edit that gives the module this attribute. Raises ValueError where that is none of attributes_of's."""
    kinds = [cls for cls, name in _FAST_PATH.items() if name == key and isinstance(module, cls)]
    known = bool(kinds) and isinstance(value, (bool, int)) and 0 <= value <= 2
    known = known or (key == "activation" and isinstance(module, _FUNCTION) and value == _IDENTITY)
    known = known or (key in _SIZES and is_size(value))
    if not known:
        raise ValueError(f"this version of pycompress does not set {key}={value!r} on a {type_name(module)}")
    if key not in module.__dict__:
        raise ValueError(
            f"the model's {type_name(module)} has no plain attribute {key!r}; pass a model of the same class"
        )
    return [Edit(module.__dict__, key, identity if value == _IDENTITY else value)]
