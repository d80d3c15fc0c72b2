"""``shrink_``: what was pruned as a whole becomes smaller dense layers, with the same outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from pycompress.convert import apply_edits, carry_marks
from pycompress.fuse import Edit, activation_name, fast_path_edits
from pycompress.nn import MaskedLinear
from pycompress.pruning.shrink_find import Pair, find_pairs, has_hooks, is_shrinkable_type
from pycompress.pruning.shrink_heads import HeadGroup, find_heads, head_edits, shrink_heads
from pycompress.pruning.shrink_layers import Draft, shrink_pair
from pycompress.report import megabytes, model_bytes, starred
from pycompress.selection import OURS, ModuleMap, check_root, memory_key, relative_name
from pycompress.text_table import TextTable
from pycompress.tracing import Shadow

__all__ = ["ShrinkReport", "ShrinkRow", "shrink_"]

_ENTRIES = frozenset(("weight", "bias", "mask"))
_FUSED = {"relu": 1, "gelu": 2}  # activation_relu_or_gelu; the kernel's gelu is not gelu_tanh
_OTHERS = {"outputs": "reads", "inputs": "computes"}


@dataclass(frozen=True)
class ShrinkRow:
    """One place where units can go, or a layer whose pruned ones have to stay; `reason` says why."""

    name: str
    kind: str  # "units", "heads", or for a layer "outputs" or "inputs"
    before: int
    after: int
    reason: str = ""

    @property
    def action(self) -> str:
        return "shrunk" if self.after < self.before else "left"


@dataclass(frozen=True)
class ShrinkReport(TextTable):
    """The result of shrink_. `print(report)` shows a table; rich shows the same one in colour."""

    bytes_before: int
    bytes_after: int
    places: list[ShrinkRow] = field(default_factory=list)

    header: ClassVar[tuple[str, ...]] = ("place", "count", "what", "before", "after", "action", "why")
    right: ClassVar[frozenset[str]] = frozenset(("count", "before", "after"))

    @property
    def shrunk(self) -> list[ShrinkRow]:
        return [place for place in self.places if place.action == "shrunk"]

    @property
    def left(self) -> list[ShrinkRow]:
        return [place for place in self.places if place.action == "left"]

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text; places that differ only by a number in their name share one row."""
        groups: dict[tuple[object, ...], list[ShrinkRow]] = {}
        for place in self.places:
            key = (starred(place.name), place.kind, place.before, place.after, place.reason)
            groups.setdefault(key, []).append(place)
        rows: list[tuple[str, ...]] = []
        for group in groups.values():
            first = group[0]
            name = starred(first.name) if len(group) > 1 else first.name
            sizes = str(first.before), str(first.after)
            rows.append((name, str(len(group)), first.kind, *sizes, first.action, first.reason))
        return rows

    def is_dim(self, row: tuple[str, ...]) -> bool:
        return row[5] == "left"

    def summary(self) -> str:
        """One line: what went, and what it does to the model's size."""
        gone = {kind: sum(p.before - p.after for p in self.shrunk if p.kind == kind) for kind in ("units", "heads")}
        before, after = self.bytes_before, self.bytes_after
        ratio = f" ({before / after:.2f}x smaller)" if 0 < after < before else ""
        return (
            f"shrink_: {gone['units']} hidden units and {gone['heads']} attention heads removed in "
            f"{len(self.shrunk)} places; model {megabytes(before)} -> {megabytes(after)} MB{ratio}"
        )


def shrink_(model: nn.Module) -> ShrinkReport:
    """Remove from `model`, in place, the hidden units and attention heads that are pruned as a whole.

    What goes are units between two linear layers with an elementwise activation between them (the feed-forward
    blocks of nn.TransformerEncoder and of Hugging Face models, nn.Sequential(Linear, ReLU, Linear), or the like in a
    forward of your own), and attention heads of Hugging Face's BERT family and of nn.MultiheadAttention. A unit goes
    where its row in the first layer is all zero, whether a mask or the weight itself says so, or its column in the
    second; a head where its columns in the output projection are all zero, or its rows in the value projection.

    In eval the outputs stay what they were, up to rounding: a unit without weights still has the value
    activation(bias), and a head without values the value's bias, because attention weights add up to 1 wherever a
    token sees any other; that part is added to the next layer's bias. In training dropout would have touched it.
    Where nothing of a mask is left to do, MaskedLinear becomes nn.Linear. One unit and one head always stay. Attention
    weights that a model returns are those of the heads that are left.

    The layers' parameters are new ones: make the optimizer after it. A Hugging Face config knows nothing of single
    layers' sizes: save the model itself with torch.save, since from_pretrained would build the old shapes.

    Raises TypeError or ValueError where `model` is no module, a scripted one, or itself a linear layer; the model is
    then what it was.
    """
    check_root(model, "shrink_")
    modules = ModuleMap(model)
    before = model_bytes(model)
    with torch.no_grad():
        plan = _Plan(modules)
        plan.run()
        edits, rows = plan.edits(), plan.report()
    apply_edits(edits)
    return ShrinkReport(before, model_bytes(model), rows)


class _Refusals:
    """Why a linear layer cannot be replaced by a smaller one."""

    def __init__(self, modules: ModuleMap) -> None:
        self._modules = modules
        self._holders: dict[tuple[object, ...], set[nn.Module]] = {}
        for module in modules.names:
            for tensor in module._parameters.values():
                if tensor is not None:
                    self._holders.setdefault(memory_key(tensor), set()).add(module)

    def of(self, module: nn.Module) -> str:
        """The reason, or nothing."""
        if not is_shrinkable_type(module):
            return f"is a {type(module).__name__}"
        if module in self._modules.aliases:
            return f"is also held in {self._modules.aliases[module]}"
        if has_hooks(module) or "forward" in module.__dict__:
            return "has hooks"
        if {*module._parameters, *module._buffers, *module._modules} - _ENTRIES:
            return "holds more than weight, bias and mask"
        for key, tensor in module._parameters.items():
            if tensor is None:
                continue
            if nn.parameter.is_lazy(tensor) or tensor.is_meta or type(tensor) is not nn.Parameter:
                return f"its {key} holds no values"
            if len(self._holders[memory_key(tensor)]) > 1 and tensor.numel():
                return f"its {key} is tied to another layer's"
        return "its weight is computed, not a parameter" if "weight" not in module._parameters else ""


class _Plan:
    """What becomes of each layer; nothing of the model is touched."""

    def __init__(self, modules: ModuleMap) -> None:
        self._modules, self._refusals = modules, _Refusals(modules)
        self._drafts: dict[nn.Module, Draft] = {}
        pairs = {(p.first, p.second): p for p in find_pairs(modules, Shadow(modules.model, opaque=OURS))}
        places: list[Pair | HeadGroup] = [*pairs.values(), *find_heads(modules)]
        self._reasons = {place: self._reason(place) for place in places}
        for place, reason in self._reasons.items():
            if not reason:
                self._drafts.update((layer, Draft(layer)) for layer in place.layers if layer not in self._drafts)

    def _reason(self, place: Pair | HeadGroup) -> str:
        if isinstance(place, HeadGroup) and isinstance(place.module, nn.MultiheadAttention):
            return place.reason  # its layers are no modules of the model
        for layer in place.layers:
            if reason := self._refusals.of(layer):
                return f"{relative_name(self._modules, self._modules.model, layer)} {reason}"
        return place.reason

    def _usable(self) -> list[Pair | HeadGroup]:
        return [place for place, reason in self._reasons.items() if not reason]

    def _of(self, place: Pair | HeadGroup) -> list[Draft]:
        return [self._drafts[layer] for layer in place.layers]

    def run(self) -> None:
        """Until nothing changes: a unit that goes may leave another one without readers, or without inputs."""
        changed = True
        while changed:
            changed = False
            for place in self._usable():
                drafts = self._of(place)
                if isinstance(place, Pair):
                    gone = shrink_pair(drafts[0], drafts[1], place.steps)
                else:
                    gone = shrink_heads(drafts, place.head_size)
                changed = changed or gone > 0

    def edits(self) -> list[Edit]:
        edits = []
        for module, draft in self._drafts.items():
            slots = self._modules.slots.get(module, [])  # none: a part of nn.MultiheadAttention
            if draft.is_changed and slots:
                new = draft.build()
                carry_marks(module, new)
                if type(new) is nn.Linear:
                    new.__dict__.pop("gradient", None)  # MaskedLinear's own
                edits += [Edit(parent._modules, key, new) for parent, key in slots]
        replaced: set[nn.Module] = set()
        for place in self._usable():
            if isinstance(place, HeadGroup) and self._of(place)[2].is_changed:
                edits += head_edits(place, self._of(place), self._modules)
                if isinstance(place.module, nn.MultiheadAttention):
                    replaced.add(place.module)
        return edits + self._fused_again() + fast_path_edits(self._modules, replaced)

    def _fused_again(self) -> list[Edit]:
        """Masks kept nn.TransformerEncoderLayer from its fused kernel (see fast_path_edits); without them it may."""
        edits = []
        for owner in self._modules.names:
            if isinstance(owner, nn.TransformerEncoderLayer) and owner.activation_relu_or_gelu == 0:
                drafts = [self._drafts.get(layer) for layer in (owner.linear1, owner.linear2)]
                masked = any(isinstance(layer, MaskedLinear) for layer in (owner.linear1, owner.linear2))
                kind = _FUSED.get(activation_name(owner.activation) or "")
                if masked and kind and all(draft is not None and draft.is_plain for draft in drafts):
                    edits.append(Edit(owner.__dict__, "activation_relu_or_gelu", kind))
        return edits

    def report(self) -> list[ShrinkRow]:
        """A row for each place, then one for each other layer with outputs or inputs that are all zero."""
        rows = []
        for place, reason in self._reasons.items():
            after = place.size if reason else _size(self._of(place), place)
            rows.append(ShrinkRow(place.name, place.kind, place.size, after, reason))
        return rows + self._left_over()

    def _left_over(self) -> list[ShrinkRow]:
        rows = []
        for module, names in self._modules.names.items():
            if not is_shrinkable_type(module) or self._refusals.of(module):
                continue
            draft = self._drafts.get(module) or Draft(module)
            for kind, zero in (("outputs", draft.zero_rows()), ("inputs", draft.zero_columns())):
                if count := int(zero.sum()):
                    why = f"{count} are all zero and stay: what {_OTHERS[kind]} them cannot shrink with them"
                    rows.append(ShrinkRow(names[0], kind, len(zero), len(zero), why))
        return rows


def _size(drafts: list[Draft], place: Pair | HeadGroup) -> int:
    """How many units or heads the place has now."""
    return len(drafts[0].rows) if isinstance(place, Pair) else len(drafts[2].rows) // place.head_size
