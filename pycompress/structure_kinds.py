"""The kinds of modules that a compressed model may hold where its class builds another: a table, one row a kind.

A row says which options of a module a description keeps, what they may be, which module of the fresh model it may take
the place of, and how it is made on the meta device and filled with the tensors of a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress import cost_cache
from pycompress.convert import carry_marks
from pycompress.nn import FakeQuantLinear, Int8Linear, MaskedLinear, SparseLinear
from pycompress.nn.channel_scale import ChannelScale
from pycompress.nn.float_linear import is_conv1d
from pycompress.nn.low_rank_linear import LowRankLinear
from pycompress.nn.masked_linear import zeroed
from pycompress.ops.sparse_linear_reference import FORMAT_CODES, MOST
from pycompress.pruning.shrink_attention import FewerHeadsAttention
from pycompress.tensor_file import are_sizes

Options = dict[str, Any]
Shape = tuple[int, int]
_FORM_CODES = set(FORMAT_CODES.values())
ORIGINAL = ("original_out_features", "original_in_features")  # marks that shrink_ leaves on a smaller layer


def type_name(module: nn.Module) -> str:
    return type(module).__name__


# ---- options --------------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """An option of a kind: what it may be, in a test and in words, and how a module tells it."""

    fits: Callable[[Any], bool]
    expected: str
    read: Callable[[Any], Any] | None = None  # by default the attribute of the option's name
    optional: bool = False


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


_SIZE = Field(is_size, "a size")
_TEXT = Field(lambda value: isinstance(value, str), "a name")
_LINEAR = {
    "in_features": _SIZE,
    "out_features": _SIZE,
    "bias": Field(lambda value: isinstance(value, bool), "true or false", lambda module: _has_bias(module)),
    "original": Field(
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_size, value)),
        "[outputs, inputs] before the layer was made smaller",
        lambda module: _original(module),
        optional=True,
    ),
}


def _has_bias(module: nn.Module) -> bool:
    last = module.up if isinstance(module, LowRankLinear) else module
    return getattr(last[1] if _is_scaled(last) else last, "bias", None) is not None  # type: ignore[index]


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
    def make(options: Options, old: nn.Module) -> nn.Module:
        new = cls(**{key: options[key] for key in arguments}, device="meta")
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


def _is_scaled(module: nn.Module) -> bool:
    """Whether this is what smooth_ makes of a layer: Sequential(ChannelScale, layer)."""
    return type(module) is nn.Sequential and len(module) == 2 and type(module[0]) is ChannelScale


def _scaled_why_not(options: Options, old: nn.Module) -> str:
    there = linear_shape(old[1] if _is_scaled(old) else old)  # type: ignore[index]
    if there is None or options["features"] > there[1] or options["out_features"] > there[0]:
        return (
            f"it scales the {options['features']} inputs of a linear layer, and the model has a {type_name(old)} "
            "there; pass a fresh float model of the same class, built with the same sizes"
        )
    return ""


def _make_scaled(options: Options, old: nn.Module) -> nn.Module | None:
    if _is_scaled(old):
        return None
    new = nn.Sequential(ChannelScale(options["features"], device="meta"), old)
    carry_marks(old, new)  # as smooth_ does
    if hasattr(old, "in_features"):
        new.in_features, new.out_features = options["features"], options["out_features"]
    return new


def _make_identity(options: Options, old: nn.Module) -> nn.Module | None:
    return None if type(old) is nn.Identity else nn.Identity()


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


# ---- tensors --------------------------------------------------------------------------------------------------------


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in module.state_dict().items()}


def _fill_int8(module: nn.Module, tensors: Mapping[str, Tensor], options: Options) -> None:
    """As load_state_dict, without its copy of the weight."""
    assert isinstance(module, Int8Linear)
    held = {**tensors, "_weight": tensors["weight"]}
    for key in ("_weight", "weight_scale", "input_scale", "input_zero_point"):
        if module._buffers[key] is not None:
            module._buffers[key] = held[key]
    if module.bias is not None:
        module.bias = nn.Parameter(held["bias"], requires_grad=False)
    module._arrange()


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


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    why_not: of the options and the module of the fresh model; make: of the same, None where that module can stay.
    tensors, fill: what a file keeps of the module, and back into one on the meta device; a kind without them is made
        of other modules. unknown_length: those of its tensors whose length the options do not tell; bitmap: the one
        that holds a bit for each weight.
    is_ours: whether no class builds such a module by itself.
    """

    cls: type[nn.Module]
    fields: Mapping[str, Field]
    why_not: Callable[[Options, nn.Module], str]
    make: Callable[[Options, nn.Module], nn.Module | None]
    tensors: Callable[[nn.Module], dict[str, Tensor]] | None = None
    fill: Callable[[nn.Module, Mapping[str, Tensor], Options], None] | None = None
    unknown_length: frozenset[str] = frozenset()
    bitmap: str = ""
    is_ours: bool = True

    @property
    def name(self) -> str:
        return self.cls.__name__

    def describe(self, module: nn.Module) -> Options:
        values = {key: f.read(module) if f.read else getattr(module, key) for key, f in self.fields.items()}
        return {key: value for key, value in values.items() if not (value is None and self.fields[key].optional)}

    def check(self, options: Options) -> None:
        """Raises ValueError for an option that is missing, unknown, or of the wrong form."""
        for key, field in self.fields.items():
            if key not in options and not field.optional:
                raise ValueError(f"the description lacks {key}; it is damaged")
            if key in options and not field.fits(options[key]):
                raise ValueError(f"{key}={options[key]!r}; expected {field.expected}")
        if unknown := sorted(set(options) - set(self.fields)):
            raise ValueError(f"this version of pycompress does not know its option {unknown[0]!r}; update pycompress")


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
_MASKED = Field(lambda value: isinstance(value, bool), "true or false", lambda module: module.mask is not None)
_TOKENS = Field(are_sizes, "numbers of tokens", lambda m: list(m._tokens) if m._tokens else None, optional=True)
_HEADS = Field(are_sizes, "numbers of heads", lambda module: list(module.kept_heads))

KINDS = (
    _row(Int8Linear, {"mode": _TEXT, "activation": _TEXT, "backend": _TEXT}, tensors=_state, fill=_fill_int8),
    _row(
        SparseLinear,
        {"dtype": _TEXT, "format": _TEXT, "activation": _TEXT, "backend": _TEXT, "tokens": _TOKENS, "choice": _CHOICE},
        make=_make_sparse,
        tensors=_state,
        fill=_fill_sparse,
        unknown_length=frozenset(("weight_values",)),
        bitmap="weight_bitmap",
    ),
    _row(MaskedLinear, {"gradient": _TEXT}, tensors=_masked_tensors, fill=_fill_masked),
    _row(
        FakeQuantLinear,
        {"mode": _TEXT, "masked": _MASKED, "gradient": _TEXT, "backend": _TEXT},
        tensors=_masked_tensors,
        fill=_fill_masked,
    ),
    _row(LowRankLinear, {"rank": _SIZE}, why_not=_low_rank_why_not),
    Kind(nn.Linear, _LINEAR, _linear_why_not, _make_linear, is_ours=False),
    Kind(nn.Sequential, _SCALED, _scaled_why_not, _make_scaled, is_ours=False),
    Kind(nn.Identity, {}, lambda options, old: "", _make_identity, is_ours=False),
    Kind(
        FewerHeadsAttention,
        {"embed_dim": _SIZE, "original_heads": _SIZE, "kept_heads": _HEADS},
        _attention_why_not,
        _make_attention,
    ),
)
OURS_BY_NAME = {kind.name: kind for kind in KINDS}
_BY_CLASS = {kind.cls: kind for kind in KINDS}


def kind_of(module: nn.Module) -> Kind | None:
    """The row of a module that its model's class may not have built; None for any other."""
    if type(module) is nn.Linear and not hasattr(module, ORIGINAL[0]):
        return None
    return None if type(module) is nn.Sequential and not _is_scaled(module) else _BY_CLASS.get(type(module))
