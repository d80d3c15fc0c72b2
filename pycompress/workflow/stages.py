"""What each stage of a recipe does to a model: its options, handed to the function that does the work.

A stage depends on the model it gets, the recipe and the batches alone: the generators of random numbers are seeded from
the recipe's seed and the stage's number before it, and what it finds by timing is written down before it is used. So a
stage that is repeated after a crash gives the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from pycompress import cost_cache
from pycompress.calibration import Batch, Calibration, calibrate
from pycompress.convert import FLOAT, QuantizeReport, apply_edits, quantize_
from pycompress.cost_model import DEFAULT_TOKENS, CostModel, default_cost_model
from pycompress.cost_target import target_on
from pycompress.fuse import Edit
from pycompress.layer_kinds import LINEAR, LayerKind, kinds_of
from pycompress.nn import MaskedLinear
from pycompress.nn.float_linear import is_conv1d
from pycompress.pruning import PruneReport, PruningSchedule, prune_
from pycompress.recipe import Distill, Finetune, LowRank, Prune, Qat, Quantize, Recipe, Schedule, Sparsify, Stage, Train
from pycompress.recipe.sections import Distillation, Sensitivity
from pycompress.selection import OURS, Layer, ModuleMap, select
from pycompress.sparsify import SparsifyReport, sparsify_
from pycompress.tracing import Shadow
from pycompress.workflow.batches import epoch_of, first_batch, split
from pycompress.workflow.job import Job
from pycompress.workflow.measure import device_of
from pycompress.workflow.records import WARNING

if TYPE_CHECKING:
    from torch.optim import Optimizer

GRADIENT_BATCHES = 16  # that taylor and movement look at where nothing is trained


@dataclass(frozen=True)
class Done:
    """summary: the report in one line. steps: of the optimizer."""

    summary: str
    steps: int = 0


class MakeSchedule(Protocol):
    """total: the steps of the stage."""

    def __call__(self, optimizer: Optimizer, total: int) -> PruningSchedule: ...


class TrainFn(Protocol):
    """Trains the model in place, returns the number of steps."""

    def __call__(
        self,
        model: nn.Module,
        train: Train,
        distillation: Distillation | None,
        make_schedule: MakeSchedule | None = None,
    ) -> int: ...


@dataclass(frozen=True)
class Bench:
    """Where a stage works. choices: what was found by timing, kept with the run. keep: writes them to the disk."""

    job: Job
    index: int
    train: TrainFn
    choices: MutableMapping[str, Any]
    keep: Callable[[], None]

    def inputs(self) -> Iterable[Batch]:
        batches = self.job.inputs()
        assert batches is not None  # the preflight asked for them
        return batches


def run_stage(stage: Stage, model: nn.Module, bench: Bench) -> Done:
    """Do what the stage says, to `model` in place."""
    return _STAGES[type(stage)](stage, model, bench)


# ---- stages that change weights ---------------------------------------------------------------------------------


def _low_rank(stage: LowRank, model: nn.Module, bench: Bench) -> Done:
    from pycompress.low_rank import factorize_

    report = factorize_(
        model,
        rank=stage.rank,
        energy=stage.energy,
        ratio=stage.ratio,
        batches=bench.job.inputs() if stage.activation_aware else None,
        skip=stage.skip,
        progress=bench.job.progress,
    )
    return Done(report.summary())


def _prune(stage: Prune, model: nn.Module, bench: Bench) -> Done:
    if stage.train is not None:
        return _prune_in_steps(stage, stage.train, model, bench)
    batches, loss_fn = None, None
    if stage.method == "wanda":
        batches = bench.inputs()
    elif stage.method in ("taylor", "movement"):
        batches, loss_fn = _with_loss(model, bench.job)
    report = prune_(
        model,
        stage.sparsity,
        pattern=stage.pattern,
        method=stage.method,
        scope=stage.scope,
        min_sparsity=stage.min_sparsity,
        max_sparsity=stage.max_sparsity,
        batches=batches,
        loss_fn=loss_fn,
        gradient=stage.gradient,
        seed=bench.job.recipe.seed,
        skip=stage.skip,
    )
    return Done(_pruned(report))


def _prune_in_steps(stage: Prune, train: Train, model: nn.Module, bench: Bench) -> Done:
    made: list[PruningSchedule] = []
    turn_conv1d_(stage, model)

    def make(optimizer: Optimizer, total: int) -> PruningSchedule:
        made.append(make_schedule(stage, model, optimizer, total, bench.job.recipe))
        return made[-1]

    steps = bench.train(model, train, stage.distill, make)
    return Done(_pruned(made[-1].report()), steps)


def turn_conv1d_(stage: Prune, model: nn.Module) -> None:
    """Conv1D becomes a MaskedLinear with every weight, before there is an optimizer: its weight is a new parameter."""
    prune_(model, 0.0, gradient=stage.gradient, skip=stage.skip, filter_fn=lambda name, module: is_conv1d(module))


def make_schedule(stage: Prune, model: nn.Module, optimizer: Optimizer, total: int, recipe: Recipe) -> PruningSchedule:
    """Raises ValueError where the last masks would be chosen after the last step."""
    plan = stage.schedule or Schedule()
    begin, end = (_steps(value, total) for value in (plan.begin, plan.end))
    if plan.kind == "one_shot":
        end = begin
    if max(begin, end) > total:
        name, value = ("begin", plan.begin) if begin > total else ("end", plan.end)
        raise ValueError(
            f"schedule.{name}={value} is after the last of {total} steps; expected at most {total}, or a share of them "
            "as 0.7"
        )
    return PruningSchedule(
        model,
        optimizer,
        sparsity=stage.sparsity,
        initial_sparsity=plan.initial_sparsity,
        begin=begin,
        end=max(begin, end),
        kind=plan.kind,
        every=plan.every,
        pattern=stage.pattern,
        method=stage.method,
        scope=stage.scope,
        min_sparsity=stage.min_sparsity,
        max_sparsity=stage.max_sparsity,
        regrow=plan.regrow,
        gradient=stage.gradient,
        seed=recipe.seed,
        skip=stage.skip,
    )


def _steps(value: float, total: int) -> int:
    """A number of steps as it is; a float is a share of them."""
    return value if isinstance(value, int) else round(value * total)


def _pruned(report: PruneReport) -> str:
    return _warned(report.summary(), "nothing was pruned", not report.pruned or report.sparsity == 0)


def _with_loss(model: nn.Module, job: Job) -> tuple[Iterable[Batch], Callable[[Any, Any], Any]]:
    """The first training batches as model inputs, and the task's loss of each, for prune_'s gradient methods."""
    from pycompress.workflow.objective import Objective

    assert job.train_batches is not None
    objective = Objective.make(None, model, None, job.loss_fn, first_batch(job.train_batches))
    current: list[Any] = []

    def inputs() -> Iterator[Any]:
        for batch in islice(epoch_of(job.train_batches, 0), GRADIENT_BATCHES):  # type: ignore[arg-type]
            current[:] = [batch]
            yield split(batch, model).inputs

    # The objective runs the model once more: what the task's loss is, is said in one place.
    return inputs(), lambda output, inputs: objective(current[0])[0]


def _distill(stage: Distill, model: nn.Module, bench: Bench) -> Done:
    return _trained(bench.train(model, stage.train, stage))


def _finetune(stage: Train, model: nn.Module, bench: Bench) -> Done:
    return _trained(bench.train(model, stage, None))


def _trained(steps: int) -> Done:
    return Done(f"{steps} steps", steps)


def _qat(stage: Qat, model: nn.Module, bench: Bench) -> Done:
    from pycompress.qat import prepare_qat_

    ranges = _ranges(model, bench, stage.skip) if stage.mode == "static" else None
    report = prepare_qat_(model, stage.mode, calibration=ranges, skip=stage.skip)
    steps = bench.train(model, stage.train, stage.distill)
    text = _warned(report.summary(), "no layer is trained for int8", not report.prepared)
    return Done(f"{text}; {steps} steps", steps)


def _ranges(
    model: nn.Module, bench: Bench, skip: Iterable[str], method: str = "minmax", layers: Iterable[str] = ("linear",)
) -> Calibration:
    return calibrate(model, bench.inputs(), method, layers=layers, skip=tuple(skip), progress=bench.job.progress)


# ---- conversions ------------------------------------------------------------------------------------------------


def _quantize(stage: Quantize, model: nn.Module, bench: Bench) -> Done:
    notes = []
    if folded := _fold_masks(model, stage.skip):
        notes.append(f"{folded} pruned layers made dense")
    if not _takes_int8(model, stage):  # but those that qat prepared, which go as they were trained
        report = quantize_(model, skip=stage.skip, fuse=stage.fuse)
        return Done("; ".join([*notes, _warned_conversion(report, "no layer was quantised")]))
    if stage.smooth is not None:
        from pycompress.smooth import smooth_

        where, skip = stage.smooth_where, stage.skip
        shown = bench.job.progress
        notes.append(smooth_(model, bench.inputs(), stage.smooth, where=where, skip=skip, progress=shown).summary())
    static = stage.mode == "static"
    ranges = _ranges(model, bench, stage.skip, stage.method, stage.layers) if static else None
    mode: str | Mapping[str, str] = stage.mode
    if stage.sensitivity is not None:
        mode, note = _chosen_modes(stage, stage.sensitivity, model, bench, ranges)
        notes.append(note)
        ranges = ranges if "static" in mode.values() else None
    report = quantize_(
        model,
        mode,
        layers=stage.layers,
        group_size=stage.group_size,
        symmetric=stage.symmetric,
        skip=stage.skip,
        fuse=stage.fuse,
        calibration=ranges,
    )
    return Done("; ".join([*notes, _warned_conversion(report, "no layer was quantised")]))


def _takes_int8(model: nn.Module, stage: Quantize) -> bool:
    """Whether there is a float layer to calibrate, to measure and to quantise."""
    kinds = kinds_of(stage.layers, "quantize_")
    return any(not layer.reason for layer in _selected(model, stage.skip, kinds=kinds))


def _fold_masks(model: nn.Module, skip: Iterable[str]) -> int:
    """MaskedLinear back to nn.Linear, which quantize_ takes: nothing trains after it. Returns their number."""
    masked = [layer for layer in _selected(model, skip, MaskedLinear) if type(layer.module) is MaskedLinear]
    chosen = {layer.module: layer.slots for layer in masked if not layer.reason}
    edits = [
        Edit(parent._modules, key, module.to_linear())  # type: ignore[operator]
        for module, slots in chosen.items()
        for parent, key in slots
    ]
    apply_edits(edits)
    return len(chosen)


def _selected(
    model: nn.Module, skip: Iterable[str], *takes: type[nn.Module], kinds: tuple[LayerKind, ...] = (LINEAR,)
) -> list[Layer]:
    return select(ModuleMap(model), Shadow(model, opaque=OURS), op="quantize_", skip=skip, takes=takes, kinds=kinds)


def _chosen_modes(
    stage: Quantize, wanted: Sensitivity, model: nn.Module, bench: Bench, ranges: Calibration | None
) -> tuple[Mapping[str, str], str]:
    """A mode for each layer; where the target is out of reach, what comes nearest, with a warning."""
    from pycompress.sensitivity import sensitivity
    from pycompress.sensitivity_report import TargetNotReachedError

    modes = tuple(dict.fromkeys((stage.mode, *(mode for mode in wanted.gentler if mode != FLOAT))))
    found = sensitivity(
        model, bench.inputs(), modes=modes, skip=stage.skip, calibration=ranges, progress=bench.job.progress
    )
    try:
        choice = found.choose(wanted.target, wanted.gentler, wanted.max_bytes)
    except TargetNotReachedError as error:
        return error.best, f"{WARNING}{error}"
    return choice, choice.summary()


def _sparsify(stage: Sparsify, model: nn.Module, bench: Bench) -> Done:
    options: dict[str, Any] = {"tokens": stage.tokens or DEFAULT_TOKENS, "skip": stage.skip, "fuse": stage.fuse}
    if stage.format == "auto":
        options["cost_model"] = _cost_model(stage, model, bench, options)
    report = sparsify_(model, stage.dtype, stage.format, **options)
    return Done(_warned_conversion(report, "no layer became sparse"))


def _cost_model(stage: Sparsify, model: nn.Module, bench: Bench, options: dict[str, Any]) -> CostModel:
    """What "auto" goes by: measured on a throw-away copy, written down, and from there on only read.

    Timings differ from run to run, and close calls with them: a stage that is repeated decides as it did before.
    """
    device = device_of(model)
    target = target_on(None if device.type == "cpu" else device)
    if (known := bench.choices.get("cost_model")) is not None:
        with suppress(ValueError):  # of another machine or number of threads, where other choices are right
            return cost_cache.from_json(known, target.key(), target.builtin().fits)
    sparsify_(copy.deepcopy(model), stage.dtype, stage.format, **options)
    found = default_cost_model(None if device.type == "cpu" else device)
    bench.choices["cost_model"] = known = cost_cache.to_json(found, target.key())
    bench.keep()
    return cost_cache.from_json(known, target.key(), target.builtin().fits)


def _warned_conversion(report: QuantizeReport | SparsifyReport, text: str) -> str:
    return _warned(report.summary(), text, not report.swapped)


def _warned(summary: str, text: str, condition: bool) -> str:
    return f"{WARNING}{text}; {summary}" if condition else summary


_STAGES: dict[type[Stage], Callable[[Any, nn.Module, Bench], Done]] = {
    LowRank: _low_rank,
    Prune: _prune,
    Distill: _distill,
    Finetune: _finetune,
    Qat: _qat,
    Quantize: _quantize,
    Sparsify: _sparsify,
}
