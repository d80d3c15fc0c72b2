"""What a conversion did to a model: one row a layer, the reasons, and the bytes before and after."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from pycompress.nn import Int8Linear
from pycompress.selection import memory_key

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = ("layer", "count", "shape", "action", "activation", "MB before", "MB after", "why")


@dataclass(frozen=True)
class LayerReport:
    """One layer. `reason` says why it was left, or for a swapped one why the activation was not folded in."""

    name: str
    action: str  # "swapped" or "left"
    reason: str
    shape: tuple[int, ...]  # (outputs, inputs)
    activation: str  # the one folded in, or ""
    bytes_before: int
    bytes_after: int
    aliases: tuple[str, ...] = ()  # further names of the same module


@dataclass(frozen=True)
class QuantizeReport:
    """The result of quantize_. `print(report)` shows a table; rich shows the same one in colour.

    bytes_before, bytes_after: everything the model holds, parameters and buffers, each piece of memory once.
    """

    mode: str
    bytes_before: int
    bytes_after: int
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def swapped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.action == "swapped"]

    @property
    def left(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.action == "left"]

    @property
    def fused(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.activation]

    def summary(self) -> str:
        """One line: how many layers were swapped, left and fused, and what it does to the model's size."""
        before, after = self.bytes_before, self.bytes_after
        ratio = f" ({before / after:.2f}x smaller)" if 0 < after < before else ""
        return (
            f"quantize_ mode={self.mode}: {len(self.swapped)} swapped, {len(self.left)} left as they were, "
            f"{len(self.fused)} with an activation folded in; model {_mb(before)} -> {_mb(after)} MB{ratio}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text; layers that differ only by a number in their name share one row."""
        groups: dict[tuple[object, ...], list[LayerReport]] = {}
        for layer in self.layers:
            key = (_starred(layer.name), layer.action, _starred(layer.reason), layer.shape, layer.activation)
            groups.setdefault(key, []).append(layer)
        return [_row(group) for group in groups.values()]

    def __str__(self) -> str:
        table = [_HEADER, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, self.summary()])

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.summary(), title_justify="left")
        for name in _HEADER:
            table.add_column(name, justify="right" if name in ("count", "MB before", "MB after") else "left")
        for row in self.rows():
            # Text, not str: a name or reason such as skip=['x'] is no markup.
            table.add_row(*map(Text, row), style="dim" if row[3] == "left" else "")
        return table


def _row(group: list[LayerReport]) -> tuple[str, ...]:
    first = group[0]
    name, reason = first.name, first.reason
    if len(group) > 1:
        name, reason = _starred(name), _starred(reason)
    elif first.aliases:
        name += f" (= {', '.join(first.aliases)})"
    before, after = sum(g.bytes_before for g in group), sum(g.bytes_after for g in group)
    shape = "x".join(map(str, first.shape))
    return name, str(len(group)), shape, first.action, first.activation, _mb(before), _mb(after), reason


def _starred(text: str) -> str:
    """The text with the numbers of a qualified name as stars: layers.*.linear1."""
    return re.sub(r"(?<![^\s.])\d+(?=\.|$)", "*", text)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}" if size >= 1e5 else f"{size / 1e6:.4f}"


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers at rest, shared ones once; an Int8Linear counts as packed."""
    total = 0
    seen: set[tuple[object, ...]] = set()
    for module in model.modules():
        if isinstance(module, Int8Linear):
            total += module.memory_bytes()
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or nn.parameter.is_lazy(tensor):
                continue
            if (key := memory_key(tensor)) not in seen:
                seen.add(key)
                total += tensor.numel() * tensor.element_size()
    return total
