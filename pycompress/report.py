"""What a conversion did to a model: one row a layer, the reasons, and the bytes before and after."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from pycompress.layer_kinds import KINDS, OURS
from pycompress.nn import FakeQuantLinear, Int8MultiheadAttention, MaskedLinear
from pycompress.selection import memory_key
from pycompress.text_table import TextTable


@dataclass(frozen=True)
class LayerReport:
    """One layer. `reason` says why it was left, or for a swapped one why the activation was not folded in."""

    name: str
    action: str  # "swapped" or "left"; sparsify_ has more, see SparsifyReport
    reason: str
    shape: tuple[int, ...]  # (outputs, inputs)
    activation: str  # the one folded in, or ""
    bytes_before: int
    bytes_after: int
    aliases: tuple[str, ...] = ()  # further names of the same module


class ConversionReport(TextTable):
    """What quantize_ and sparsify_ report alike. A subclass is a dataclass with these fields and a summary."""

    bytes_before: int
    bytes_after: int
    layers: Sequence[LayerReport]

    header: ClassVar[tuple[str, ...]] = (
        "layer", "count", "shape", "action", "activation", "MB before", "MB after", "why",
    )  # fmt: skip
    right = frozenset(("count", "MB before", "MB after"))

    @property
    def swapped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.action == "swapped"]

    @property
    def left(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.action == "left"]

    @property
    def fused(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.activation]

    def sizes(self) -> str:
        """The part of the summary that says what became of the model's size."""
        before, after = self.bytes_before, self.bytes_after
        ratio = f" ({before / after:.2f}x smaller)" if 0 < after < before else ""
        return f"model {megabytes(before)} -> {megabytes(after)} MB{ratio}"

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text; layers that differ only by a number in their name share one row."""
        return [self.row(group) for group in grouped(self.layers, self.alike)]

    def alike(self, layer: LayerReport) -> tuple[object, ...]:
        """What layers of one row have in common besides their name."""
        return layer.action, starred(layer.reason), layer.shape, layer.activation

    def row(self, group: Sequence[LayerReport]) -> tuple[str, ...]:
        first = group[0]
        name, reason = described(group)
        before, after = sum(g.bytes_before for g in group), sum(g.bytes_after for g in group)
        sizes = megabytes(before), megabytes(after)
        return name, str(len(group)), "x".join(map(str, first.shape)), first.action, first.activation, *sizes, reason

    def is_dim(self, row: tuple[str, ...]) -> bool:
        return row[self.header.index("action")] == "left"


@dataclass(frozen=True)
class QuantizedLayerReport(LayerReport):
    """A row of quantize_'s report: a layer that was swapped."""

    mode: str = ""


@dataclass(frozen=True)
class OtherLayer(LayerReport):
    """A row of quantize_'s report: weights that are float and no layer that was asked for. action: "float".

    kind: the name in `layers` that would take it, or "" where none does.
    """

    kind: str = ""


@dataclass(frozen=True)
class QuantizeReport(ConversionReport):
    """The result of quantize_. `print(report)` shows a table; rich shows the same one in colour.

    mode: the one that was asked for, or "mixed"; `layers[i].mode` has that of each layer that was swapped.
    bytes_before, bytes_after: everything the model holds, parameters and buffers, each piece of memory once.
    others: float weights that are not of the kinds of layers that were asked for.
    """

    mode: str
    bytes_before: int
    bytes_after: int
    layers: list[LayerReport] = field(default_factory=list)
    others: list[OtherLayer] = field(default_factory=list)

    header: ClassVar[tuple[str, ...]] = (
        "layer", "count", "shape", "action", "mode", "activation", "MB before", "MB after", "why",
    )  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text: the layers, then the others."""
        return super().rows() + [self.row(group) for group in grouped(self.others, self.alike)]

    def is_dim(self, row: tuple[str, ...]) -> bool:
        return row[self.header.index("action")] != "swapped"

    def alike(self, layer: LayerReport) -> tuple[object, ...]:
        return *super().alike(layer), getattr(layer, "mode", "")

    def row(self, group: Sequence[LayerReport]) -> tuple[str, ...]:
        name, count, shape, action, *rest = super().row(group)
        return name, count, shape, action, getattr(group[0], "mode", ""), *rest

    def summary(self) -> str:
        """One line: how many layers were swapped, left and fused, and what it does to the model's size."""
        modes = Counter(getattr(layer, "mode", "") for layer in self.swapped)
        counts = f" ({', '.join(f'{n} {mode}' for mode, n in modes.items())})" if self.mode == "mixed" and modes else ""
        return (
            f"quantize_ mode={self.mode}: {len(self.swapped)} swapped{counts}, {len(self.left)} left as they were, "
            f"{len(self.fused)} with an activation folded in; {self.sizes()}{self._not_asked()}"
        )

    def _not_asked(self) -> str:
        counts = Counter(other.kind for other in self.others if other.kind)
        words = [f"{n} {kind.many if n > 1 else kind.one.split()[-1]}" for kind in KINDS if (n := counts[kind.name])]
        return f"; not asked for: {', '.join(words)} (layers='all' takes them)" if words else ""


@dataclass(frozen=True)
class SparseLayerReport(LayerReport):
    """A row of sparsify_'s report. action: "swapped" (SparseLinear), "dense" (stays, or becomes again, the dense
    layer), "int8 dense" (Int8Linear) or "left".

    times: (M, seconds of the dense layer, seconds of the layer now), as the cost model knows them.
    """

    sparsity: float | None = None
    choice: str = ""  # SparseLinear's formats in words
    times: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True)
class SparsifyReport(ConversionReport):
    """The result of sparsify_. `print(report)` shows a table; rich shows the same one in colour.

    bytes_before, bytes_after: in memory, as in QuantizeReport: the forms of a weight that its choice names included.
    state_bytes: what a checkpoint of the model holds, afterwards.
    The speed-up at each number of tokens M is the time of the dense layer (for int8 of the dense Int8Linear) over that
    of the layer in its place: predicted, or measured where the prediction was a tie. 1 is where the layer in place
    computes densely. `layers[i].times` holds the times.
    """

    dtype: str
    format: str
    bytes_before: int
    bytes_after: int
    layers: list[LayerReport] = field(default_factory=list)
    state_bytes: int = 0

    header: ClassVar[tuple[str, ...]] = (
        "layer", "count", "shape", "sparsity", "action", "format", "activation", "MB before", "MB after",
        "speed-up at M", "why",
    )  # fmt: skip

    @property
    def dense(self) -> list[LayerReport]:
        """The layers that hold zeros and are not sparse, because that would be slower."""
        return [layer for layer in self.layers if layer.action in ("dense", "int8 dense")]

    def summary(self) -> str:
        """One line: how many layers are sparse, dense, left and fused, and what it does to the model's size."""
        return (
            f"sparsify_ dtype={self.dtype} format={self.format}: {len(self.swapped)} swapped, {len(self.dense)} faster "
            f"dense, {len(self.left)} left as they were, {len(self.fused)} with an activation folded in; {self.sizes()}"
            f", checkpoint {megabytes(self.state_bytes)} MB"
        )

    def alike(self, layer: LayerReport) -> tuple[object, ...]:
        return *super().alike(layer), getattr(layer, "choice", "")

    def row(self, group: Sequence[LayerReport]) -> tuple[str, ...]:
        name, count, shape, action, activation, before, after, reason = super().row(group)
        sparse = [layer for layer in group if isinstance(layer, SparseLayerReport)]
        known = [layer.sparsity for layer in sparse if layer.sparsity is not None]
        low, high = (f"{min(known):.3g}", f"{max(known):.3g}") if known else ("", "")
        sparsity = low if low == high else f"{low}..{high}"
        choice, gains = (sparse[0].choice, _speed_ups(sparse)) if sparse else ("", "")
        return name, count, shape, sparsity, action, choice, activation, before, after, gains, reason


def _speed_ups(group: Sequence[SparseLayerReport]) -> str:
    """Of a row's layers together: `1: 2.3, 128: 4.1`; empty where none are known, or all is dense."""
    tokens = [m for m, _, _ in group[0].times]
    if any([m for m, _, _ in layer.times] != tokens for layer in group):
        return ""
    sums = [(m, *(sum(layer.times[i][j] for layer in group) for j in (1, 2))) for i, m in enumerate(tokens)]
    if all(dense == now for _, dense, now in sums):
        return ""
    return ", ".join(f"{m}: {'1' if dense == now else f'{dense / now:.2g}'}" for m, dense, now in sums)


class NamedLayer(Protocol):
    """What every report's rows have."""

    @property
    def name(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...


AnyLayer = TypeVar("AnyLayer", bound=NamedLayer)


def grouped(layers: Iterable[AnyLayer], alike: Callable[[AnyLayer], tuple[object, ...]]) -> list[list[AnyLayer]]:
    """The layers that share one row of a table: alike, with names that differ only by a number."""
    groups: dict[tuple[object, ...], list[AnyLayer]] = {}
    for layer in layers:
        groups.setdefault((starred(layer.name), *alike(layer)), []).append(layer)
    return list(groups.values())


def described(group: Sequence[NamedLayer]) -> tuple[str, str]:
    """Name and reason of such a row."""
    first = group[0]
    if len(group) > 1:
        return starred(first.name), starred(first.reason)
    return first.name + (f" (= {', '.join(first.aliases)})" if first.aliases else ""), first.reason


def starred(text: str) -> str:
    """The text with the numbers of a qualified name as stars: layers.*.linear1."""
    return re.sub(r"(?<![^\s.])\d+(?=\.|$)", "*", text)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}" if size >= 1e5 else f"{size / 1e6:.4f}"


_PACKED = tuple(kind for kind in OURS if kind not in (FakeQuantLinear, MaskedLinear, Int8MultiheadAttention))


def state_bytes(model: nn.Module) -> int:
    """Bytes of what a checkpoint of the model holds, shared memory once."""
    total = 0
    seen: set[tuple[object, ...]] = set()
    for module in model.modules():
        held = {**module._parameters, **module._buffers}
        if not isinstance(module, _PACKED):
            kept = {key: t for key, t in held.items() if key not in module._non_persistent_buffers_set}
            total += _bytes_of(kept.values(), seen)
            continue
        saved: dict[str, Any] = {}
        module._save_to_state_dict(saved, "", False)
        total += _bytes_of((held[key] for key in saved if key in held), seen)
        total += sum(tensor.nbytes for key, tensor in saved.items() if key not in held)  # unpacked for this
    return total


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers at rest, shared ones once; of layers that pack their weight as packed."""
    total = 0
    seen: set[tuple[object, ...]] = set()
    for module in model.modules():
        if isinstance(module, _PACKED):
            total += module.memory_bytes()  # type: ignore[operator]
        else:
            total += _bytes_of((*module._parameters.values(), *module._buffers.values()), seen)
    return total


def _bytes_of(tensors: Iterable[object], seen: set[tuple[object, ...]]) -> int:
    """Of those whose memory is not in `seen`, which grows."""
    total = 0
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor) or (key := memory_key(tensor)) in seen:
            continue
        seen.add(key)
        total += tensor.numel() * tensor.element_size()
    return total
