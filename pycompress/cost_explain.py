"""What a SparseLinear chose and what it takes: the table behind `SparseLinear.explain()`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from pycompress.cost_calibration import least_times, runner, variant
from pycompress.cost_core import DEFAULT_TOKENS, CostModel, Shape, describe_choice, form_at
from pycompress.text_table import TextTable

if TYPE_CHECKING:
    from pycompress.cost_target import CpuTarget
    from pycompress.nn import SparseLinear


@dataclass(frozen=True)
class ExplainedTokens:
    """One number of tokens. Times in seconds; None where nothing was measured."""

    m: int
    form: str  # the one that runs: "bitmap", "index" or "dense"
    predicted: float
    measured: float | None
    dense_predicted: float
    dense_measured: float | None
    why: str


@dataclass(frozen=True)
class Explanation(TextTable):
    """The result of SparseLinear.explain(). `print(explanation)` shows a table; rich shows the same one."""

    layer: str
    shape: Shape
    choice: str
    figures: str  # where the predictions come from
    tokens: list[ExplainedTokens] = field(default_factory=list)

    header: ClassVar[tuple[str, ...]] = (
        "M", "form", "us predicted", "us measured", "dense us predicted", "dense us measured", "why",
    )  # fmt: skip
    right: ClassVar[frozenset[str]] = frozenset(header) - {"form", "why"}

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (str(t.m), t.form, *map(_us, (t.predicted, t.measured, t.dense_predicted, t.dense_measured)), t.why)
            for t in self.tokens
        ]

    def summary(self) -> str:
        return f"{self.layer}: {self.choice}; predictions from {self.figures}"


def _us(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    us = seconds * 1e6
    return f"{us:,.0f}".replace(",", " ") if us >= 100 else f"{us:.3g}"


def explain_layer(
    layer: SparseLinear, tokens: Sequence[int] | None = None, measure: bool = True, model: CostModel | None = None
) -> Explanation:
    """What `layer` runs for each number of tokens, and what it and its dense counterpart take.

    measure: also time both, a few milliseconds each; not where kernels are emulated or interpreted.

    Raises:
        ValueError: tokens that are not positive integers, or a layer on the meta device.
    """
    from pycompress.cost_model import model_for
    from pycompress.cost_target import check_model, target_of

    given = DEFAULT_TOKENS if tokens is None else tokens
    tokens = tuple(given) if isinstance(given, Iterable) else ()
    if not tokens or not all(isinstance(m, int) and m >= 1 for m in tokens):
        raise ValueError(f"SparseLinear.explain: tokens={given!r}; expected a sequence of integers, each at least 1")
    target = target_of(layer)
    check_model(model, target)
    shape = target.shape(layer)
    model = model or model_for(layer)
    # Elsewhere, as on the meta device, no form is read.
    measure = measure and target.can_measure and layer.weight_bitmap.device.type == target.device_type
    dense, clock = (variant(layer, "dense", shape.dense), target.clock()) if measure else (None, time.perf_counter)
    found = []
    for m in tokens:
        form = form_at(layer.choice, m)
        taken: dict[str, float] = {}
        if dense is not None:
            x = target.activations(m, layer.in_features, shape.dense)
            with torch.no_grad():
                taken = least_times({"layer": runner(layer, x), "dense": runner(dense, x)}, rounds=8, clock=clock)
        predicted = {f: model.predict(f, m, shape) for f in dict.fromkeys((form, "dense"))}
        found.append(
            ExplainedTokens(
                *(m, form, predicted[form], taken.get("layer"), predicted["dense"], taken.get("dense")),
                _why(layer, form, m, predicted, model, target, shape),
            )
        )
    name = f"SparseLinear {shape.n}x{shape.k} {shape.dtype}, sparsity {shape.sparsity:.3g}"
    return Explanation(name, shape, describe_choice(layer.choice), target.figures(model, shape), found)


def _why(
    layer: SparseLinear, form: str, m: int, predicted: dict[str, float], model: CostModel, target: CpuTarget,
    shape: Shape,
) -> str:  # fmt: skip
    if layer.backend == "reference":
        return "backend='reference' unpacks the weight for each call"
    if layer.format != "auto":
        return f"format={layer.format!r} was asked for"
    known = "measured on this layer" if model.is_corrected(form, m, shape) else target.predicted(model, shape)
    if form != "dense":
        return f"{known} {predicted['dense'] / predicted[form]:.2f}x as fast as dense"
    others = {f: model.predict(f, m, shape) for f in ("bitmap", "index") if model.knows(f, shape)}
    name = min(others, key=lambda f: others[f])
    return f"{name} is {known} to take {others[name] / predicted['dense']:.2f}x as long"
