"""What was pruned: one row a layer, its sparsity in weights and in units, and the reasons of what was left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from pycompress.convert import attention_rows, shape_of
from pycompress.nn import MaskedLinear
from pycompress.nn.float_linear import is_conv1d
from pycompress.pruning.choose import HeadNames
from pycompress.pruning.patterns import Pattern
from pycompress.pruning.swap import Found, masked_layers
from pycompress.report import described, grouped, starred
from pycompress.text_table import TextTable


@dataclass(frozen=True)
class PrunedLayer:
    """One layer. `reason` says why it was left, or for a pruned one what else became of it."""

    name: str
    action: str  # "pruned" or "left"
    reason: str
    shape: tuple[int, ...]  # (outputs, inputs)
    pattern: str = ""
    kept: int = 0  # weights
    total: int = 0
    pruned_units: int = 0  # of N:M the groups that hold no more than N
    units: int = 0
    aliases: tuple[str, ...] = ()  # further names of the same module

    @property
    def sparsity(self) -> float:
        """The fraction of its weights that are pruned."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    @property
    def unit_sparsity(self) -> float:
        return self.pruned_units / self.units if self.units else 0.0


@dataclass(frozen=True)
class PruneReport(TextTable):
    """The result of prune_. `print(report)` shows a table; rich shows the same one in colour."""

    pattern: str
    method: str
    scope: str
    layers: list[PrunedLayer] = field(default_factory=list)

    header: ClassVar[tuple[str, ...]] = (
        "layer", "count", "shape", "action", "pattern", "sparsity", "units", "kept", "weights", "why",
    )  # fmt: skip
    right: ClassVar[frozenset[str]] = frozenset(("count", "sparsity", "units", "kept", "weights"))

    @property
    def pruned(self) -> list[PrunedLayer]:
        return [layer for layer in self.layers if layer.action == "pruned"]

    @property
    def left(self) -> list[PrunedLayer]:
        return [layer for layer in self.layers if layer.action == "left"]

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.pruned)

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.pruned)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights of all pruned layers that are pruned."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    def summary(self) -> str:
        """One line: how many layers were pruned and left, and how many weights are kept."""
        return (
            f"prune_ pattern={self.pattern} method={self.method} scope={self.scope}: {len(self.pruned)} pruned, "
            f"{len(self.left)} left as they were; sparsity {self.sparsity:.4g}, {self.kept} of {self.total} "
            "weights kept"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text; layers that differ only by a number in their name share one row."""
        return [_row(group) for group in grouped(self.layers, _alike)]

    def is_dim(self, row: tuple[str, ...]) -> bool:
        return row[self.header.index("action")] == "left"


def _alike(layer: PrunedLayer) -> tuple[object, ...]:
    return layer.action, starred(layer.reason), layer.shape, layer.pattern


def _row(group: Sequence[PrunedLayer]) -> tuple[str, ...]:
    first = group[0]
    name, reason = described(group)
    shape = "x".join(map(str, first.shape))
    if first.action == "left":
        return name, str(len(group)), shape, first.action, "", "", "", "", "", reason
    weights = _span([layer.sparsity for layer in group])
    units = f"{sum(layer.pruned_units for layer in group)}/{sum(layer.units for layer in group)}"
    kept, total = sum(layer.kept for layer in group), sum(layer.total for layer in group)
    return name, str(len(group)), shape, first.action, first.pattern, weights, units, str(kept), str(total), reason


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}..{high}"


def make_report(
    found: Found, made: Mapping[str, MaskedLinear], pattern: Pattern, method: str, scope: str
) -> PruneReport:
    """The report of a model's linear layers, those in `made` with the mask they have now."""
    in_heads = {name: attention for attention in found.heads for name in attention.names}
    rows = []
    for layer in found.layers:
        module = made.get(layer.name)
        if module is None:
            shape = shape_of(layer.module)
            rows.append(PrunedLayer(layer.name, "left", layer.reason, shape, aliases=layer.names[1:]))
            continue
        turned = is_conv1d(layer.module)
        reason = "was a Conv1D; its weight is a new parameter, (outputs, inputs)" if turned else ""
        rows.append(_pruned(layer.name, module, pattern, in_heads.get(layer.name), reason, layer.names[1:]))
    rows += [PrunedLayer(row.name, "left", row.reason, row.shape) for row in attention_rows(found.modules)]
    return PruneReport(pattern.text, method, scope, rows)


def report_of(
    model: nn.Module, pattern: str | Pattern = "unstructured", method: str = "magnitude", scope: str = "layer"
) -> PruneReport:
    """The masks of a model as they are: a row for each of its MaskedLinear layers, none for the others."""
    parsed = Pattern.parse(pattern)
    rows = [_pruned(name, module, parsed, None, "", ()) for name, module in masked_layers(model).items()]
    return PruneReport(parsed.text, method, scope, rows)


def _pruned(
    name: str,
    module: MaskedLinear,
    pattern: Pattern,
    attention: HeadNames | None,
    reason: str,
    aliases: tuple[str, ...],
) -> PrunedLayer:
    mask = module.mask
    pruned, units = _count_units(pattern, mask, attention, name)
    kept = int(mask.sum())
    shape = (module.out_features, module.in_features)
    return PrunedLayer(name, "pruned", reason, shape, pattern.text, kept, mask.numel(), pruned, units, aliases)


def _count_units(pattern: Pattern, mask: Tensor, attention: HeadNames | None, name: str) -> tuple[int, int]:
    """(pruned units, units) of a mask; of a head without its attention, its rows."""
    if pattern.kind == "n:m":
        kept = pattern.kept_of_groups(mask)
        return int((kept <= pattern.keep[0]).sum()), kept.numel()
    if attention is not None:
        dim = 1 if name == attention.output else 0
        kept = mask.any(1 - dim).view(attention.heads, -1).any(1)
    elif pattern.kind == "head":
        kept = mask.any(1)
    else:
        kept = pattern.unit_scores(mask.float()) > 0
    return int((~kept).sum()), kept.numel()
