"""prepare_qat_: the linear layers of a model, in place, become what trains for int8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from pycompress.convert import (
    Ranges,
    apply_edits,
    attention_rows,
    carry_marks,
    input_range,
    keep_uncalibrated,
    shape_of,
    unchanged_error,
)
from pycompress.fuse import Edit, fast_path_edits
from pycompress.nn import FakeQuantLinear, MaskedLinear
from pycompress.nn.float_linear import is_conv1d
from pycompress.ops import BACKENDS, MODES
from pycompress.report import described, grouped, starred
from pycompress.selection import OURS, FilterFn, Layer, ModuleMap, check_root, select
from pycompress.text_table import TextTable
from pycompress.tracing import Shadow

__all__ = ["QatLayer", "QatReport", "prepare_qat_"]

_OP = "prepare_qat_"


@dataclass(frozen=True)
class QatLayer:
    """One layer. `reason` says why it was left, or for a prepared one what else became of it."""

    name: str
    action: str  # "prepared" or "left"
    reason: str
    shape: tuple[int, ...]  # (outputs, inputs)
    mode: str = ""
    sparsity: float | None = None  # of its mask, where it has one
    aliases: tuple[str, ...] = ()  # further names of the same module


@dataclass(frozen=True)
class QatReport(TextTable):
    """The result of prepare_qat_. `print(report)` shows a table; rich shows the same one in colour."""

    mode: str
    layers: list[QatLayer] = field(default_factory=list)

    header: ClassVar[tuple[str, ...]] = ("layer", "count", "shape", "action", "mode", "sparsity", "why")
    right: ClassVar[frozenset[str]] = frozenset(("count", "sparsity"))

    @property
    def prepared(self) -> list[QatLayer]:
        return [layer for layer in self.layers if layer.action == "prepared"]

    @property
    def left(self) -> list[QatLayer]:
        return [layer for layer in self.layers if layer.action == "left"]

    def summary(self) -> str:
        """One line: how many layers were prepared and left."""
        masked = sum(layer.sparsity is not None for layer in self.prepared)
        masks = f" ({masked} with a mask)" if masked else ""
        counts = f"{len(self.prepared)} prepared{masks}, {len(self.left)} left as they were"
        return f"prepare_qat_ mode={self.mode}: {counts}"

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text; layers that differ only by a number in their name share one row."""
        return [_row(group) for group in grouped(self.layers, _alike)]

    def is_dim(self, row: tuple[str, ...]) -> bool:
        return row[self.header.index("action")] == "left"


def _alike(layer: QatLayer) -> tuple[object, ...]:
    return layer.action, starred(layer.reason), layer.shape, layer.mode, layer.sparsity


def _row(group: Sequence[QatLayer]) -> tuple[str, ...]:
    first = group[0]
    name, reason = described(group)
    sparsity = "" if first.sparsity is None else f"{first.sparsity:.4g}"
    return name, str(len(group)), "x".join(map(str, first.shape)), first.action, first.mode, sparsity, reason


def prepare_qat_(
    model: nn.Module,
    mode: str = "dynamic",
    *,
    calibration: Ranges | None = None,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    backend: str = "auto",
) -> QatReport:
    """Make the linear layers of `model` FakeQuantLinear, in place, and say what was done: then train, then quantize_.

    They compute what Int8Linear will, and pass the gradient straight through the rounding to their float weights.
    These stay the same parameters, so an optimizer goes on with them; Hugging Face's Conv1D gets a new one, so make the
    optimizer afterwards where there are any. An activation that quantize_ folds into the kernel stays a module of its
    own until then.

    model: as for quantize_; layers that prune_ made MaskedLinear too, which keep their mask. Layers that a swap would
        break are left as they are; the report names each with its reason.
    mode: "dynamic" (activations int8, a scale per token), "static" (a fixed range; needs `calibration`) or
        "weight_only" (activations stay float).
    calibration: the result of pycompress.calibrate, for mode="static"; layers it never reached are left.
    skip, filter_fn: as for quantize_.
    backend: of the new layers; see FakeQuantLinear.

    Raises TypeError or ValueError for a bad argument. Whenever it raises, the model is what it was.
    """
    _check_arguments(model, mode, calibration, backend)
    modules = ModuleMap(model)
    layers = select(
        modules, Shadow(model, opaque=OURS), op=_OP, skip=skip, filter_fn=filter_fn, takes=(MaskedLinear,)
    )
    if calibration is not None:
        layers = keep_uncalibrated(layers, layers, calibration, _OP)
    chosen = [layer for layer in layers if not layer.reason]
    made = {layer.module: _prepared(layer, mode, calibration, backend) for layer in chosen}
    edits = [Edit(parent._modules, key, made[layer.module]) for layer in chosen for parent, key in layer.slots]
    edits += fast_path_edits(modules, set(made))
    apply_edits(edits)
    rows = [_report(layer, made.get(layer.module)) for layer in layers]
    rows += [QatLayer(row.name, "left", row.reason, row.shape) for row in attention_rows(modules)]
    return QatReport(mode, rows)


def _check_arguments(model: nn.Module, mode: str, calibration: Ranges | None, backend: str) -> None:
    check_root(model, _OP)
    if mode not in MODES:
        raise ValueError(f"{_OP}: unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    if backend not in BACKENDS:
        raise ValueError(f"{_OP}: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if mode == "static" and calibration is None:
        raise ValueError(
            f"{_OP}: mode='static' needs the range of each layer's input; "
            "pass calibration=pycompress.calibrate(model, batches)"
        )
    if mode != "static" and calibration is not None:
        raise ValueError(f"{_OP}: calibration is for mode='static'; mode={mode!r} would ignore it")
    if calibration is not None and not isinstance(calibration, Mapping):
        raise TypeError(f"{_OP}: calibration is a {type(calibration).__name__}; expected what calibrate() returns")


def _prepared(layer: Layer, mode: str, calibration: Ranges | None, backend: str) -> FakeQuantLinear:
    """What takes the layer's place; raises with its name if it cannot be made."""
    found = None if calibration is None else input_range(layer, calibration)
    try:
        new = FakeQuantLinear.from_float(layer.module, mode, input_range=found, backend=backend)
    except Exception as error:
        raise unchanged_error(_OP, layer, error) from error
    carry_marks(layer.module, new)
    return new


def _report(layer: Layer, new: FakeQuantLinear | None) -> QatLayer:
    shape, aliases = shape_of(layer.module), layer.names[1:]
    if new is None:
        return QatLayer(layer.name, "left", layer.reason, shape, aliases=aliases)
    why = "was a Conv1D; its weight is a new parameter, (outputs, inputs)" if is_conv1d(layer.module) else ""
    sparsity = None if new.mask is None else new.sparsity
    return QatLayer(layer.name, "prepared", why, shape, new.mode, sparsity, aliases)
