"""The kinds of linear layers: rows of the table of ``structure_kinds.py``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import cost_cache
from pycompress.convert import carry_marks
from pycompress.nn import FakeQuantLinear, Int4Linear, Int8Linear, MaskedLinear, SparseLinear
from pycompress.nn.channel_scale import ChannelScale
from pycompress.nn.float_linear import is_conv1d
from pycompress.nn.low_rank_linear import LowRankLinear
from pycompress.nn.masked_linear import zeroed
from pycompress.ops.sparse_linear_reference import FORMAT_CODES, MOST
from pycompress.structure_kind import (
    FLAG,
    SIZE,
    TEXT,
    Field,
    Kind,
    Options,
    fill_packed,
    is_size,
    maker,
    state_of,
    type_name,
)
from pycompress.tensor_header import are_sizes

Shape = tuple[int, int]
_FORM_CODES = set(FORMAT_CODES.values())
ORIGINAL = ("original_out_features", "original_in_features")  # marks that shrink_ leaves on a smaller layer

# ---- options --------------------------------------------------------------------------------------------------------

_LINEAR = {
    "in_features": SIZE,
    "out_features": SIZE,
    "bias": FLAG._replace(read=lambda module: _has_bias(module)),
    "original": Field(
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_size, value)),
        "[outputs, inputs] before the layer was made smaller",
        lambda module: _original(module),
        optional=True,
    ),
}


def _has_bias(module: nn.Module) -> bool:
    last = module.up if isinstance(module, LowRankLinear) else module
    return getattr(last[1] if is_scaled(last) else last, "bias", None) is not None  # type: ignore[index]


def _original(module: nn.Module) -> list[int] | None:
    if isinstance(module, LowRankLinear) and not hasattr(module, ORIGINAL[0]):
        n, k = _original(module.up), _original(module.down)
        return [n[0] if n else module.out_features, k[1] if k else module.in_features] if n or k else None
    return [getattr(module, key) for key in ORIGINAL] if hasattr(module, ORIGINAL[0]) else None


# ---- making one -----------------------------------------------------------------------------------------------------


def linear_shape(module: nn.Module) -> Shape | None:
    """(outputs, inputs) of a linear layer of any kind, float or not; None for another module."""
    n, k = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(n, int) and isinstance(k, int):
        return n, k
    weight = module._parameters.get("weight")
    if is_conv1d(module) and weight is not None and weight.dim() == 2:
        return weight.shape[1], weight.shape[0]
    return None


def _linear_why_not(options: Options, old: nn.Module) -> str:
    """Why a linear layer with these options cannot take the place of `old`; empty where it can."""
    there, own = linear_shape(old), (options["out_features"], options["in_features"])
    if there is None:
        return f"the model has a {type_name(old)} there; pass a fresh float model of the same class"
    original = tuple(options.get("original", own))
    if any(size > before for size, before in zip(own, original, strict=True)):
        return f"it is {own} (outputs, inputs) and was {original}; a layer only becomes smaller, the file is damaged"
    if there not in (own, original):
        return f"it is {original} (outputs, inputs) and the model's {there}; build the model with the same sizes"
    if "original" not in options and options["bias"] != _has_bias(old):
        with_or = "with" if options["bias"] else "without"
        return f"it is {with_or} a bias, unlike the model's; build the model with the same options"
    return ""


def _low_rank_why_not(options: Options, old: nn.Module) -> str:
    rank, most = options["rank"], min(options["in_features"], options["out_features"])
    if rank > most and not (isinstance(old, LowRankLinear) and old.rank == rank):  # which would bound no tensor's size
        return f"its rank is {rank}, above its {most} inputs or outputs; the file is damaged"
    return _linear_why_not(options, old)


def _maker(cls: Callable[..., nn.Module], arguments: tuple[str, ...]) -> Callable[[Options, nn.Module], nn.Module]:
    make_plain = maker(cls, arguments)

    def make(options: Options, old: nn.Module) -> nn.Module:
        new = make_plain(options, old)
        for key, size in zip(ORIGINAL, options.get("original", ()), strict=False):
            setattr(new, key, size)
        return new

    return make


def _make_sparse(options: Options, old: nn.Module) -> nn.Module:
    new = _SPARSE(options, old)
    new._tokens = tuple(options["tokens"]) if options.get("tokens") else None  # type: ignore[assignment]
    return new


_SPARSE = _maker(SparseLinear, ("in_features", "out_features", "bias", "dtype", "format", "activation", "backend"))


def _make_linear(options: Options, old: nn.Module) -> nn.Module | None:
    """nn.Linear of another size than the class builds; None where the model has it already."""
    if type(old) is nn.Linear and linear_shape(old) == (options["out_features"], options["in_features"]):
        return None
    return _maker(nn.Linear, ("in_features", "out_features", "bias"))(options, old)


def is_scaled(module: nn.Module) -> bool:
    """Whether this is what smooth_ makes of a layer: Sequential(ChannelScale, layer)."""
    return type(module) is nn.Sequential and len(module) == 2 and type(module[0]) is ChannelScale


def _scaled_why_not(options: Options, old: nn.Module) -> str:
    there = linear_shape(old[1] if is_scaled(old) else old)  # type: ignore[index]
    if there is None or options["features"] > there[1] or options["out_features"] > there[0]:
        return (
            f"it scales the {options['features']} inputs of a linear layer, and the model has a {type_name(old)} "
            "there; pass a fresh float model of the same class, built with the same sizes"
        )
    return ""


def _make_scaled(options: Options, old: nn.Module) -> nn.Module | None:
    if is_scaled(old):
        return None
    new = nn.Sequential(ChannelScale(options["features"], device="meta"), old)
    carry_marks(old, new)  # as smooth_ does
    if hasattr(old, "in_features"):
        new.in_features, new.out_features = options["features"], options["out_features"]
    return new


def _masked_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; what the mask removes is 0, unless the layer keeps it for later."""
    assert isinstance(module, MaskedLinear)
    held = {key: t.detach() for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if module.gradient == "masked" and module.mask is not None and not module.weight.is_meta:
        held["weight"] = zeroed(held["weight"], module.mask)
    return held


def _fill_masked(module: nn.Module, tensors: Mapping[str, Tensor], options: Options) -> None:
    for key, tensor in tensors.items():
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[key] = tensor


def _fill_sparse(module: nn.Module, tensors: Mapping[str, Tensor], options: Options) -> None:
    """On the machine that saved it the layer computes as it did, to the bit: ties were settled by measuring there."""
    assert isinstance(module, SparseLinear)
    module.load_state_dict(dict(tensors), assign=True)
    choice = options.get("choice")
    if choice is not None and choice["machine"] == _machine() and module._forms is not None and module._forms.native:
        module._arrange(choice=tuple(choice["forms"]))


def _choice(module: SparseLinear) -> dict[str, Any] | None:
    if module.format != "auto" or module._forms is None or not module._forms.native:
        return None
    return {"machine": _machine(), "forms": list(module._choice)}


def _is_choice(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"machine", "forms"} or not are_sizes(value["forms"]):
        return False
    most, codes = value["forms"][::2], value["forms"][1::2]
    ascending = most == sorted(set(most)) and most[-1:] == [MOST]
    return isinstance(value["machine"], str) and ascending and len(codes) == len(most) and set(codes) <= _FORM_CODES


def _machine() -> str:
    """Equal where the cost model's figures are of the same machine, instruction set and number of threads."""
    key = cost_cache.machine_key(torch.get_num_threads())
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


# ---- rows -----------------------------------------------------------------------------------------------------------


def _row(
    cls: Callable[..., nn.Module],
    extra: Mapping[str, Field],
    **rest: Any,
) -> Kind:
    """A kind of linear layer whose constructor takes its options."""
    arguments = ("in_features", "out_features", "bias", *extra)
    why_not, make = rest.pop("why_not", _linear_why_not), rest.pop("make", _maker(cls, arguments))
    return Kind(cls, {**_LINEAR, **extra}, why_not, make, **rest)  # type: ignore[arg-type]


_SCALED = {
    "features": Field(is_size, "a size", lambda module: module[0].features),
    "out_features": Field(is_size, "a size", lambda module: linear_shape(module[1])[0]),  # type: ignore[index]
}
_CHOICE = Field(_is_choice, "the machine and the forms chosen on it", _choice, optional=True)
_MASKED = FLAG._replace(read=lambda module: module.mask is not None)
_TOKENS = Field(are_sizes, "numbers of tokens", lambda m: list(m._tokens) if m._tokens else None, optional=True)

LINEAR_KINDS = (
    _row(Int8Linear, {"mode": TEXT, "activation": TEXT, "backend": TEXT}, tensors=state_of, fill=fill_packed),
    _row(
        SparseLinear,
        {"dtype": TEXT, "format": TEXT, "activation": TEXT, "backend": TEXT, "tokens": _TOKENS, "choice": _CHOICE},
        make=_make_sparse,
        tensors=state_of,
        fill=_fill_sparse,
        unknown_length=frozenset(("weight_values",)),
        bitmap="weight_bitmap",
    ),
    _row(MaskedLinear, {"gradient": TEXT}, tensors=_masked_tensors, fill=_fill_masked),
    _row(
        FakeQuantLinear,
        {"mode": TEXT, "masked": _MASKED, "gradient": TEXT, "backend": TEXT},
        tensors=_masked_tensors,
        fill=_fill_masked,
    ),
    _row(LowRankLinear, {"rank": SIZE}, why_not=_low_rank_why_not),
    _row(
        Int4Linear,
        {"format": TEXT, "group_size": SIZE, "symmetric": FLAG, "activation": TEXT, "backend": TEXT},
        tensors=state_of,
        fill=fill_packed,
    ),
    Kind(nn.Linear, _LINEAR, _linear_why_not, _make_linear, is_ours=False),
    Kind(nn.Sequential, _SCALED, _scaled_why_not, _make_scaled, is_ours=False),
)
