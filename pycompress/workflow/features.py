"""The terms on what lies inside the models: hidden states and attention maps, paired layer by layer.

"last" compares the last layers. "all" compares each of the student's layers with an evenly spaced one of the teacher's,
the last with the last (TinyBERT), so that the teacher's number of layers must be a multiple of the student's; hidden
states include what goes into the first layer. {student module: teacher module} compares what these modules return. A
term is the mean over its pairs, so that its weight means the same however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.nn.feature_losses import AttentionLoss, HiddenStateLoss
from pycompress.recipe.sections import Attention, Hidden
from pycompress.selection import closest
from pycompress.workflow import shares
from pycompress.workflow.batches import takes
from pycompress.workflow.outputs import describe, first_tensor, maps_of
from pycompress.workflow.shares import SAMPLES

_OP = "distillation"
_HIDDEN, _ATTENTION = ("hidden_states", "output_hidden_states"), ("attentions", "output_attentions")
_ROW_SUM_ERROR = 0.05  # bfloat16 maps sum to 1 within 2^-8; dropout of 0.1 misses it by far more


class Taps:
    """Hooks that keep what named modules return, while entered.

    The modules are found when it is entered: a stage may have put others in their places.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], side: str) -> None:
        self._model, self._names, self._side = model, tuple(dict.fromkeys(names)), side
        self._handles: list[Any] = []
        self._seen: dict[str, list[Any]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self._names:
            if not name or name not in modules:
                close = closest(name, [n for n in modules if n]) if name else []
                hint = f"; the closest names are {', '.join(map(repr, close))}" if close else ""
                raise ValueError(f"{_OP}: hidden.layers: the {side} has no module {name!r}{hint}")

    @property
    def entered(self) -> bool:
        return bool(self._handles)

    def __enter__(self) -> Taps:
        for name in self._names:
            self._handles.append(self._model.get_submodule(name).register_forward_hook(self._keeper(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def take(self) -> dict[str, Tensor]:
        """What the modules returned in the forward just done. Raises ValueError where one did not run exactly once."""
        found, self._seen = self._seen, {}
        for name in self._names:
            calls = found.get(name, [])
            if len(calls) != 1:
                raise ValueError(
                    f"{_OP}: hidden.layers: the {self._side}'s module {name!r} ran {len(calls)} times in one forward; "
                    "name one that runs once"
                )
            if first_tensor(calls[0]) is None:
                raise ValueError(
                    f"{_OP}: hidden.layers: the {self._side}'s module {name!r} returned a {describe(calls[0])}; "
                    "expected a tensor, or a tuple that begins with one"
                )
        return {name: first_tensor(found[name][0]) for name in self._names}  # type: ignore[misc]

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._seen.setdefault(name, []).append(output)

        return keep


def even_pairs(student: int, teacher: int, what: str) -> list[tuple[int, int]]:
    """(student layer, teacher layer), counted from 1. Raises ValueError unless the teacher's are a multiple."""
    if teacher % student:
        pairs = "give layers: {student module: teacher module}, or " if what == "hidden" else "use "
        raise ValueError(
            f"{_OP}: {what}.layers='all' with {student} layers of the student and {teacher} of the teacher, which "
            f"cannot be matched evenly; {pairs}layers: last"
        )
    return [(layer, layer * teacher // student) for layer in range(1, student + 1)]


class HiddenTerm(nn.Module):
    """Mean over the pairs of HiddenStateLoss, each with a learned projection where the widths differ."""

    def __init__(self, hidden: Hidden, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.weight, self.kind, self.layers = hidden.weight, hidden.kind, hidden.layers
        self.losses = nn.ModuleList()  # one a pair, made by `fit`, as the next
        self._counted: list[str] = []  # what a pair's mean is over
        self.taps: tuple[Taps, Taps] | None = None
        if isinstance(self.layers, Mapping):
            if not self.layers:
                raise ValueError(f"{_OP}: hidden.layers is empty; expected {{student module: teacher module}}")
            self.taps = Taps(student, self.layers.keys(), "student"), Taps(teacher, self.layers.values(), "teacher")
            self.ask: dict[str, bool] = {}
        else:
            self.ask = _ask(_HIDDEN, student, teacher, "layers: {student module: teacher module} takes any model")

    def fit(self, student: Any, teacher: Any, inputs: Any, mask: Tensor | None) -> None:
        """Makes the losses for models with these outputs. Raises ValueError where nothing can be compared."""
        for s, t in self._pairs(student, teacher):
            widths = [x.shape[-1] if x.dim() else 0 for x in (s, t)]
            loss = HiddenStateLoss(self.kind, student_dim=widths[0] or None, teacher_dim=widths[1] or None)
            self.losses.append(loss.to(s.device))
            tokens, of_sample = shares.unmasked(inputs)
            per_token = of_sample > 1 and s.shape[:-1].numel() == tokens
            self._counted.append(shares.MASK if _fitting(mask, s) is not None else shares.ALL if per_token else SAMPLES)
        self(student, teacher, mask)

    def forward(
        self, student: Any, teacher: Any, mask: Tensor | None, weights: Sequence[float] | None = None
    ) -> Tensor:
        """weights: of the pairs' means, 1 by default."""
        pairs = self._pairs(student, teacher)
        values = [loss(s, t, _fitting(mask, s)) for loss, (s, t) in zip(self.losses, pairs, strict=True)]
        return _mean(values, weights)

    def counts(self, inputs: Any, mask: Tensor | None) -> list[float]:
        """Of each pair the tokens that its mean is over."""
        known = {
            shares.MASK: shares.tokens(shares.MASK, None, inputs, mask),
            shares.ALL: shares.unmasked(inputs)[0],
            SAMPLES: shares.samples(inputs),
        }
        return [known[counted] for counted in self._counted]

    def _pairs(self, student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
        if self.taps is not None:
            assert isinstance(self.layers, Mapping)
            return [(student[s], teacher[t]) for s, t in self.layers.items()]
        of_student, of_teacher = _layers(student, _HIDDEN, "student", ""), _layers(teacher, _HIDDEN, "teacher", "")
        if self.layers == "last":
            return [(of_student[-1], of_teacher[-1])]
        pairs = even_pairs(len(of_student) - 1, len(of_teacher) - 1, "hidden")
        return [(of_student[s], of_teacher[t]) for s, t in [(0, 0), *pairs]]


class AttentionTerm(nn.Module):
    """Mean over the pairs of AttentionLoss; where the numbers of heads differ, of the means over the heads."""

    def __init__(self, attention: Attention, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.weight, self.layers = attention.weight, attention.layers
        self.match, self.mean = AttentionLoss(attention.kind), AttentionLoss(attention.kind, heads="mean")
        self.ask = _ask(_ATTENTION, student, teacher, "leave attention out")
        self._checked, self._pair_count = False, 0

    def fit(self, student: Any, teacher: Any, mask: Tensor | None) -> None:
        """Raises ValueError where nothing can be compared."""
        self(student, teacher, mask)
        self._pair_count = len(self._pairs(student, teacher))

    def forward(
        self, student: Any, teacher: Any, mask: Tensor | None, weights: Sequence[float] | None = None
    ) -> Tensor:
        """weights: of the pairs' means, 1 by default."""
        pairs = self._pairs(student, teacher)
        if torch.is_grad_enabled() and not self._checked:
            self._check_rows(pairs[0][0], mask)
            self._checked = True
        values = []
        for s, t in pairs:
            loss = self.match if s.dim() < 2 or t.dim() < 2 or s.shape[1] == t.shape[1] else self.mean
            fits = mask is not None and s.shape[-2:] == (mask.shape[-1],) * 2
            values.append(loss(s, t, mask if fits else None))
        return _mean(values, weights)

    def counts(self, inputs: Any, mask: Tensor | None) -> list[float]:
        """Of each pair the queries, or pairs of query and key, that its mean is over."""
        squared = self.match.kind == "mse"
        if mask is not None:
            lengths = (mask != 0).sum(-1)
            count = float((lengths.square() if squared else lengths).sum())
        else:
            tokens, of_sample = shares.unmasked(inputs)
            count = tokens * of_sample if squared else tokens
        return [count] * self._pair_count

    def _pairs(self, student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
        remedy = "; load the model with attn_implementation='eager', other kinds of attention return no maps"
        maps = [_layers(o, _ATTENTION, side, remedy) for o, side in ((student, "student"), (teacher, "teacher"))]
        if self.layers == "last":
            return [(maps[0][-1], maps[1][-1])]
        pairs = even_pairs(len(maps[0]), len(maps[1]), "attention")
        return [(maps[0][s - 1], maps[1][t - 1]) for s, t in pairs]

    def _check_rows(self, maps: Tensor, mask: Tensor | None) -> None:
        """Models return maps after dropout; a student's 0 where the teacher has mass would be a loss of 87 nats."""
        if self.match.kind != "kl":
            return
        sums = maps.detach().float().sum(-1)
        if mask is not None and sums.shape[-1] == mask.shape[-1]:
            sums = sums[mask[:, None].expand_as(sums) != 0]
        if bool(((sums - 1).abs() > _ROW_SUM_ERROR).any()):
            raise ValueError(
                f"{_OP}: attention.kind='kl' with attention maps of the student whose rows do not sum to 1: dropout "
                "has changed them; load the student with attention_probs_dropout_prob=0, or use kind: mse"
            )


def _ask(names: tuple[str, str], student: nn.Module, teacher: nn.Module, remedy: str) -> dict[str, bool]:
    """What the forwards are to be asked for."""
    for side, model in (("student", student), ("teacher", teacher)):
        if not takes(model, names[1], options=True):
            raise ValueError(
                f"{_OP}: the {side}, a {type(model).__name__}, takes no {names[1]}, as Hugging Face models do; {remedy}"
            )
    return {names[1]: True}


def _layers(output: Any, names: tuple[str, str], side: str, remedy: str) -> tuple[Tensor, ...]:
    found = maps_of(output, names[0])
    if not found:
        raise ValueError(
            f"{_OP}: the {side} returned no {names[0]} with {names[1]}=True, but a {describe(output)}{remedy}"
        )
    return found


def _fitting(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The mask, where there is a hidden state for each of its tokens (a pooled one has none)."""
    return mask if mask is not None and mask.shape == hidden.shape[:-1] else None


def _mean(values: list[Tensor], weights: Sequence[float] | None) -> Tensor:
    if weights is not None:
        values = [value * weight for value, weight in zip(values, weights, strict=True)]
    return values[0] if len(values) == 1 else torch.stack(values).mean()
