"""The kinds of layers that quantize_ replaces: a row says which modules it takes, why one stays, and how it is made.

A layer is replaced only if its type is exactly torch's own (or Hugging Face's Conv1D) and nothing else depends on it:
one with hooks, a parametrization or a tensor more than torch gives it would be silently broken. Other operations use
the first row, the linear layers, with more types that they take.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize, prune

from pycompress.nn import (
    FakeQuantLinear,
    Int4Linear,
    Int8Conv2d,
    Int8Embedding,
    Int8EmbeddingBag,
    Int8Linear,
    Int8MultiheadAttention,
    MaskedLinear,
    SparseLinear,
)
from pycompress.nn.int8_conv2d import why_not
from pycompress.nn.projected_attention import PROJECTIONS
from pycompress.nn.quantized_linear import BIT4_MODES, LINEAR_MODES, quantized

Slot = tuple[nn.Module, str]  # (parent, key): parent._modules[key] is the module
Range = tuple[float, float]

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_LINEARS = (FakeQuantLinear, Int4Linear, Int8Linear, MaskedLinear, SparseLinear)
_TABLES = (Int8Embedding, Int8EmbeddingBag)
OURS = (*_LINEARS, Int8Conv2d, *_TABLES, Int8MultiheadAttention)
EMBEDDING_MODE = "int8"  # of a layer that any mode makes int8, a scale a row


@dataclass(frozen=True)
class How:
    """How one layer is quantised.

    activation: to be folded in. input_range: of static mode, for attention one for each projection. norm: the batch
    norm to fold into a convolution. packed: of attention, whether query, key and value are always one tensor.
    """

    mode: str
    activation: str | None = None
    input_range: Range | Mapping[str, Range] | None = None
    group_size: int = 128
    symmetric: bool = True
    backend: str = "auto"
    norm: nn.BatchNorm2d | None = None
    packed: bool | None = None


@dataclass(frozen=True)
class LayerKind:
    """A row of the table.

    name: as `layers` of quantize_ gives it. one, many: in words. torch_types: what it takes. ours: what stands for such
    a layer already. holds: names of its tensors and parts; a layer with more stays. inputs: what static mode wants a
    range of, as suffixes of the layer's name. why_not: a reason of its own to leave a layer.
    """

    name: str
    one: str
    many: str
    torch_types: tuple[type[nn.Module], ...]
    ours: tuple[type[nn.Module], ...]
    holds: frozenset[str]
    inputs: tuple[str, ...]
    modes: tuple[str, ...]
    why_not: Callable[[nn.Module], str]
    make: Callable[[Any, How], nn.Module]
    shape: Callable[[Any], tuple[int, ...]]

    def includes(self, module: nn.Module) -> bool:
        """Whether it is a layer of this kind, in whatever state."""
        return isinstance(module, (*self.torch_types, *self.ours)) or (self is LINEAR and is_conv1d_type(type(module)))

    def takes(self, cls: type[nn.Module]) -> bool:
        return cls in self.torch_types or (self is LINEAR and is_conv1d_type(cls, exact=True))


def is_conv1d_type(cls: type, *, exact: bool = False) -> bool:
    # Without transformers in the process there can be no Conv1D, so it is never imported here.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d is not None and (cls is conv1d if exact else issubclass(cls, conv1d))


# ---- why a layer, looked at by itself, has to stay ------------------------------------------------------------------


def kept_reason(
    module: nn.Module, slots: Iterable[Slot], kind: LayerKind, takes: tuple[type[nn.Module], ...], pruned: bool
) -> str:
    """Empty if it may go. takes, pruned: as of select."""
    cls = parametrize.type_before_parametrizations(module)
    if isinstance(module, OURS) and cls not in takes:
        return _ours_reason(module)
    parametrized, hooked = parametrize.is_parametrized(module), is_hook_pruned(module)
    if parametrized and not (pruned and set(module.parametrizations) == {"weight"}):  # type: ignore[arg-type]
        return "is parametrized"
    if kind is LINEAR and any(isinstance(parent, nn.MultiheadAttention) for parent, _ in slots):
        return "nn.MultiheadAttention reads its weight directly"
    if not kind.takes(cls) and cls not in takes:
        return f"is a {cls.__name__}, a subclass that may do more than {kind.one}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    hooks = [key.strip("_") for key in HOOKS if getattr(module, key, None)]
    if hooks and not (pruned and hooked and hooks == ["forward_pre_hooks"]):
        return f"has {hooks[0].replace('_', ' ')}"
    if kind is not ATTENTION and not (hooked or parametrized) and "weight" not in module._parameters:
        return "its weight is computed, not a parameter"
    known = set(kind.holds)
    known |= {"mask"} if isinstance(module, MaskedLinear) else set()
    known |= {"input_scale", "input_zero_point"} if cls is FakeQuantLinear else set()
    known |= {"weight_orig", "weight_mask", "bias_orig", "bias_mask"} if hooked else set()
    known |= {"parametrizations"} if parametrized else set()
    extra = {*module._parameters, *module._buffers, *module._modules} - known
    if extra:
        held = "weight and bias" if kind.holds == _WEIGHT_AND_BIAS else "its weights"
        return f"holds more than {held}: {', '.join(sorted(extra))}"
    if module._compiled_call_impl is not None:
        return "was compiled by itself; swap first, then compile"
    return kind.why_not(module)


def _ours_reason(module: nn.Module) -> str:
    if isinstance(module, SparseLinear):
        return f"already sparse ({module.dtype})"
    if isinstance(module, FakeQuantLinear):
        return f"is fake-quantised ({module.mode}); quantize_ makes it int8, its to_linear() float"
    if isinstance(module, MaskedLinear):
        return "is a MaskedLinear; sparsify_ makes it sparse, its to_linear() dense"
    if isinstance(module, Int4Linear):
        return f"already 4-bit ({module.format})"
    mode = getattr(module, "mode", "") if not isinstance(module, _TABLES) else ""
    return f"already int8 ({mode})" if mode not in BIT4_MODES else f"already 4-bit ({mode})"


def is_hook_pruned(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune holds its weight as weight_orig and weight_mask, and its hooks are the only ones."""
    hooks = module._forward_pre_hooks.values()
    pruning = all(isinstance(hook, prune.BasePruningMethod) for hook in hooks)
    return bool(hooks) and pruning and "weight_orig" in module._parameters and "weight_mask" in module._buffers


def _nothing_more(module: nn.Module) -> str:
    return ""


def _why_not_conv(module: nn.Module) -> str:
    assert isinstance(module, nn.Conv2d)
    return why_not(module)


def _why_not_table(module: nn.Module) -> str:
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which changes its weight as it is used"
    return ""


def _why_not_attention(module: nn.Module) -> str:
    """Its output projection must be torch's own too: adapters replace it."""
    output = module._modules.get("out_proj")
    if type(output) is not NonDynamicallyQuantizableLinear:
        return f"its out_proj is a {type(output).__name__}, which may do more than a linear"
    if "forward" in output.__dict__ or any(getattr(output, key, None) for key in HOOKS):
        return "its out_proj has hooks or a forward of its own"
    return "" if set(output._parameters) <= _WEIGHT_AND_BIAS else "its out_proj holds more than weight and bias"


# ---- how it is made -------------------------------------------------------------------------------------------------


def _make_linear(old: nn.Module, how: How) -> nn.Module:
    if isinstance(old, FakeQuantLinear):  # goes as it was trained
        return Int8Linear.from_float(old, how.mode, how.activation, backend=how.backend)
    assert not isinstance(how.input_range, Mapping)
    return quantized(
        old, how.mode, how.activation, input_range=how.input_range,
        group_size=how.group_size, symmetric=how.symmetric or how.mode == "nf4", backend=how.backend,
    )  # fmt: skip


def _make_conv(old: nn.Conv2d, how: How) -> nn.Module:
    source = old if how.norm is None else folded(old, how.norm)
    assert not isinstance(how.input_range, Mapping)
    return Int8Conv2d.from_float(source, how.mode, how.activation, input_range=how.input_range, backend=how.backend)


def _make_table(old: nn.Module, how: How) -> nn.Module:
    new = Int8Embedding if type(old) is nn.Embedding else Int8EmbeddingBag
    return new.from_float(old, backend=how.backend)


def _make_attention(old: nn.MultiheadAttention, how: How) -> nn.Module:
    assert how.input_range is None or isinstance(how.input_range, Mapping)
    return Int8MultiheadAttention.from_float(
        old, how.mode, packed=how.packed, input_range=how.input_range,
        group_size=how.group_size, symmetric=how.symmetric or how.mode == "nf4", backend=how.backend,
    )  # fmt: skip


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A new convolution that computes norm(conv(x)), where norm is in eval mode: it uses its running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = -norm.running_mean.double() * factor
    if norm.affine:
        factor, shift = factor * norm.weight.detach().double(), shift * norm.weight.detach().double()
        shift = shift + norm.bias.detach().double()
    if conv.bias is not None:
        shift = shift + conv.bias.detach().double() * factor
    options = ("stride", "padding", "dilation", "groups", "padding_mode")
    like: dict[str, Any] = {key: getattr(conv, key) for key in options}
    kernel: Any = conv.kernel_size
    new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, bias=True, device="meta", **like)
    weight = conv.weight.detach()
    trained = any(p.requires_grad for p in (*conv.parameters(), *norm.parameters()))
    new.weight = nn.Parameter((weight.double() * factor[:, None, None, None]).to(weight.dtype), trained)
    new.bias = nn.Parameter(shift.to(weight.dtype), trained)
    return new.train(conv.training)


# ---- the table ------------------------------------------------------------------------------------------------------


def _linear_shape(module: nn.Module) -> tuple[int, ...]:
    """(outputs, inputs) of a linear in any state, a lazy or parametrized one included."""
    if isinstance(module, (nn.Linear, Int4Linear, Int8Linear, SparseLinear)):
        return module.out_features, module.in_features
    weight = getattr(module, "weight_orig", module._parameters.get("weight"))
    return () if weight is None else tuple(reversed(weight.shape))  # Conv1D: (inputs, outputs)


_WEIGHT_AND_BIAS = frozenset(("weight", "bias"))
_IN_PROJECTIONS = ("in_proj_weight", "in_proj_bias", *(f"{key}_weight" for key in PROJECTIONS))

LINEAR = LayerKind(
    name="linear",
    one="a linear",
    many="linear layers",
    torch_types=(nn.Linear,),
    ours=_LINEARS,
    holds=_WEIGHT_AND_BIAS,
    inputs=("",),
    modes=LINEAR_MODES,
    why_not=_nothing_more,
    make=_make_linear,
    shape=_linear_shape,
)
CONV2D = LayerKind(
    name="conv2d",
    one="a convolution",
    many="convolutions",
    torch_types=(nn.Conv2d,),
    ours=(Int8Conv2d,),
    holds=_WEIGHT_AND_BIAS,
    inputs=("",),
    modes=("dynamic", "static"),  # weight_only dequantises at each call: slower than the float layer
    why_not=_why_not_conv,
    make=_make_conv,
    shape=lambda m: (m.out_channels, m.in_channels // m.groups, *m.kernel_size),
)
EMBEDDING = LayerKind(
    name="embedding",
    one="an embedding",
    many="embeddings",
    torch_types=(nn.Embedding, nn.EmbeddingBag),
    ours=_TABLES,
    holds=frozenset(("weight",)),
    inputs=(),
    modes=(EMBEDDING_MODE,),
    why_not=_why_not_table,
    make=_make_table,
    shape=lambda m: (m.num_embeddings, m.embedding_dim),
)
ATTENTION = LayerKind(
    name="attention",
    one="an attention",
    many="attention modules",
    torch_types=(nn.MultiheadAttention,),
    ours=(Int8MultiheadAttention,),
    holds=frozenset((*_IN_PROJECTIONS, "bias_k", "bias_v", "out_proj")),
    inputs=(*PROJECTIONS, "out_proj"),
    modes=LINEAR_MODES,
    why_not=_why_not_attention,
    make=_make_attention,
    shape=lambda m: (m.embed_dim, m.embed_dim),
)
KINDS = (LINEAR, CONV2D, EMBEDDING, ATTENTION)
ALL = "all"


def kinds_of(layers: str | Iterable[str], op: str) -> tuple[LayerKind, ...]:
    """The rows that `layers` names. Raises TypeError, and ValueError for a name that is none."""
    known = {kind.name: kind for kind in KINDS}
    if not isinstance(layers, Iterable):
        raise TypeError(f"{op}: layers={layers!r}; expected {_expected()}")
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise ValueError(f"{op}: layers is empty; expected {_expected()}")
    for name in names:
        if not isinstance(name, str) or (name not in known and name != ALL):
            raise ValueError(f"{op}: layers has {name!r}; expected {_expected()}")
    return KINDS if ALL in names else tuple(kind for kind in KINDS if kind.name in names)


def _expected() -> str:
    return f"one or more of {', '.join(kind.name for kind in KINDS)}, or {ALL}"
