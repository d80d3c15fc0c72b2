"""What sensitivity measured: a table, a plot, JSON, and the choice of a mode for each layer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pycompress.calibration import Batch, check_batches
from pycompress.convert import FLOAT, REST
from pycompress.nn.quantized_linear import BIT4_MODES, LINEAR_MODES
from pycompress.report import megabytes
from pycompress.selection import OURS, ModuleMap, select
from pycompress.sensitivity_measure import Error, OutputFn, Trial
from pycompress.text_table import TextTable
from pycompress.tracing import Shadow

_FORMAT = "pycompress.sensitivity"
_VERSION = 1


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer: the error of the model's output with it alone quantised, and its bytes, by mode."""

    name: str
    shape: tuple[int, ...]  # (outputs, inputs)
    bytes_before: int
    errors: Mapping[str, Error]
    bytes_after: Mapping[str, int]

    def error(self, mode: str) -> float:
        """1 - cosine."""
        return 0.0 if mode == FLOAT else self.errors[mode].cosine

    def bytes(self, mode: str) -> int:
        return self.bytes_before if mode == FLOAT else self.bytes_after[mode]


class Choice(dict[str, str]):
    """{layer: mode} for quantize_, with "*": "float" for the layers that were not measured.

    cosine: the mean, measured with all layers in their modes. share: of the linear layers' bytes before.
    """

    def __init__(self, modes: Mapping[str, str], cosine: float, share: float) -> None:
        super().__init__({REST: FLOAT, **modes})
        self.cosine, self.share = cosine, share

    def summary(self) -> str:
        """One line: how many layers have which mode, what was reached, and in how many bytes."""
        modes = [mode for name, mode in self.items() if name != REST]
        counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes))
        return f"{counts}: mean cosine {self.cosine:.6f} at {self.share:.3f} of the linear layers' bytes"


class TargetNotReachedError(ValueError):
    """No choice within the bytes reaches the target; `best` is what came nearest."""

    def __init__(self, message: str, best: Choice) -> None:
        super().__init__(message)
        self.best = best


@dataclass(frozen=True)
class SensitivityReport(TextTable):
    """The result of sensitivity. `print(report)` shows a table, the most sensitive layer first.

    modes: those measured, in the order that they were given. other_bytes: of the linear layers that were not measured.
    """

    modes: tuple[str, ...]
    layers: list[LayerSensitivity] = field(default_factory=list)
    other_bytes: int = 0
    _trials: list[Trial] = field(default_factory=list, repr=False, compare=False)

    @property
    def header(self) -> tuple[str, ...]:  # type: ignore[override]  # a class variable elsewhere: here there is a column a mode
        errors = (f"{what}, {mode}" for mode in self.modes for what in ("1 - cosine", "rel. L2"))
        return "layer", "shape", *errors, "MB before", "MB int8"

    @property
    def right(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.header[2:])

    @property
    def by_error(self) -> list[LayerSensitivity]:
        """Of the first mode, the greatest first."""
        return sorted(self.layers, key=lambda layer: -layer.error(self.modes[0]))

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                *(f"{e:.2e}" for mode in self.modes for e in (layer.errors[mode].cosine, layer.errors[mode].l2)),
                megabytes(layer.bytes_before),
                megabytes(layer.bytes(self.modes[0])),
            )
            for layer in self.by_error
        ]

    def summary(self) -> str:
        """One line: how many layers were measured, and which is the worst."""
        worst = self.by_error[0]
        return (
            f"sensitivity: {len(self.layers)} layers, each quantised alone; the worst in mode {self.modes[0]} is "
            f"{worst.name}, 1 - cosine {worst.error(self.modes[0]):.2e}"
        )

    def plot(self, path: str | os.PathLike[str], *, most: int = 40) -> None:
        """Write a picture of the errors of the `most` sensitive layers (PNG or SVG by the suffix); needs matplotlib."""
        from pycompress.sensitivity_plot import plot

        plot(self, path, most)

    # --- a mode for each layer ---

    def remember(self, trial: Trial) -> None:
        """The model and batches that `choose` goes on with."""
        self._trials[:] = [trial]

    def choose(
        self,
        target: float,
        gentler: Sequence[str] = ("weight_only", FLOAT),
        max_bytes: float = 1.0,
        *,
        model: nn.Module | None = None,
        batches: Iterable[Batch] = (),
        output_fn: OutputFn | None = None,
    ) -> Choice:
        """A mode for each layer, {name: mode}: the first of `modes`, but for the most sensitive ones a gentler one.

        target: of the mean cosine of the model's output. One layer after the other, that whose error is then the
            greatest, goes to the next mode of `gentler`, until the model with all of them quantised (the errors do not
            add up) reaches it on the same batches. A step that lowers no error, or goes beyond max_bytes, is left out.
        max_bytes: what the linear layers may take, as a share of their bytes before; those that cannot be quantised,
            and those skipped, count.
        model, batches, output_fn: for a report read from JSON, which remembers none; as for sensitivity.

        Raises TargetNotReachedError, with the best choice as its `best`, where the target is out of reach. The model is
        not changed.
        """
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
            raise ValueError(f"choose: target={target!r}; expected a mean cosine above 0, at most 1")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, (int, float)) or not 0 < max_bytes <= 1:
            raise ValueError(f"choose: max_bytes={max_bytes!r}; expected a share above 0, at most 1")
        ladder = self._ladder(gentler)
        trial = self._trial(model, batches, output_fn)
        try:
            return _climb(self, trial, ladder, float(target), float(max_bytes))
        finally:
            trial.forget()

    def _ladder(self, gentler: Sequence[str]) -> tuple[str, ...]:
        rungs = (gentler,) if isinstance(gentler, str) else tuple(gentler)
        known = (*self.modes, FLOAT)
        for mode in rungs:
            if mode not in known:
                raise ValueError(
                    f"choose: gentler holds {mode!r}; expected some of {', '.join(known)}"
                    + (f"; measure it: sensitivity(..., modes={(*self.modes, mode)})" if mode in LINEAR_MODES else "")
                )
        return (self.modes[0], *(mode for mode in rungs if mode != self.modes[0]))

    def _trial(self, model: nn.Module | None, batches: Iterable[Batch], output_fn: OutputFn | None) -> Trial:
        if model is None:
            if not self._trials:
                raise ValueError("choose: this report was read from JSON; pass model=... and batches=...")
            return self._trials[0]
        check_batches(batches, "choose")
        kept = list(batches)
        if not kept:
            raise ValueError("choose: batches is empty; pass at least one (is it a generator that is used up?)")
        if "static" in self.modes:
            raise ValueError("choose: static mode needs a calibration; measure sensitivity again on this model")
        int8 = not any(mode in BIT4_MODES for mode in self.modes)
        found = select(ModuleMap(model), Shadow(model, opaque=OURS), op="choose", keeps_weight=int8)
        layers = {layer.name: layer for layer in found if not layer.reason}
        missing = [layer.name for layer in self.layers if layer.name not in layers]
        if missing:
            raise ValueError(f"choose: the model has no layer {missing[0]!r} to quantise; it is not the one measured")
        return Trial(model, kept, layers, output_fn, None, "auto")

    # --- JSON ---

    def to_json(self) -> str:
        layers = [
            {
                "name": layer.name,
                "shape": layer.shape,
                "bytes": layer.bytes_before,
                "modes": {
                    mode: {
                        "cosine": _finite(layer.errors[mode].cosine),
                        "l2": _finite(layer.errors[mode].l2),
                        "bytes": layer.bytes_after[mode],
                    }
                    for mode in self.modes
                },
            }
            for layer in self.layers
        ]
        content = {"format": _FORMAT, "version": _VERSION, "modes": self.modes, "other_bytes": self.other_bytes}
        return json.dumps({**content, "layers": layers}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SensitivityReport:
        """Raises ValueError on anything that to_json did not write."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"SensitivityReport: not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"SensitivityReport: no {_FORMAT!r} file; expected one written by SensitivityReport.save")
        if content.get("version") != _VERSION:
            raise ValueError(f"SensitivityReport: version is {content.get('version')!r}; expected {_VERSION}")
        try:
            modes = tuple(content["modes"])
            layers = [_layer_of(row, modes) for row in content["layers"]]
            if not layers or not modes or not all(mode in LINEAR_MODES for mode in modes):
                raise ValueError(f"modes are {modes}, {len(layers)} layers")
            return cls(modes, layers, int(content["other_bytes"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"SensitivityReport: the file is damaged ({error}); measure and save again") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityReport:
        with open(path, encoding="utf-8") as file:
            return cls.from_json(file.read())


def _climb(report: SensitivityReport, trial: Trial, ladder: tuple[str, ...], target: float, max_bytes: float) -> Choice:
    """Steps to gentler modes, the greatest error first, until the assembled model reaches the target."""
    layers = {layer.name: layer for layer in report.layers}
    chosen = dict.fromkeys(layers, ladder[0])
    before = report.other_bytes + sum(layer.bytes_before for layer in report.layers)

    def measured(modes: Mapping[str, str]) -> Choice:
        size = report.other_bytes + sum(layer.bytes(modes[layer.name]) for layer in report.layers)
        return Choice(modes, 1.0 - trial.error(modes).cosine, size / before)

    best = now = measured(chosen)
    steps = {name: list(ladder[1:]) for name in layers}
    fits = now.share <= max_bytes
    while fits and now.cosine < target and any(steps.values()):
        name = max((name for name in steps if steps[name]), key=lambda name: layers[name].error(chosen[name]))
        layer, mode = layers[name], steps[name].pop(0)
        grown = (layer.bytes(mode) - layer.bytes(chosen[name])) / before
        if layer.error(mode) < layer.error(chosen[name]) and now.share + grown <= max_bytes:
            chosen[name] = mode
            now = measured(chosen)
            best = max(best, now, key=lambda choice: choice.cosine)
    if fits and now.cosine >= target:
        return now
    why = f"all of them in mode {ladder[0]} take {now.share:.3f}" if not fits else f"at best: {best.summary()}"
    raise TargetNotReachedError(
        f"choose: no choice reaches a mean cosine of {target:g} with at most {max_bytes:g} of the linear layers' "
        f"bytes; {why}. Lower the target, allow more bytes, or smooth_ the model first",
        best,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _layer_of(row: dict[str, Any], modes: tuple[str, ...]) -> LayerSensitivity:
    def number(value: Any) -> float:
        return math.inf if value is None else float(value)

    entries = {mode: row["modes"][mode] for mode in modes}
    errors = {mode: Error(number(entry["cosine"]), number(entry["l2"])) for mode, entry in entries.items()}
    sizes = {mode: int(entry["bytes"]) for mode, entry in entries.items()}
    return LayerSensitivity(str(row["name"]), tuple(map(int, row["shape"])), int(row["bytes"]), errors, sizes)
