"""Which form a pruned layer's weight takes for how many tokens: asking, measuring, and remembering the answers.

>>> calibrate_cost_model("float32")        # once a machine; sparsify_ does it where it is missing
>>> layer.explain()                        # what was chosen for a SparseLinear, and what it takes

The model is described in cost_core.py. Its figures come from this machine (a calibration of a few seconds, kept on
disk) or, before there was one, from a built-in table of another machine. Predictions that come out close are settled
on the layer itself when it is made: never in a forward, and never when a checkpoint is loaded.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pycompress import cost_cache, cost_calibration
from pycompress.cost_builtin import BUILTIN_FITS, BUILTIN_THREADS
from pycompress.cost_calibration import Clock, Progress
from pycompress.cost_core import (
    ANY_M,
    BUCKETS,
    DEFAULT_TOKENS,
    DTYPES,
    FORMS,
    Choice,
    CostModel,
    Shape,
    describe_choice,
    form_at,
)
from pycompress.cost_explain import Explanation, explain_layer

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
_gave_up: set[tuple[str, int]] = set()  # (dtype, threads): the machine was too busy; layers do not try again


def default_cost_model() -> CostModel:
    """This machine's model if it was ever calibrated with this number of threads, else the built-in figures.

    Measures nothing. Raises ValueError where PYCOMPRESS_COST_MODEL names a file that is none.
    """
    threads = torch.get_num_threads()
    name = cost_cache.override()
    path = name or str(cost_cache.cache_path(cost_cache.machine_key(threads)))
    if path not in _models:
        if name and name != cost_cache.BUILTIN:
            _models[path] = cost_cache.load_override()
        else:
            _models[path] = (None if name else cost_cache.load(threads)) or _builtin()
    return _models[path]


def _builtin() -> CostModel:
    return CostModel(BUILTIN_FITS, threads=BUILTIN_THREADS, measured=frozenset())


def calibrate_cost_model(
    dtype: str = "float32",
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> CostModel:
    """Measures this machine's figures for one weight dtype, in a few seconds, and keeps them on disk.

    dtype: "float32", "bfloat16" or "int8", of the weights.
    threads: as torch.set_num_threads; by default those in force. They are set meanwhile.
    force: measure although there are figures already, as after the machine was busy.
    progress: progress(done, all), called now and then.

    Returns the model that default_cost_model() gives from now on. With PYCOMPRESS_COST_MODEL set it is that one, and
    nothing is measured.
    """
    if dtype not in DTYPES:
        raise ValueError(f"calibrate_cost_model: dtype={dtype!r}, expected one of {', '.join(DTYPES)}")
    if threads is not None and threads < 1:
        raise ValueError(f"calibrate_cost_model: threads={threads}, expected at least 1")
    before = torch.get_num_threads()
    try:
        if threads is not None and threads != before:
            torch.set_num_threads(threads)
        known = default_cost_model()
        if cost_cache.override() or (dtype in known.measured and not force):
            return known
        threads = torch.get_num_threads()
        try:
            fits = cost_calibration.measure_fits(dtype, progress=progress)
        except cost_calibration.BusyMachineError as error:
            _gave_up.add((dtype, threads))
            warnings.warn(
                f"calibrate_cost_model: the machine is too busy to be measured ({error}); going by "
                f"{'what was measured before' if dtype in known.measured else 'built-in figures'}. "
                f"calibrate_cost_model({dtype!r}) tries again",
                stacklevel=2,
            )
            return known
        model = CostModel({**known.fits, **fits}, threads=threads, measured=known.measured | {dtype})
        model.restore([(key, m, ratio) for key, m, ratio in known.corrections if dtype not in key])
        _models[str(cost_cache.cache_path(cost_cache.machine_key(model.threads)))] = model
        cost_cache.save(model)
        return model
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def choose_for(
    layer: SparseLinear, *, tokens: Sequence[int] | None = None, model: CostModel | None = None
) -> Choice:
    """The forms for a layer's weight, (largest M, code, ...). Measures nothing."""
    return (model or default_cost_model()).choose(Shape.of_layer(layer), tokens)


def choose_measured(
    layer: SparseLinear, *, tokens: Sequence[int] | None = None, model: CostModel | None = None
) -> Choice:
    """The forms for a layer that is being made: calibrates this machine if need be, and settles ties by measuring.

    A model that was passed, or named by PYCOMPRESS_COST_MODEL, is taken as it is. So is any on a device other than
    the CPU, where there is only one way to run.
    """
    shape = Shape.of_layer(layer)
    if model is None and not cost_cache.override() and layer.weight_bitmap.device.type == "cpu":
        for dtype in dict.fromkeys((shape.dtype, shape.dense)):
            if (dtype, torch.get_num_threads()) not in _gave_up:
                calibrate_cost_model(dtype)
        model = default_cost_model()
        if {shape.dtype, shape.dense} <= model.measured:
            settle_ties(model, layer, shape, tokens or DEFAULT_TOKENS)
    return (model or default_cost_model()).choose(shape, tokens)


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
    open_calls = []
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
            x = cost_calibration.activations(m, shape.k, shape.dense)
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
