"""Swapping the layers of an existing model, in place and all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from pycompress.fuse import Edit, FusionPlan, fast_path_edits, plan_fusions
from pycompress.nn import Int8Linear, SparseLinear
from pycompress.ops import BACKENDS, MODES
from pycompress.report import LayerReport, QuantizeReport, model_bytes
from pycompress.selection import OURS, FilterFn, Layer, ModuleMap, check_root, select
from pycompress.tracing import Shadow

__all__ = ["LayerReport", "QuantizeReport", "quantize_"]

Ranges = Mapping[str, tuple[float, float]]


def quantize_(
    model: nn.Module,
    mode: str = "dynamic",
    *,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    fuse: bool = True,
    calibration: Ranges | None = None,
    backend: str = "auto",
) -> QuantizeReport:
    """Replace the linear layers of `model` by Int8Linear, in place, and say what was done.

    model: any module whose layers are exactly nn.Linear or Hugging Face's Conv1D, with fp32, bf16 or fp16
        weights. Layers that a swap would break (subclasses, hooks, parametrizations, tied weights, weights
        that something reads directly) are left as they are; the report names each with its reason.
    mode: "dynamic" (activations int8, a scale per token), "static" (a calibrated scale; needs `calibration`)
        or "weight_only" (activations stay float).
    skip: qualified names, each covering all below it, or glob patterns: skip=["lm_head", "*.attention.*"].
    filter_fn: filter_fn(qualified_name, module) -> True where a layer may be swapped.
    fuse: fold the ReLU, GELU or SiLU that directly follows a linear, and alone reads it, into the kernel.
    calibration: the result of pycompress.calibrate, for mode="static"; layers it never reached stay float.
    backend: of the new layers; see Int8Linear.

    Raises TypeError or ValueError for a bad argument, ValueError naming the layer whose weights are not
    finite. Whenever it raises, the model is what it was.
    """
    _check_arguments(model, mode, calibration, backend)
    modules = ModuleMap(model)
    shadow = Shadow(model, opaque=OURS)
    layers = select(modules, shadow, op="quantize_", skip=skip, filter_fn=filter_fn)
    if calibration is not None:
        layers = _keep_uncalibrated(layers, calibration)
    chosen = [layer for layer in layers if not layer.reason]
    plan = plan_fusions(modules, chosen, shadow) if fuse else FusionPlan()
    before = model_bytes(model)
    replacements = {layer.module: _replace(layer, mode, plan, calibration, backend) for layer in chosen}

    edits = [Edit(parent._modules, key, replacements[layer.module]) for layer in chosen for parent, key in layer.slots]
    edits += [fusion.edit for fusion in plan.fusions.values()]
    edits += fast_path_edits(modules, set(replacements))
    apply_edits(edits)
    rows = [_report(layer, replacements.get(layer.module), plan) for layer in layers]
    return QuantizeReport(mode, before, model_bytes(model), rows + attention_rows(modules))


def _check_arguments(model: nn.Module, mode: str, calibration: Ranges | None, backend: str) -> None:
    check_root(model, "quantize_")
    if mode not in MODES:
        raise ValueError(f"quantize_: unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    if backend not in BACKENDS:
        raise ValueError(f"quantize_: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if mode == "static" and calibration is None:
        raise ValueError(
            "quantize_: mode='static' needs the range of each layer's input; "
            "pass calibration=pycompress.calibrate(model, batches)"
        )
    if mode != "static" and calibration is not None:
        raise ValueError(f"quantize_: calibration is for mode='static'; mode={mode!r} would ignore it")
    if calibration is not None and not isinstance(calibration, Mapping):
        raise TypeError(f"quantize_: calibration is a {type(calibration).__name__}; expected what calibrate() returns")


def _input_range(layer: Layer, calibration: Ranges) -> tuple[float, float] | None:
    return next((calibration[name] for name in layer.names if name in calibration), None)


def _keep_uncalibrated(layers: list[Layer], calibration: Ranges) -> list[Layer]:
    """Leave the layers without a range; a calibration that fits no layer at all is of another model."""
    chosen = [layer for layer in layers if not layer.reason]
    missing = {layer.name for layer in chosen if _input_range(layer, calibration) is None}
    if chosen and len(missing) == len(chosen):
        raise ValueError(
            f"quantize_: calibration has {len(calibration)} layers and none of those to be swapped, as "
            f"{chosen[0].name!r}; calibrate this very model, with the same skip and filter_fn"
        )
    reason = "was not reached in calibration"
    return [replace(layer, reason=reason) if layer.name in missing else layer for layer in layers]


def _replace(layer: Layer, mode: str, plan: FusionPlan, calibration: Ranges | None, backend: str) -> Int8Linear:
    """The int8 layer that takes the place of `layer`; raises with its name if it cannot be made."""
    old = layer.module
    fusion = plan.fusions.get(old)
    input_range = None if calibration is None else _input_range(layer, calibration)
    try:
        new = Int8Linear.from_float(
            old, mode, fusion.activation if fusion else None, input_range=input_range, backend=backend
        )
    except Exception as error:
        raise unchanged_error("quantize_", layer, error) from error
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
        if key not in new.__dict__ and not hasattr(new, key) and isinstance(value, (bool, int, float, str)):
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
    return LayerReport(layer.name, "swapped", note, shape, activation, size, new.memory_bytes(), aliases)


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
