"""smooth_: channels with outliers made smaller before a linear layer and its weight's columns larger, which int8 likes.

SmoothQuant (Xiao et al. 2023). y = (x / s) @ (W * s)^T is what it was for every s > 0, a factor a channel j:

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

over sample batches and over the rows of every linear layer that reads the same x. No s_j goes below their median: a
channel that was quiet on these batches, as many are behind a GELU, would be blown up and be an outlier on others (in
MiniLM that halves the error of static int8, and lowers that of dynamic int8 a little). The division costs nothing where
what made x takes it in: weight and bias of a norm, or the rows of a linear layer before, if nothing else reads x.
Otherwise a ChannelScale may stand before the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pycompress.calibration import Batch, check_batches, evaluating, feed
from pycompress.convert import apply_edits, carry_marks, shape_of
from pycompress.fuse import Edit, fast_path_edits
from pycompress.nn import MaskedLinear
from pycompress.nn.channel_scale import ChannelScale
from pycompress.nn.float_linear import is_conv1d
from pycompress.readers import other_paths, tensors_in
from pycompress.selection import (
    FLOATS,
    HOOKS,
    OURS,
    FilterFn,
    Layer,
    ModuleMap,
    check_root,
    select,
    tensor_owners,
    tied_reason,
    weight_read_reason,
)
from pycompress.smooth_observe import ROUNDING, Seen, distance, observe
from pycompress.smooth_report import SmoothedLayer, SmoothReport
from pycompress.tracing import Shadow

__all__ = ["SmoothReport", "smooth_"]

_OP = "smooth_"
PLACES = ("fold", "anywhere")
_DTYPES = (*FLOATS, torch.float64)


@dataclass
class _Change:
    """The tensors and modules to replace, and what the report says of each layer."""

    tensors: dict[Tensor, Tensor] = field(default_factory=dict)  # by parameter: its new values
    edits: list[Edit] = field(default_factory=list)
    wrapped: set[nn.Module] = field(default_factory=set)
    rows: dict[nn.Module, tuple[str, str, Tensor]] = field(default_factory=dict)  # by layer: action, into, factors

    def value(self, parameter: Tensor) -> Tensor:
        """What it will hold, fp64."""
        return self.tensors.get(parameter, parameter.detach()).double()

    def set(self, parameter: Tensor, value: Tensor) -> None:
        self.tensors[parameter] = value.to(parameter.dtype)


def smooth_(
    model: nn.Module,
    batches: Iterable[Batch],
    alpha: float = 0.5,
    *,
    where: str = "fold",
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    progress: bool = True,
) -> SmoothReport:
    """Move the outliers of activations into the weights, in place; the float model's output stays the same.

    model: as quantize_ takes it, before quantize_; layers may be pruned (MaskedLinear; zeros stay zero).
    batches: of model inputs, as calibrate takes them; some tens of samples do. They show the size of each channel, and
        what reads the output of a norm or a linear layer.
    alpha: from 0 to 1, how much of the outliers goes into the weights; see the formula in this module's docstring.
    where: "fold": only where the factor can be taken in for nothing, by a norm (LayerNorm, RMSNorm and the like) or a
        linear layer before, through a ReLU too, of which nothing else reads the output. "anywhere": elsewhere the
        layer becomes Sequential(ChannelScale, layer), as in models with the norm after the residual (BERT), where the
        residual reads the norm's output too.
    skip, filter_fn: of the layers whose columns are scaled, as for quantize_.
    progress: show a progress bar on stderr.

    Raises TypeError or ValueError for a bad argument, ValueError naming a layer whose input is not finite, RuntimeError
    where the output of the first batch is not what it was up to rounding. Whenever it raises, the model is what it was.
    """
    check_root(model, _OP)
    check_batches(batches, _OP)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"{_OP}: alpha={alpha!r}; expected a number from 0 to 1")
    if where not in PLACES:
        raise ValueError(f"{_OP}: unknown where {where!r}; expected one of {', '.join(PLACES)}")
    found = _Found.of(model, skip, filter_fn)
    with evaluating(model):
        seen = observe(model, found.modules, found.layers, batches, progress)
        change, reasons = _plan(found, seen, float(alpha), where)
    _apply(model, found.modules, change, seen)
    return SmoothReport(float(alpha), where, [_row(layer, change, reasons) for layer in found.layers])


@dataclass(frozen=True)
class _Found:
    """The linear layers of the model, and what keeps a layer's parameters as they are."""

    modules: ModuleMap
    shadow: Shadow
    layers: list[Layer]
    linear_reasons: dict[nn.Module, str]  # why its rows cannot be scaled; skip and filter_fn are about columns

    @classmethod
    def of(cls, model: nn.Module, skip: str | Iterable[str], filter_fn: FilterFn | None) -> _Found:
        modules, shadow = ModuleMap(model), Shadow(model, opaque=OURS)
        free = select(modules, shadow, op=_OP, takes=(MaskedLinear,), dtypes=_DTYPES)
        layers = free
        if skip or filter_fn is not None:
            takes = (MaskedLinear,)
            layers = select(modules, shadow, op=_OP, skip=skip, filter_fn=filter_fn, takes=takes, dtypes=_DTYPES)
        return cls(modules, shadow, layers, {layer.module: layer.reason for layer in free})

    @functools.cached_property
    def by_module(self) -> dict[nn.Module, Layer]:
        return {layer.module: layer for layer in self.layers}

    @functools.cached_property
    def owners(self) -> dict[tuple[object, ...], list[tuple[nn.Module, str]]]:
        return tensor_owners(self.modules)

    def name(self, module: nn.Module) -> str:
        return self.modules.names[module][0]

    def norm_reason(self, norm: nn.Module) -> str:
        """Why the norm's parameters have to stay as they are; empty if they may change."""
        hooks = [key.strip("_").replace("_", " ") for key in HOOKS if getattr(norm, key, None)]
        if hooks:
            return f"has {hooks[0]}"
        if "forward" in norm.__dict__:
            return "has its forward replaced on the instance"
        dtypes = {str(parameter.dtype) for parameter in norm.parameters() if parameter.dtype not in _DTYPES}
        if dtypes:
            return f"is {', '.join(dtypes)}"
        return tied_reason(norm, self.owners) or weight_read_reason(norm, self.modules, self.shadow)


# --- what is to change ---


def _plan(found: _Found, seen: Seen, alpha: float, where: str) -> tuple[_Change, dict[nn.Module, str]]:
    """What to change, and for each layer that nothing before it takes a factor in for, the reason."""
    change = _Change()
    reasons: dict[nn.Module, str] = {}
    chosen = {layer.module: layer for layer in found.layers if not layer.reason}
    for source, flow in seen.flows.of.items():
        readers = [found.by_module[module] for module in flow.readers]
        if not any(layer.module in chosen for layer in readers):
            continue
        why_not = _why_not(found, seen, source, readers)
        if why_not:
            reasons.update((layer.module, f"{found.name(source)} {why_not}") for layer in readers)
            continue
        factors = _factors(change, readers, seen, alpha)
        for parameter, dim in _outputs_of(source):
            change.set(parameter, change.value(parameter) / _along(factors, dim, parameter))
        for layer in readers:
            _scale_columns(change, layer.module, factors)
            change.rows[layer.module] = ("folded", found.name(source), factors)
    for module, layer in chosen.items():
        if module in change.rows:
            continue
        if module not in seen.peaks:
            reasons[module] = "the batches did not reach it"
        elif where == "anywhere" and (
            read := weight_read_reason(module, found.modules, found.shadow, keeps_weight=False)
        ):
            reasons[module] = read
        elif where == "anywhere":
            _put_before(change, layer, _factors(change, [layer], seen, alpha))
        else:
            reasons.setdefault(module, "no norm or linear layer makes what it reads")
    return change, reasons


def _why_not(found: _Found, seen: Seen, source: nn.Module, readers: list[Layer]) -> str:
    """Why the source cannot take in the factors of its readers, to follow its name; empty if it can."""
    if source in found.linear_reasons:
        if found.linear_reasons[source]:
            return f"stays as it is: {found.linear_reasons[source]}"
    elif why := found.norm_reason(source):
        return f"stays as it is: {why}"
    elif not seen.scales_with_weight.get(source, False):
        return "stays as it is: its output does not scale with its weight"
    other = next(iter(seen.flows.of[source].others), "")
    if other:
        return f"is also read by {other}"
    for layer in readers:
        if layer.reason:
            return f"is also read by {layer.name}, which is left: {layer.reason}"
        if seen.flows.sources[layer.module] != {source}:
            return f"is not all that {layer.name} reads"
    other = other_paths(found.modules, source, found.shadow)
    return f"may also be read by {other}" if other else ""


def _factors(change: _Change, readers: list[Layer], seen: Seen, alpha: float) -> Tensor:
    """s_j, fp64 (K,), none below their median; the median too for a channel that was always zero or has no weights."""
    peak = torch.stack([seen.peaks[layer.module] for layer in readers]).amax(0)
    columns = torch.stack([_column_peaks(change, layer) for layer in readers]).amax(0)
    known = (peak > 0) & (columns > 0)
    if not bool(known.any()):
        return torch.ones_like(peak)
    factors = peak**alpha / columns ** (1 - alpha)
    median = factors[known].median()
    return torch.where(known, factors, median).clamp(min=median)


def _column_peaks(change: _Change, layer: Layer) -> Tensor:
    module = layer.module
    weight = change.value(_weight(module)).abs()
    if isinstance(module, MaskedLinear):
        weight = weight * module.mask
    peaks = weight.amax(_input_dim(module) - 1)  # over the outputs
    if not bool(torch.isfinite(peaks).all()):
        raise ValueError(f"{_OP}: layer {layer.name!r}: its weight has NaN or Inf. The model is unchanged")
    return peaks


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _input_dim(module: nn.Module) -> int:
    return 0 if is_conv1d(module) else 1  # Conv1D: (inputs, outputs)


def _along(factors: Tensor, dim: int, parameter: Tensor) -> Tensor:
    return factors.view([-1 if d == dim else 1 for d in range(parameter.dim())])


def _outputs_of(source: nn.Module) -> list[tuple[Tensor, int]]:
    """The parameters whose dimension `dim` is the channels of what the module returns."""
    weight, bias = source._parameters["weight"], source._parameters.get("bias")
    assert weight is not None
    dim = 0 if weight.dim() == 1 else 1 - _input_dim(source)
    return [(weight, dim)] if bias is None else [(weight, dim), (bias, 0)]


def _scale_columns(change: _Change, module: nn.Module, factors: Tensor) -> None:
    weight = _weight(module)
    change.set(weight, change.value(weight) * _along(factors, _input_dim(module), weight))


def _put_before(change: _Change, layer: Layer, factors: Tensor) -> None:
    """Sequential(ChannelScale, layer) in the layer's place."""
    old = layer.module
    weight = _weight(old)
    with torch.inference_mode(False):  # the model may be trained outside
        scale = ChannelScale(len(factors), device=weight.device, dtype=weight.dtype)
    scale.scale.copy_(1 / factors)
    new = nn.Sequential(scale, old).train(old.training)
    carry_marks(old, new)  # in_features too, which a model may ask for
    _scale_columns(change, old, factors)
    change.edits += [Edit(parent._modules, key, new) for parent, key in layer.slots]
    change.wrapped.add(old)
    change.rows[old] = ("scaled", "a ChannelScale", factors)


# --- the change itself ---


def _apply(model: nn.Module, modules: ModuleMap, change: _Change, seen: Seen) -> None:
    """Make the change and look at the first batch's output again, or leave the model as it was."""
    edits = [*change.edits, *fast_path_edits(modules, change.wrapped)]
    undo = [Edit(target, key, target[key]) for target, key, _ in edits]
    before = {parameter: parameter.detach().clone() for parameter in change.tensors}
    try:
        with torch.no_grad():
            for parameter, value in change.tensors.items():
                parameter.copy_(value)
        apply_edits(edits)
        with evaluating(model):
            assert seen.first is not None
            moved = distance(list(tensors_in(feed(model, seen.first, _OP))), seen.outputs)
        allowed = max((ROUNDING[parameter.dtype] for parameter in change.tensors), default=0.0)
        if change.tensors and not moved <= allowed:
            raise RuntimeError(
                f"{_OP}: the output of the first batch moved {moved:.2g} (relative L2; rounding: at most {allowed:g}):"
                " a layer is used in a way that was not seen, or the model is not deterministic in eval mode. The model"
                " is unchanged; leave layers out with skip"
            )
    except BaseException:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)
        for target, key, value in undo:
            target[key] = value
        raise


def _row(layer: Layer, change: _Change, reasons: dict[nn.Module, str]) -> SmoothedLayer:
    shape, aliases = shape_of(layer.module), layer.names[1:]
    reason = layer.reason or reasons.get(layer.module, "")
    if layer.module not in change.rows:
        return SmoothedLayer(layer.name, "left", reason, shape, aliases=aliases)
    action, into, factors = change.rows[layer.module]
    low, high = (float(value) for value in factors.aminmax())
    return SmoothedLayer(layer.name, action, reason, shape, into, low, high, aliases)
