"""Swapping the layers of an existing model, in place and all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from pycompress.fuse import Edit, FusionPlan, fast_path_edits, plan_fusions
from pycompress.nn import FakeQuantLinear, Int8Linear, MaskedLinear, SparseLinear
from pycompress.ops import BACKENDS, MODES
from pycompress.report import LayerReport, QuantizedLayerReport, QuantizeReport, model_bytes
from pycompress.selection import OURS, FilterFn, Layer, ModuleMap, check_patterns, check_root, covers, select
from pycompress.tracing import Shadow

__all__ = ["LayerReport", "QuantizeReport", "quantize_"]

Ranges = Mapping[str, tuple[float, float]]
Modes = str | Mapping[str, str]

_OP = "quantize_"
FLOAT = "float"  # in a mapping of modes: the layer stays as it is
REST = "*"  # in a mapping of modes: every layer that nothing else in it names


def quantize_(
    model: nn.Module,
    mode: Modes = "dynamic",
    *,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    fuse: bool = True,
    calibration: Ranges | None = None,
    backend: str = "auto",
) -> QuantizeReport:
    """Replace the linear layers of `model` by Int8Linear, in place, and say what was done.

    model: any module whose layers are exactly nn.Linear or Hugging Face's Conv1D, with fp32, bf16 or fp16
        weights, or FakeQuantLinear, as prepare_qat_ makes them. Layers that a swap would break (subclasses,
        hooks, parametrizations, tied weights, weights that something reads directly) are left as they are; the
        report names each with its reason.
    mode: "dynamic" (activations int8, a scale per token), "static" (a calibrated scale; needs `calibration`)
        or "weight_only" (activations stay float). Or one for each layer, {name or pattern: mode}, with names and
        patterns as in `skip` and "float" for a layer that stays as it is: {"*": "dynamic", "lm_head": "float"}.
        "*" is what holds for layers that nothing else names, "dynamic" if it is not given. A layer's own name
        goes before any pattern that also covers it; of several patterns the last one in the mapping counts.
        A FakeQuantLinear keeps the mode and the range that it was trained with, unless it is to stay "float".
    skip: qualified names, each covering all below it, or glob patterns: skip=["lm_head", "*.attention.*"].
    filter_fn: filter_fn(qualified_name, module) -> True where a layer may be swapped.
    fuse: fold the ReLU, GELU or SiLU that directly follows a linear, and alone reads it, into the kernel.
    calibration: the result of pycompress.calibrate, for static layers; those it never reached stay float.
    backend: of the new layers; see Int8Linear.

    Raises TypeError or ValueError for a bad argument, ValueError naming the layer whose weights are not
    finite. Whenever it raises, the model is what it was.
    """
    modes = _checked_modes(mode)
    _check_arguments(model, modes, calibration, backend)
    modules = ModuleMap(model)
    check_patterns(modules, [pattern for pattern in modes if pattern != REST], _OP, "mode")
    shadow = Shadow(model, opaque=OURS)
    layers = select(modules, shadow, op=_OP, skip=skip, filter_fn=filter_fn, takes=(FakeQuantLinear,))
    mode_of = {layer.name: _mode_of(layer, modes) for layer in layers}
    layers = [_kept_float(layer, modes) if mode_of[layer.name] == FLOAT else layer for layer in layers]
    static = [layer for layer in layers if mode_of[layer.name] == "static" and not _has_range(layer)]
    if calibration is not None:
        layers = keep_uncalibrated(layers, static, calibration, _OP)
    elif "static" in modes.values() and (
        any(not layer.reason for layer in static) or not any(_has_range(layer) for layer in layers)
    ):
        raise ValueError(
            f"{_OP}: mode='static' needs the range of each layer's input; "
            "pass calibration=pycompress.calibrate(model, batches)"
        )
    chosen = [layer for layer in layers if not layer.reason]
    plan = plan_fusions(modules, chosen, shadow) if fuse else FusionPlan()
    before = model_bytes(model)
    replacements = {
        layer.module: int8_layer(layer, mode_of[layer.name], plan, calibration, backend=backend) for layer in chosen
    }

    edits = [Edit(parent._modules, key, replacements[layer.module]) for layer in chosen for parent, key in layer.slots]
    edits += [fusion.edit for fusion in plan.fusions.values()]
    edits += fast_path_edits(modules, set(replacements))
    apply_edits(edits)
    rows = [_report(layer, replacements.get(layer.module), plan) for layer in layers]
    given = {*modes.values(), *(mode_of[layer.name] for layer in chosen)}
    summary = given.pop() if len(given) == 1 else "mixed"
    return QuantizeReport(summary, before, model_bytes(model), rows + attention_rows(modules))


def _checked_modes(mode: Modes) -> dict[str, str]:
    """The modes by pattern, the weightier later: "*" first."""
    if isinstance(mode, str):
        mode = {REST: mode}
        known: tuple[str, ...] = MODES
    elif isinstance(mode, Mapping):
        mode = {REST: "dynamic", **mode}
        known = (*MODES, FLOAT)
    else:
        raise TypeError(f"{_OP}: mode is a {type(mode).__name__}; expected a str, or a mapping of layers to modes")
    for pattern, value in mode.items():
        if value not in known:
            where = f" for {pattern!r}" if FLOAT in known else ""
            raise ValueError(f"{_OP}: unknown mode {value!r}{where}; expected one of {', '.join(known)}")
    return dict(mode)


def _mode_of(layer: Layer, modes: dict[str, str]) -> str:
    mode = modes[_pattern_of(layer, modes)]
    return layer.module.mode if isinstance(layer.module, FakeQuantLinear) and mode != FLOAT else mode


def _pattern_of(layer: Layer, modes: dict[str, str]) -> str:
    """Which key of `modes` holds for the layer."""
    own = (name for name in layer.names if name in modes)
    covering = (p for p in reversed(modes) if p != REST and any(covers(p, name) for name in layer.names))
    return next(own, next(covering, REST))


def _has_range(layer: Layer) -> bool:
    """Whether static mode needs no calibration for it: a FakeQuantLinear has the range that it was trained with."""
    return isinstance(layer.module, FakeQuantLinear)


def _kept_float(layer: Layer, modes: dict[str, str]) -> Layer:
    return replace(layer, reason=layer.reason or f"mode={{{_pattern_of(layer, modes)!r}: {FLOAT!r}}}")


def _check_arguments(model: nn.Module, modes: dict[str, str], calibration: Ranges | None, backend: str) -> None:
    check_root(model, _OP)
    if backend not in BACKENDS:
        raise ValueError(f"{_OP}: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if "static" not in modes.values() and calibration is not None:
        others = " and ".join(map(repr, dict.fromkeys(modes.values())))
        raise ValueError(f"{_OP}: calibration is for mode='static'; mode={others} would ignore it")
    if calibration is not None and not isinstance(calibration, Mapping):
        raise TypeError(f"{_OP}: calibration is a {type(calibration).__name__}; expected what calibrate() returns")


def input_range(layer: Layer, calibration: Ranges) -> tuple[float, float] | None:
    return next((calibration[name] for name in layer.names if name in calibration), None)


def keep_uncalibrated(layers: list[Layer], static: list[Layer], calibration: Ranges, op: str) -> list[Layer]:
    """Leave the static layers without a range; a calibration that fits none of them is of another model."""
    static = [layer for layer in static if not layer.reason]
    missing = {layer.name for layer in static if input_range(layer, calibration) is None}
    if static and len(missing) == len(static):
        raise ValueError(
            f"{op}: calibration has {len(calibration)} layers and none of those to be swapped, as "
            f"{static[0].name!r}; calibrate this very model, with the same skip and filter_fn"
        )
    reason = "was not reached in calibration"
    return [replace(layer, reason=reason) if layer.name in missing else layer for layer in layers]


def int8_layer(
    layer: Layer, mode: str, plan: FusionPlan, calibration: Ranges | None, *, backend: str = "auto", op: str = _OP
) -> Int8Linear:
    """The int8 layer that takes the place of `layer`; raises with its name if it cannot be made."""
    old = layer.module
    fusion = plan.fusions.get(old)
    found = None
    if calibration is not None and mode == "static" and not _has_range(layer):
        found = input_range(layer, calibration)
    try:
        new = Int8Linear.from_float(
            old, mode, fusion.activation if fusion else None, input_range=found, backend=backend
        )
    except Exception as error:
        raise unchanged_error(op, layer, error) from error
    carry_marks(old, new)
    return new


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
        ours = key == "gradient" and isinstance(old, MaskedLinear)
        if not (ours or hasattr(new, key)) and isinstance(value, (bool, int, float, str)):
            setattr(new, key, value)


def apply_edits(edits: list[Edit]) -> None:
    """Make every edit or, if one fails or is interrupted, none."""
    done: list[Edit] = []
    try:
        for target, key, value in edits:
            done.append(Edit(target, key, target[key]))
            target[key] = value
    except BaseException:
        for target, key, value in reversed(done):
            target[key] = value
        raise


def _report(layer: Layer, new: Int8Linear | None, plan: FusionPlan) -> LayerReport:
    old = layer.module
    aliases = layer.names[1:]
    size = model_bytes(old)
    if new is None:
        return LayerReport(layer.name, "left", layer.reason, shape_of(old), "", size, size, aliases)
    fusion = plan.fusions.get(old)
    note, activation = plan.notes.get(old, ""), fusion.activation if fusion else ""
    shape = (new.out_features, new.in_features)
    sizes = size, new.memory_bytes()
    return QuantizedLayerReport(layer.name, "swapped", note, shape, activation, *sizes, aliases, new.mode)


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """(outputs, inputs) of a linear in any state, a lazy or parametrized one included."""
    if isinstance(module, (nn.Linear, Int8Linear, SparseLinear)):
        return module.out_features, module.in_features
    weight = getattr(module, "weight_orig", module._parameters.get("weight"))
    return () if weight is None else tuple(reversed(weight.shape))  # Conv1D: (inputs, outputs)


def attention_rows(modules: ModuleMap) -> list[LayerReport]:
    """The projections that nn.MultiheadAttention holds as bare parameters: float weights one may look for."""
    reason = "a parameter of nn.MultiheadAttention, not a layer"
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
