"""What smooth_ did: one row a layer, where its factors went, and the reasons of what was left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pycompress.report import described, grouped, starred
from pycompress.text_table import TextTable


@dataclass(frozen=True)
class SmoothedLayer:
    """One layer. `reason` says why it was left, or for a scaled one why nothing before it could take the factors in."""

    name: str
    action: str  # "folded", "scaled" (by a ChannelScale) or "left"
    reason: str
    shape: tuple[int, ...]  # (outputs, inputs)
    into: str = ""  # what divides its input by the factors: the name of a norm or linear layer, or "a ChannelScale"
    least: float = 1.0  # of the factors of its columns
    greatest: float = 1.0
    aliases: tuple[str, ...] = ()  # further names of the same module


@dataclass(frozen=True)
class SmoothReport(TextTable):
    """The result of smooth_. `print(report)` shows a table; rich shows the same one in colour."""

    alpha: float
    where: str
    layers: list[SmoothedLayer] = field(default_factory=list)

    header: ClassVar[tuple[str, ...]] = ("layer", "count", "shape", "action", "into", "factors", "why")
    right: ClassVar[frozenset[str]] = frozenset(("count", "factors"))

    @property
    def folded(self) -> list[SmoothedLayer]:
        return [layer for layer in self.layers if layer.action == "folded"]

    @property
    def scaled(self) -> list[SmoothedLayer]:
        return [layer for layer in self.layers if layer.action == "scaled"]

    @property
    def left(self) -> list[SmoothedLayer]:
        return [layer for layer in self.layers if layer.action == "left"]

    def summary(self) -> str:
        """One line: how many layers were smoothed at no cost, at the cost of a ChannelScale, and left."""
        return (
            f"smooth_ alpha={self.alpha:g} where={self.where}: {len(self.folded)} folded, {len(self.scaled)} with a "
            f"ChannelScale, {len(self.left)} left as they were"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text; layers that differ only by a number in their name share one row."""
        return [_row(group) for group in grouped(self.layers, _alike)]

    def is_dim(self, row: tuple[str, ...]) -> bool:
        return row[self.header.index("action")] == "left"


def _alike(layer: SmoothedLayer) -> tuple[object, ...]:
    return layer.action, starred(layer.into), starred(layer.reason), layer.shape


def _row(group: Sequence[SmoothedLayer]) -> tuple[str, ...]:
    first = group[0]
    name, reason = described(group)
    into = starred(first.into) if len(group) > 1 else first.into
    factors = ""
    if first.action != "left":
        factors = f"{min(layer.least for layer in group):.3g}..{max(layer.greatest for layer in group):.3g}"
    return name, str(len(group)), "x".join(map(str, first.shape)), first.action, into, factors, reason
