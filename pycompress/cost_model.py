"""Which form a pruned layer's weight takes for how many tokens: asking, measuring, and remembering the answers.

>>> calibrate_cost_model("float32")        # once a machine; sparsify_ does it where it is missing
>>> layer.explain()                        # what was chosen for a SparseLinear, and what it takes

The model is described in cost_core.py. Its figures come from this machine (a calibration of a few seconds, kept on
disk) or, before there was one, from a built-in table of another machine. A GPU has figures of its own, before they are
measured estimates from counted bytes; cost_target.py is where the two differ. Predictions that come out close are
settled on the layer itself when it is made: never in a forward, and never when a checkpoint is loaded.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pycompress import cost_cache, cost_calibration
from pycompress.cost_calibration import Clock, Progress
from pycompress.cost_core import (
    ANY_M,
    BUCKETS,
    DEFAULT_TOKENS,
    FORMS,
    Choice,
    CostModel,
    Shape,
    describe_choice,
    form_at,
)
from pycompress.cost_explain import Explanation, explain_layer
from pycompress.cost_target import CpuTarget, check_model, target_of, target_on

if TYPE_CHECKING:
    from pycompress.nn import SparseLinear

__all__ = [
    "DEFAULT_TOKENS",
    "Choice",
    "CostModel",
    "Explanation",
    "Shape",
    "calibrate_cost_model",
    "choose_for",
    "choose_measured",
    "default_cost_model",
    "describe_choice",
    "explain_layer",
    "form_at",
]

TIE = 1.5  # forms whose predicted times are within this factor are measured
_FAR_OFF = 1.7
_TIE_SECONDS = 0.6  # at most spent on the ties of one layer
_models: dict[str, CostModel] = {}  # by the path of the cache file: what this process measured or read
_gave_up: set[tuple[str, str]] = set()  # (dtype, path): the machine was too busy; layers do not try again


def default_cost_model(device: torch.device | str | None = None) -> CostModel:
    """This machine's model if it was ever calibrated with this number of threads, else the built-in figures.

    device: a GPU, for its model instead of the CPU's.

    Measures nothing. Raises ValueError where PYCOMPRESS_COST_MODEL names a file that is none.
    """
    return _model_of(target_on(device))


def model_for(layer: SparseLinear) -> CostModel:
    """The default model of the machine that the layer is on. Measures nothing."""
    return _model_of(target_of(layer))


def _model_of(target: CpuTarget) -> CostModel:
    name = cost_cache.override()
    if name and name != cost_cache.BUILTIN:
        if name not in _models:
            _models[name] = cost_cache.load_override()
        if target.is_of(_models[name]):
            return _models[name]
    path = _path(target)
    where = f"{cost_cache.BUILTIN} {path}" if name else path
    if where not in _models:
        builtin = target.builtin()
        _models[where] = (None if name else cost_cache.load_of(target.key(), builtin.fits)) or builtin
    return _models[where]


def _path(target: CpuTarget) -> str:
    return str(cost_cache.cache_path(target.key()))


def calibrate_cost_model(
    dtype: str = "float32",
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> CostModel:
    """Measures this machine's figures for one weight dtype, in a few seconds, and keeps them on disk.

    dtype: "float32", "bfloat16" or "int8", of the weights; on a GPU "float16" too.
    threads: as torch.set_num_threads; by default those in force. They are set meanwhile.
    force: measure although there are figures already, as after the machine was busy.
    progress: progress(done, all), called now and then.
    device: a GPU to be measured instead of the CPU, with CUDA events.

    Returns the model that default_cost_model() gives from now on. With PYCOMPRESS_COST_MODEL set it is that one, and
    nothing is measured.
    """
    target = target_on(device)
    if dtype not in target.dtypes:
        raise ValueError(f"calibrate_cost_model: dtype={dtype!r}, expected one of {', '.join(target.dtypes)}")
    if threads is not None and threads < 1:
        raise ValueError(f"calibrate_cost_model: threads={threads}, expected at least 1")
    before = torch.get_num_threads()
    try:
        if threads is not None and threads != before:
            torch.set_num_threads(threads)
        return _calibrate(target, dtype, force, progress)
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _calibrate(target: CpuTarget, dtype: str, force: bool, progress: Progress | None) -> CostModel:
    known, path = _model_of(target), _path(target)
    if cost_cache.override() or (dtype in known.measured and not force):
        return known
    try:
        fits = target.measure(dtype, progress)
    except cost_calibration.BusyMachineError as error:
        _gave_up.add((dtype, path))
        warnings.warn(
            f"calibrate_cost_model: the machine is too busy to be measured ({error}); going by "
            f"{'what was measured before' if dtype in known.measured else 'built-in figures'}. "
            f"calibrate_cost_model({dtype!r}) tries again",
            stacklevel=3,
        )
        return known
    threads, measured = torch.get_num_threads(), known.measured | {dtype}
    model = CostModel({**known.fits, **fits}, threads=threads, measured=measured, machine=target.machine())
    model.restore([(key, m, ratio) for key, m, ratio in known.corrections if dtype not in key])
    _models[path] = model
    cost_cache.save(model)
    return model


def choose_for(layer: SparseLinear, *, tokens: Sequence[int] | None = None, model: CostModel | None = None) -> Choice:
    """The forms for a layer's weight, (largest M, code, ...). Measures nothing."""
    target = target_of(layer)
    check_model(model, target)
    return (model or _model_of(target)).choose(target.shape(layer), tokens)


def choose_measured(
    layer: SparseLinear, *, tokens: Sequence[int] | None = None, model: CostModel | None = None
) -> Choice:
    """The forms for a layer that is being made: calibrates this machine if need be, and settles ties by measuring.

    A model that was passed, or named by PYCOMPRESS_COST_MODEL, is taken as it is; so are estimates where kernels are
    emulated or interpreted.
    """
    target = target_of(layer)
    check_model(model, target)
    shape = target.shape(layer)
    if model is None and not cost_cache.override() and target.can_measure:
        for dtype in dict.fromkeys((shape.dtype, shape.dense)):
            if (dtype, _path(target)) not in _gave_up:
                _calibrate(target, dtype, False, None)
        model = _model_of(target)
        if {shape.dtype, shape.dense} <= model.measured:
            settle_ties(model, layer, shape, tokens or DEFAULT_TOKENS, clock=target.clock())
    return (model or _model_of(target)).choose(shape, tokens)


def settle_ties(
    model: CostModel,
    layer: SparseLinear,
    shape: Shape,
    tokens: Sequence[int],
    *,
    seconds: float = _TIE_SECONDS,
    clock: Clock = time.perf_counter,
) -> None:
    """Measures, on this layer, the forms whose predictions are within TIE of the best, and corrects the model.

    At the largest M of each bucket between the smallest and the largest of `tokens`, closest calls first. What was
    measured once for this shape and sparsity is not measured again.
    """
    target, open_calls = target_of(layer), []
    most = min(m for m in BUCKETS if m >= max(tokens))
    for m in BUCKETS:
        if min(tokens) <= m <= most and m < ANY_M:
            times = {form: model.predict(form, m, shape) for form in FORMS if model.knows(form, shape)}
            near = {form: t for form, t in times.items() if t <= TIE * min(times.values())}
            if len(near) > 1 and not all(model.is_corrected(form, m, shape) for form in near):
                second = sorted(near.values())[1]
                open_calls.append((second / min(near.values()), m, tuple(near)))
    if not open_calls:
        return
    variants: dict[str, torch.nn.Module] = {}
    start = clock()
    with torch.no_grad():
        for _, m, forms in sorted(open_calls):
            if clock() - start > seconds:
                break
            x = target.activations(m, shape.k, shape.dense)
            for form in forms:
                if form not in variants:
                    variants[form] = cost_calibration.variant(layer, form, shape.dense)
            runs = {form: cost_calibration.runner(variants[form], x) for form in forms}
            times = cost_calibration.least_times(runs, clock=clock)
            ratios = [t / model.predict(form, m, shape, corrected=False) for form, t in times.items()]
            # All, or none: what is far off says that another program held a core meanwhile.
            if max(ratios) < _FAR_OFF and min(ratios) > 1 / _FAR_OFF:
                for form, t in times.items():
                    model.correct(form, m, shape, t)
    cost_cache.save(model)
