"""Swapping the layers of an existing model, in place and all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from pycompress import hf_support
from pycompress.fuse import Edit, FusionPlan, fast_path_edits, is_transformer_layer, plan_fusions
from pycompress.fuse_norm import plan_norms
from pycompress.layer_kinds import ATTENTION, EMBEDDING, EMBEDDING_MODE, KINDS, LINEAR, How, LayerKind, Range, kinds_of
from pycompress.nn import FakeQuantLinear, MaskedLinear
from pycompress.nn.quantized_linear import BIT4_MODES, LINEAR_MODES
from pycompress.ops import BACKENDS
from pycompress.report import LayerReport, QuantizedLayerReport, QuantizeReport, model_bytes
from pycompress.report_others import other_rows
from pycompress.selection import (
    OURS,
    FilterFn,
    Layer,
    ModuleMap,
    check_patterns,
    check_root,
    covers,
    relative_name,
    select,
    weight_read_reason,
)
from pycompress.tracing import Shadow

__all__ = ["LayerReport", "QuantizeReport", "quantize_"]

Ranges = Mapping[str, Range]
Modes = str | Mapping[str, str]

_OP = "quantize_"
FLOAT = "float"  # in a mapping of modes: the layer stays as it is
REST = "*"  # in a mapping of modes: every layer that nothing else in it names
GROUP_SIZE = 128  # of the 4-bit modes
_OF_TORCH = frozenset(("transposed", "norm_type", "scale_grad_by_freq", "sparse"))  # no marks: torch sets them


def quantize_(
    model: nn.Module,
    mode: Modes = "dynamic",
    *,
    layers: str | Iterable[str] = "linear",
    group_size: int = GROUP_SIZE,
    symmetric: bool = True,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    fuse: bool = True,
    calibration: Ranges | None = None,
    backend: str = "auto",
) -> QuantizeReport:
    """Replace layers of `model` by int8 or 4-bit ones, in place, and say what was done.

    model: any module whose layers are exactly torch's own or Hugging Face's Conv1D, with fp32, bf16 or fp16
        weights, or FakeQuantLinear, as prepare_qat_ makes them. Layers that a swap would break (subclasses,
        hooks, parametrizations, tied weights, weights that something reads directly) are left as they are; the
        report names each with its reason.
    mode: "dynamic" (activations int8, a scale per token), "static" (a calibrated scale; needs `calibration`)
        or "weight_only" (activations stay float), all with int8 weights; "int4" or "nf4" (4-bit weights,
        activations stay float). Or one for each layer, {name or pattern: mode}, with names and
        patterns as in `skip` and "float" for a layer that stays as it is: {"*": "dynamic", "lm_head": "float"}.
        "*" is what holds for layers that nothing else names, "dynamic" if it is not given. A layer's own name
        goes before any pattern that also covers it; of several patterns the last one in the mapping counts.
        A FakeQuantLinear keeps the mode and the range that it was trained with, unless it is to stay "float".
    layers: what is replaced: "linear" (by Int8Linear, Int4Linear), "conv2d" (Int8Conv2d, a scale per image; only
        dynamic and static: it gains nothing while activations stay float), "embedding" (nn.Embedding and
        nn.EmbeddingBag: int8 in every mode, a scale per row), "attention" (nn.MultiheadAttention, by
        Int8MultiheadAttention), several of them, or "all".
    group_size: of the 4-bit modes: weights that share a scale along the inputs; -1 for whole rows.
    symmetric: of int4: without zero points.
    skip: qualified names, each covering all below it, or glob patterns: skip=["lm_head", "*.attention.*"].
    filter_fn: filter_fn(qualified_name, module) -> True where a layer may be swapped.
    fuse: fold the ReLU, GELU or SiLU that directly follows a layer, and alone reads it, into the kernel, and in
        eval mode the nn.BatchNorm2d that follows a convolution into its weight.
    calibration: the result of pycompress.calibrate, for static layers; those it never reached stay float.
    backend: of the new layers; see Int8Linear.

    Raises TypeError or ValueError for a bad argument, ValueError naming the layer whose weights are not
    finite. Whenever it raises, the model is what it was.
    """
    options = _Options(_checked_modes(mode), group_size, symmetric, calibration, backend)
    kinds = kinds_of(layers, _OP)
    _check_arguments(model, options)
    modules = ModuleMap(model)
    check_patterns(modules, [pattern for pattern in options.modes if pattern != REST], _OP, "mode")
    shadow = Shadow(model, opaque=OURS)
    found = select(modules, shadow, op=_OP, skip=skip, filter_fn=filter_fn, takes=(FakeQuantLinear,), kinds=kinds)
    mode_of = {layer.name: _mode_of(layer, options.modes) for layer in found}
    found = [_suited(layer, mode_of[layer.name], options.modes, modules, shadow) for layer in found]
    found = _calibrated(found, mode_of, options)
    chosen = [layer for layer in found if not layer.reason]
    plan = plan_fusions(modules, chosen, shadow, plan_norms(modules, chosen, shadow)) if fuse else FusionPlan()
    before = model_bytes(model)
    replacements = {}
    for layer in chosen:
        how = options.how(layer, mode_of[layer.name], plan)
        if layer.kind is ATTENTION and not _attends_to_itself(modules, layer.module, shadow):
            how = replace(how, packed=False)
        replacements[layer.module] = new_layer(layer, how, _OP)

    edits = [Edit(parent._modules, key, replacements[layer.module]) for layer in chosen for parent, key in layer.slots]
    edits += [norm.edit for norm in plan.norms.values()] + [fusion.edit for fusion in plan.fusions.values()]
    edits += fast_path_edits(modules, set(replacements))
    others = other_rows(modules, [kind for kind in KINDS if kind not in kinds])
    apply_edits(edits)
    rows = [_report(layer, mode_of[layer.name], replacements.get(layer.module), plan) for layer in found]
    rows += [] if ATTENTION in kinds else attention_rows(modules, "; layers='attention' takes it")
    given = {*options.modes.values(), *(mode_of[layer.name] for layer in chosen if layer.kind is not EMBEDDING)}
    summary = given.pop() if len(given) == 1 else "mixed"
    return QuantizeReport(summary, before, model_bytes(model), rows, others)


@dataclass(frozen=True)
class _Options:
    modes: dict[str, str]
    group_size: int
    symmetric: bool
    calibration: Ranges | None
    backend: str

    def how(self, layer: Layer, mode: str, plan: FusionPlan) -> How:
        """How this layer becomes what its mode says."""
        ranges = self.calibration if mode == "static" and not _has_range(layer) else None
        fusion, norm = plan.fusions.get(layer.module), plan.norms.get(layer.module)
        return How(
            mode,
            fusion.activation if fusion else None,
            None if ranges is None else input_range(layer, ranges),
            self.group_size,
            self.symmetric,
            self.backend,
            norm.norm if norm else None,
        )


def _checked_modes(mode: Modes) -> dict[str, str]:
    """The modes by pattern, the weightier later: "*" first."""
    if isinstance(mode, str):
        mode = {REST: mode}
        known: tuple[str, ...] = LINEAR_MODES
    elif isinstance(mode, Mapping):
        mode = {REST: "dynamic", **mode}
        known = (*LINEAR_MODES, FLOAT)
    else:
        raise TypeError(f"{_OP}: mode is a {type(mode).__name__}; expected a str, or a mapping of layers to modes")
    for pattern, value in mode.items():
        if value not in known:
            where = f" for {pattern!r}" if FLOAT in known else ""
            raise ValueError(f"{_OP}: unknown mode {value!r}{where}; expected one of {', '.join(known)}")
    return dict(mode)


def _mode_of(layer: Layer, modes: dict[str, str]) -> str:
    mode = modes[_pattern_of(layer, modes)]
    if mode == FLOAT:
        return mode
    if layer.kind is EMBEDDING:
        return EMBEDDING_MODE
    return layer.module.mode if isinstance(layer.module, FakeQuantLinear) else mode


def _pattern_of(layer: Layer, modes: dict[str, str]) -> str:
    """Which key of `modes` holds for the layer."""
    own = (name for name in layer.names if name in modes)
    covering = (p for p in reversed(modes) if p != REST and any(covers(p, name) for name in layer.names))
    return next(own, next(covering, REST))


def _has_range(layer: Layer) -> bool:
    """Whether static mode needs no calibration for it: a FakeQuantLinear has the range that it was trained with."""
    return isinstance(layer.module, FakeQuantLinear) or not layer.kind.inputs


def _suited(layer: Layer, mode: str, modes: dict[str, str], modules: ModuleMap, shadow: Shadow) -> Layer:
    """The layer, with the reason to leave it where its mode is "float", or one that it cannot have."""
    if layer.reason:
        return layer
    reason = ""
    if mode == FLOAT:
        reason = f"mode={{{_pattern_of(layer, modes)!r}: {FLOAT!r}}}"
    elif mode not in layer.kind.modes:
        reason = (
            f"mode={mode!r} is not for {layer.kind.many}, which take {', '.join(layer.kind.modes)}; "
            f"pass mode={{{layer.name!r}: {layer.kind.modes[0]!r}}}"
        )
    elif mode in BIT4_MODES:  # code that knows of int8 weights does not know of these
        reason = weight_read_reason(layer.module, modules, shadow, keeps_weight=False)
    return replace(layer, reason=reason)


def _check_arguments(model: nn.Module, options: _Options) -> None:
    check_root(model, _OP)
    modes, calibration = options.modes, options.calibration
    if options.backend not in BACKENDS:
        raise ValueError(f"{_OP}: unknown backend {options.backend!r}; expected one of {', '.join(BACKENDS)}")
    others = " and ".join(map(repr, dict.fromkeys(modes.values())))
    if "static" not in modes.values() and calibration is not None:
        raise ValueError(f"{_OP}: calibration is for mode='static'; mode={others} would ignore it")
    if calibration is not None and not isinstance(calibration, Mapping):
        raise TypeError(f"{_OP}: calibration is a {type(calibration).__name__}; expected what calibrate() returns")
    size = options.group_size
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise ValueError(f"{_OP}: group_size={size!r}; expected a positive number of weights, or -1 for whole rows")
    if size != GROUP_SIZE and not any(mode in BIT4_MODES for mode in modes.values()):
        raise ValueError(f"{_OP}: group_size is for the modes int4 and nf4; mode={others} would ignore it")
    if not options.symmetric and "int4" not in modes.values():
        raise ValueError(f"{_OP}: symmetric=False is for mode='int4'; mode={others} would ignore it")


def _calibrated(layers: list[Layer], mode_of: Mapping[str, str], options: _Options) -> list[Layer]:
    """The layers, those of static mode left that have no range."""
    static = [layer for layer in layers if mode_of[layer.name] == "static" and not _has_range(layer)]
    if options.calibration is not None:
        return keep_uncalibrated(layers, static, options.calibration, _OP)
    if "static" in options.modes.values() and (
        any(not layer.reason for layer in static) or not any(_has_range(layer) for layer in layers)
    ):
        raise ValueError(
            f"{_OP}: mode='static' needs the range of each layer's input; "
            "pass calibration=pycompress.calibrate(model, batches)"
        )
    return layers


def input_range(layer: Layer, calibration: Ranges) -> Any:
    """The range of a layer's input, or of each of them by name where it has several; None where one is missing."""
    found: dict[str, Range] = {}
    for part in layer.kind.inputs:
        names = [f"{name}.{part}" if part else name for name in layer.names]
        if (values := next((calibration[name] for name in names if name in calibration), None)) is None:
            return None
        found[part] = values
    return found.get("", found)


def keep_uncalibrated(layers: list[Layer], static: list[Layer], calibration: Ranges, op: str) -> list[Layer]:
    """Leave the static layers without a range; a calibration that fits none of them is of another model."""
    static = [layer for layer in static if not layer.reason]
    missing = {layer.name for layer in static if input_range(layer, calibration) is None}
    if static and len(missing) == len(static):
        raise ValueError(
            f"{op}: calibration has {len(calibration)} layers and none of those to be swapped, as "
            f"{static[0].name!r}; calibrate this very model, with the same skip and filter_fn"
        )
    return [replace(layer, reason=_unreached(layer.kind)) if layer.name in missing else layer for layer in layers]


def _unreached(kind: LayerKind) -> str:
    hint = "" if kind is LINEAR else f"; calibrate wants the same layers={kind.name!r}"
    return f"was not reached in calibration{hint}"


def new_layer(layer: Layer, how: How, op: str) -> nn.Module:
    """What takes the place of `layer`; raises with its name if it cannot be made."""
    try:
        new = layer.kind.make(layer.module, how)
    except Exception as error:
        raise unchanged_error(op, layer, error) from error
    carry_marks(layer.module, new)
    return new


def _attends_to_itself(modules: ModuleMap, attention: nn.Module, shadow: Shadow) -> bool:
    """Whether every call of it that is seen gives one tensor as query, key and value."""
    owner = modules.owner(attention)
    if owner is None:
        return True
    name = relative_name(modules, owner, attention)
    if is_transformer_layer(owner):
        return name != "multihead_attn"
    calls = shadow.glance(modules.names[owner][0]).calls(name)
    return all(len({_operand(node, i, key) for i, key in enumerate(("query", "key", "value"))}) == 1 for node in calls)


def _operand(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def unchanged_error(op: str, layer: Layer, error: Exception) -> Exception:
    """The error to raise where this layer cannot be converted."""
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(
        f"{op}: layer {layer.name!r}: {error}. The model is unchanged; to leave this layer as it is "
        f"pass skip={layer.name!r}"
    )


def carry_marks(old: nn.Module, new: nn.Module) -> None:
    """A model may mark its layers, as in `if layer.is_residual`; numbers and names are safe to take along."""
    for key, value in old.__dict__.items():
        own = key in _OF_TORCH or (key == "gradient" and isinstance(old, MaskedLinear))
        if not (own or hasattr(new, key)) and isinstance(value, (bool, int, float, str)):
            setattr(new, key, value)


def apply_edits(edits: list[Edit]) -> None:
    """Make every edit or, if one fails or is interrupted, none."""
    hf_support.import_where_used()
    done: list[Edit] = []
    try:
        for target, key, value in edits:
            done.append(Edit(target, key, target[key]))
            target[key] = value
    except BaseException:
        for target, key, value in reversed(done):
            target[key] = value
        raise


def _report(layer: Layer, mode: str, new: nn.Module | None, plan: FusionPlan) -> LayerReport:
    old, aliases = layer.module, layer.names[1:]
    size, shape = model_bytes(old), shape_of(old)
    if new is None:
        return LayerReport(layer.name, "left", layer.reason, shape, "", size, size, aliases)
    fusion, norm = plan.fusions.get(old), plan.norms.get(old)
    notes = [f"{norm.name} folded in" if norm else "", plan.norm_notes.get(old, ""), plan.notes.get(old, "")]
    note, activation = "; ".join(filter(None, notes)), fusion.activation if fusion else ""
    if norm:
        size += model_bytes(norm.norm)
    sizes = size, model_bytes(new)
    return QuantizedLayerReport(layer.name, "swapped", note, shape, activation, *sizes, aliases, mode)


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """(outputs, inputs) of a linear in any state; of another layer its weight's."""
    return next((kind for kind in KINDS if kind.includes(module)), LINEAR).shape(module)


def attention_rows(modules: ModuleMap, remedy: str = "") -> list[LayerReport]:
    """The projections that nn.MultiheadAttention holds as bare parameters: float weights one may look for."""
    reason = f"a parameter of nn.MultiheadAttention, not a layer{remedy}"
    rows = []
    for module, names in modules.names.items():
        if isinstance(module, nn.MultiheadAttention):
            for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = module._parameters.get(key)
                if weight is not None:
                    size = weight.numel() * weight.element_size()
                    name = f"{names[0]}.{key}".lstrip(".")
                    rows.append(LayerReport(name, "left", reason, tuple(weight.shape), "", size, size))
    return rows
