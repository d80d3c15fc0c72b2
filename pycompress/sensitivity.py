"""sensitivity: which layers a model can least afford to have quantised, measured at the model's own output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from pycompress.calibration import Batch, calibrate, check_batches, with_progress
from pycompress.convert import Ranges, shape_of
from pycompress.nn.quantized_linear import BIT4_MODES, LINEAR_MODES
from pycompress.ops import BACKENDS
from pycompress.report import model_bytes
from pycompress.selection import OURS, FilterFn, Layer, ModuleMap, check_root, select
from pycompress.sensitivity_measure import Error, OutputFn, Trial
from pycompress.sensitivity_report import Choice, LayerSensitivity, SensitivityReport, TargetNotReachedError
from pycompress.tracing import Shadow

__all__ = ["Choice", "Error", "LayerSensitivity", "SensitivityReport", "TargetNotReachedError", "sensitivity"]

_OP = "sensitivity"


def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    modes: Sequence[str] = ("dynamic", "weight_only"),
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    output_fn: OutputFn | None = None,
    calibration: Ranges | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> SensitivityReport:
    """For every layer and mode: how far the model's output moves when that layer alone is quantised.

    model: as quantize_ takes it. It is not changed: layers are swapped in and out.
    batches: of model inputs, as calibrate takes them. They are kept in a list, with the float output of each: the model
        runs over them once as it is, and once for every layer and mode.
    modes: of "dynamic", "static", "weight_only", "int4" and "nf4", the one that is meant to be used first.
    skip, filter_fn, backend: as for quantize_.
    output_fn: output_fn(output, batch) -> the tensor to compare. By default the logits or the last hidden state of a
        Hugging Face output, else the output itself or its first item.
    calibration: for "static"; by default from the same batches.
    progress: show a progress bar on stderr.

    The error is 1 - the mean cosine over the tokens of an output (batch, tokens, values), where a mapping's
    attention_mask is 1, or over the samples of another; and the relative L2 distance of all of them together.
    The report's `choose` turns the errors into a mode for each layer.

    Raises TypeError or ValueError for a bad argument, ValueError where no layer can be quantised. The model is what it
    was whenever it returns or raises.
    """
    modes = _checked_modes(modes)
    check_root(model, _OP)
    check_batches(batches, _OP)
    if backend not in BACKENDS:
        raise ValueError(f"{_OP}: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    int8 = not any(mode in BIT4_MODES for mode in modes)
    shadow = Shadow(model, opaque=OURS)
    found = select(ModuleMap(model), shadow, op=_OP, skip=skip, filter_fn=filter_fn, keeps_weight=int8)
    layers = {layer.name: layer for layer in found if not layer.reason}
    if not layers:
        raise ValueError(f"{_OP}: nothing to measure; quantize_ would swap no layer of this model")
    kept = list(batches)
    if not kept:
        raise ValueError(f"{_OP}: batches is empty; pass at least one (is it a generator that is used up?)")
    if "static" not in modes and calibration is not None:
        raise ValueError(f"{_OP}: calibration is for mode 'static'; modes={modes} would ignore it")
    if "static" in modes and calibration is None:
        calibration = calibrate(model, kept, skip=skip, filter_fn=filter_fn, progress=progress)
    if calibration is not None:
        layers = {name: layer for name, layer in layers.items() if any(n in calibration for n in layer.names)}
    trial = Trial(model, kept, layers, output_fn, calibration, backend)
    rows = [_measured(trial, layer, modes) for layer in with_progress(list(layers.values()), progress, "quantising")]
    rest = sum(model_bytes(layer.module) for layer in found if layer.name not in layers)
    report = SensitivityReport(modes, rows, rest)
    report.remember(trial)
    return report


def _checked_modes(modes: Sequence[str]) -> tuple[str, ...]:
    given = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in given:
        if mode not in LINEAR_MODES:
            raise ValueError(f"{_OP}: unknown mode {mode!r}; expected some of {', '.join(LINEAR_MODES)}")
    if not given or len(set(given)) != len(given):
        raise ValueError(f"{_OP}: modes={modes!r}; expected one or more of {', '.join(LINEAR_MODES)}, each once")
    return given


def _measured(trial: Trial, layer: Layer, modes: Sequence[str]) -> LayerSensitivity:
    errors = {mode: trial.error({layer.name: mode}) for mode in modes}
    sizes = {mode: model_bytes(trial.quantised(layer.name, mode)) for mode in modes}
    trial.forget()
    return LayerSensitivity(layer.name, shape_of(layer.module), model_bytes(layer.module), errors, sizes)
