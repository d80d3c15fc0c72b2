"""What a recipe may say: every key with its type, its range and its default.

A section is immutable, knows no other key than its fields, and is checked when it is made. ``reading.py`` makes one
from YAML or plain Python, ``order.py`` says which stage may follow which.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pycompress.pruning.patterns import Pattern
from pycompress.pruning.schedule_checks import check_choices, final_sparsity
from pycompress.pruning.schedule_plan import Plan
from pycompress.recipe.base import (
    Count,
    Decay,
    Names,
    NotNegative,
    Number,
    Positive,
    Section,
    Share,
    Steps,
    as_names,
    as_tuple,
    check_pattern,
)


class Train(Section):
    """How a stage trains. `steps` counts optimizer steps; exactly one of `steps` and `epochs` is given."""

    steps: Count | None = None
    epochs: Positive | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Steps = 0
    final_lr: Share = 0.0  # what `schedule` falls towards, as a share of lr
    weight_decay: NotNegative = 0.0  # of weights of two dimensions and more; not of biases and norms
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(as_tuple)] = (0.9, 0.999)  # of adamw and adam
    momentum: Decay = 0.9  # of sgd
    clip_norm: Positive | None = None
    autocast: Literal["bfloat16"] | None = None
    accumulate: Count = 1  # batches a step
    freeze: Names = ()  # modules whose parameters stay as they are

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if isinstance(self.warmup, int) and self.steps is not None and self.warmup >= self.steps > 1:
            raise ValueError(f"warmup={self.warmup} leaves none of {self.steps} steps; give fewer, or a share as 0.1")
        unused = {
            "momentum": self.optimizer != "sgd" and self.momentum != 0.9,
            "betas": self.optimizer == "sgd" and self.betas != (0.9, 0.999),
        }
        for key, is_unused in unused.items():
            if is_unused:
                raise ValueError(f"{key} is not used by optimizer {self.optimizer!r}; leave it out")
        if self.schedule == "constant" and self.final_lr:
            raise ValueError(f"final_lr={self.final_lr:g} is not used by schedule 'constant'; leave it out")
        return self


class Hidden(Section):
    """The term on hidden states. layers: "last", "all" (evenly spaced over the teacher's, as TinyBERT) or
    {student module: teacher module} by qualified name, whose outputs are compared.
    """

    weight: Positive = 1.0
    kind: Literal["mse", "cosine"] = "mse"
    layers: Literal["last", "all"] | dict[str, str] = "last"


class Attention(Section):
    """The term on attention maps; the models must return them (Hugging Face: attn_implementation="eager")."""

    weight: Positive = 1.0
    kind: Literal["mse", "kl"] = "kl"
    layers: Literal["last", "all"] = "last"


class Distillation(Section):
    """loss = alpha * task loss + (1 - alpha) * tau^2 * D(teacher, student) + hidden.weight * H + attention.weight * A

    loss: D on the logits; "none" takes no logits (an encoder's), only alpha * task loss and the other terms.
    """

    loss: Literal["forward_kl", "reverse_kl", "jsd", "none"] = "forward_kl"
    alpha: Share = 0.5
    tau: Positive = 2.0
    beta: Share = 0.5  # of jsd
    hidden: Hidden | None = None
    attention: Attention | None = None

    @model_validator(mode="after")
    def _learns(self) -> Distillation:
        if self.loss == "jsd" and self.beta in (0.0, 1.0):
            raise ValueError(f"loss 'jsd' with beta={self.beta:g} is 0 for all logits; choose a beta between 0 and 1")
        if self.loss != "jsd" and self.beta != 0.5:
            raise ValueError(f"beta is not used by loss {self.loss!r}; leave it out, or choose loss 'jsd'")
        if self.hidden is None and self.attention is None:
            if self.loss == "none":
                raise ValueError("loss 'none' without hidden and attention takes nothing from the teacher; give one")
            if self.alpha == 1.0:
                raise ValueError("alpha=1 gives the teacher no weight; choose less, or finetune without a teacher")
        return self


class Schedule(Section):
    """When masks change while a stage trains.

    begin, end: steps, or as floats shares of the stage's steps: 1 is the first step, 1.0 all of them.
    """

    kind: Literal["cubic", "linear", "constant", "one_shot"] = "cubic"
    begin: Steps = 0
    end: Steps = 0.7
    every: Count = 10
    initial_sparsity: Share = 0.0
    regrow: Share = 0.0

    @model_validator(mode="after")
    def _ends_after_begin(self) -> Schedule:
        alike = isinstance(self.begin, int) == isinstance(self.end, int)
        if self.kind != "one_shot" and alike and self.end < self.begin:
            raise ValueError(f"end={self.end} is before begin={self.begin}")
        return self


class Stage(Section):
    """One step of a recipe. `name` is the key it has in YAML."""

    name: ClassVar[str]

    @property
    def training(self) -> Train | None:
        """How it trains, if it does: then it needs train_batches."""
        return self if isinstance(self, Train) else getattr(self, "train", None)

    @property
    def distillation(self) -> Distillation | None:
        """What it learns from the teacher, if it does."""
        return self if isinstance(self, Distillation) else getattr(self, "distill", None)

    @property
    def needs_samples(self) -> bool:
        """Whether it looks at model inputs, of `calibration` or train_batches, apart from training."""
        return False


class LowRank(Stage):
    """factorize_: exactly one of rank, energy and ratio."""

    name: ClassVar[str] = "low_rank"
    rank: Count | dict[str, Count] | None = None
    energy: Annotated[Number, Field(gt=0, le=1)] | None = None
    ratio: Annotated[Number, Field(gt=0, lt=1)] | None = None
    activation_aware: bool = True  # uses the calibration batches; without any: plain SVD
    skip: Names = ()

    @model_validator(mode="after")
    def _one_size(self) -> LowRank:
        if sum(value is not None for value in (self.rank, self.energy, self.ratio)) != 1:
            raise ValueError("give exactly one of rank, energy and ratio")
        return self


def _some_step(when: float) -> int:
    """A share of steps that are not known yet: 0.0 is none of them, all others are late enough."""
    return when if isinstance(when, int) else 10**9 if when else 0


class Prune(Stage):
    """prune_, or with `train` a PruningSchedule while it trains. See prune_ for the first keys."""

    name: ClassVar[str] = "prune"
    sparsity: Share | None = None
    pattern: Annotated[str, AfterValidator(check_pattern)] = "unstructured"
    method: Literal["magnitude", "taylor", "wanda", "movement", "random", "zeros"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    min_sparsity: Share = 0.0
    max_sparsity: Share = 1.0
    gradient: Literal["masked", "dense"] = "masked"
    skip: Names = ()
    schedule: Schedule | None = None  # Schedule() where `train` is given
    train: Train | None = None
    distill: Distillation | None = None

    @property
    def needs_samples(self) -> bool:
        return self.method == "wanda" or (self.train is None and self.method in ("taylor", "movement"))

    @model_validator(mode="after")
    def _schedule_trains(self) -> Prune:
        if self.train is None and (self.schedule is not None or self.distill is not None):
            raise ValueError(f"{'schedule' if self.schedule else 'distill'} needs train: steps to spread over")
        if self.train is not None and self.method in ("wanda", "zeros"):
            raise ValueError(f"method {self.method!r} prunes at once; leave train out, and finetune in the next stage")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Prune:
        pattern = Pattern.parse(self.pattern)
        if self.min_sparsity > self.max_sparsity:
            raise ValueError(f"min_sparsity={self.min_sparsity:g} is above max_sparsity={self.max_sparsity:g}")
        if self.method == "zeros":
            if self.sparsity is not None:
                raise ValueError(f"method 'zeros' takes what is 0 already; leave sparsity={self.sparsity:g} out")
            return self
        try:
            self._check_schedule(pattern)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("PruningSchedule: ")) from None
        return self

    def _check_schedule(self, pattern: Pattern) -> None:
        final = final_sparsity(pattern, self.sparsity)
        if self.train is None:
            return
        schedule = self.schedule or Schedule()
        begin, end = _some_step(schedule.begin), _some_step(schedule.end)
        initial, every = schedule.initial_sparsity, schedule.every
        plan = Plan.make(schedule.kind, begin, max(begin, end), every, initial, final, op="schedule")
        check_choices(plan, pattern, self.method, self.scope, self.gradient, schedule.regrow)


class Distill(Stage, Distillation):
    """Training against the teacher."""

    name: ClassVar[str] = "distill"
    train: Train


class Finetune(Stage, Train):
    """Training on the task's own loss."""

    name: ClassVar[str] = "finetune"


class Qat(Stage):
    """prepare_qat_, then training with fake-quantised weights and activations."""

    name: ClassVar[str] = "qat"
    mode: Literal["dynamic", "static", "weight_only"] = "dynamic"
    skip: Names = ()
    train: Train
    distill: Distillation | None = None

    @property
    def needs_samples(self) -> bool:
        return self.mode == "static"


class Sensitivity(Section):
    """Which layers get a gentler mode: the most sensitive first, until the model's output is good enough.

    target: of the mean cosine between the outputs before and after, on the calibration batches.
    max_bytes: what the linear layers may take then, as a share of their bytes before.
    """

    target: Annotated[Number, Field(gt=0, lt=1)] = 0.999
    gentler: Annotated[tuple[Literal["weight_only", "float"], ...], BeforeValidator(as_tuple)] = (
        "weight_only",
        "float",
    )
    max_bytes: Annotated[Number, Field(gt=0, le=1)] = 1.0


class Quantize(Stage):
    """quantize_. smooth: SmoothQuant's alpha, before it; smooth_where: "fold" only where the layer before takes the
    scales over, "anywhere" with a ChannelScale where none does.
    """

    name: ClassVar[str] = "quantize"
    mode: Literal["dynamic", "static", "weight_only", "int4", "nf4"] = "dynamic"
    layers: Annotated[
        tuple[Literal["linear", "conv2d", "embedding", "attention", "all"], ...], BeforeValidator(as_names)
    ] = ("linear",)
    group_size: Count | Literal[-1] = 128  # of int4 and nf4: weights that share a scale; -1: a row
    symmetric: bool = True  # of int4
    method: Literal["minmax", "percentile", "mse"] = "minmax"  # of static's calibration
    skip: Names = ()
    fuse: bool = True
    smooth: Share | None = None
    smooth_where: Literal["anywhere", "fold"] = "anywhere"
    sensitivity: Sensitivity | None = None

    @property
    def needs_samples(self) -> bool:
        return self.mode == "static" or self.smooth is not None or self.sensitivity is not None

    @model_validator(mode="after")
    def _uses_its_options(self) -> Quantize:
        if self.method != "minmax" and self.mode != "static":
            raise ValueError(f"method is of mode 'static', but mode is {self.mode!r}; leave method out")
        if self.group_size != 128 and self.mode not in ("int4", "nf4"):
            raise ValueError(f"group_size is of modes 'int4' and 'nf4', but mode is {self.mode!r}; leave it out")
        if not self.symmetric and self.mode != "int4":
            raise ValueError(f"symmetric is of mode 'int4', but mode is {self.mode!r}; leave it out")
        if not self.layers:
            raise ValueError("layers is empty; leave it out for linear layers")
        if self.smooth is None and self.smooth_where != "anywhere":
            raise ValueError("smooth_where is not used without smooth; leave it out, or give smooth: 0.5")
        if self.sensitivity is not None and self.layers != ("linear",):
            raise ValueError("sensitivity measures linear layers; leave layers out, or sensitivity")
        if self.sensitivity is not None and not (self.group_size == 128 and self.symmetric):
            raise ValueError("sensitivity measures symmetric groups of 128; leave group_size and symmetric out")
        return self


class Sparsify(Stage):
    """sparsify_."""

    name: ClassVar[str] = "sparsify"
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    format: Literal["auto", "bitmap", "index"] = "auto"
    tokens: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] | None = None  # rows of x that speed is chosen for
    skip: Names = ()
    fuse: bool = True


STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (LowRank, Prune, Distill, Finetune, Qat, Quantize, Sparsify)
}


class Measure(Section):
    """What is timed before and after: batch sizes, made from the first sample batch by repeating its samples."""

    batch_sizes: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] = (1, 32)
    rounds: Annotated[int, Field(ge=0)] = 15  # 0 times nothing
    layers: bool = True  # error and time of every layer


class Recipe(Section):
    """The stages in their order, and what holds for all of them.

    Recipe.of(...) makes one of whatever says it; Recipe(stages=..., seed=...) of the same stages.
    """

    stages: tuple[Stage, ...]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    measure: Measure = Measure()
    checkpoint_seconds: NotNegative = 60.0  # between two checkpoints of a training stage; 0: every step

    @classmethod
    def made(cls, values: dict[str, Any]) -> Section:
        from pycompress.recipe.reading import build

        return build(cls, values)

    @classmethod
    def of(cls, source: Recipe | Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
        """A recipe of a recipe, a list of stages, a mapping with `stages`, or a YAML file.

        A stage is a section such as Prune(...), {"prune": {...}}, or a name alone, as "quantize". The file may be one
        of `pycompress compress`; what only the command line reads (model, train_batches, ...) is passed over.

        Raises RecipeError(ValueError) naming every problem, with the line of the file or the number of the stage.
        """
        from pycompress.recipe.reading import build, read_recipe

        if isinstance(source, Recipe):
            return source
        if isinstance(source, (str, os.PathLike)):
            return read_recipe(source)
        return build(Recipe, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML can hold, without those at their defaults; Recipe.of takes them back."""
        rest = self.model_dump(mode="json", exclude_defaults=True, include=set(Recipe.model_fields) - {"stages"})
        stages = [{stage.name: stage.model_dump(mode="json", exclude_defaults=True)} for stage in self.stages]
        return {"stages": stages, **rest}
