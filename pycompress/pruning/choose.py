"""From scores to masks: exactly as many units as asked for, layer by layer or across all layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.pruning.patterns import ROUNDING, Pattern, check_fraction, check_scores, lowest
from pycompress.selection import closest, covers

SCOPES = ("layer", "global")
Limit = float | Mapping[str, float]
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class HeadNames:
    """The layers of one attention by name; see heads.py for which rows and columns a head has."""

    name: str
    rows: tuple[str, str, str]  # query, key, value
    output: str
    heads: int

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.rows, self.output)


@dataclass(frozen=True)
class _Group:
    """Layers that share their units: one layer by itself, or the projections of one attention."""

    name: str
    scores: Tensor  # (units,)
    weights: Callable[[], Tensor] | None  # how many each unit has, where they are several
    masks: Callable[[Tensor], Masks]  # from the pruned units, bool (units,)

    @property
    def units(self) -> int:
        return self.scores.numel()


def select_masks(
    scores: Mapping[str, Tensor],
    pattern: str | Pattern,
    sparsity: float | None = None,
    *,
    threshold: float | None = None,
    scope: str = "layer",
    min_sparsity: Limit = 0.0,
    max_sparsity: Limit = 1.0,
    per_row: bool = False,
    heads: Sequence[HeadNames] = (),
    op: str = "prune_",
) -> Masks:
    """The mask (N, K) of each layer, True where a weight is kept.

    scores: by layer name, float (N, K), higher for what matters more; a unit's score is their sum.
    sparsity: the fraction of units to prune, `round(sparsity * units)` of each layer or, with scope="global", of all
        layers together, the lowest scores first. The default is what an N:M pattern says.
    threshold: instead of it, prune what is below: of single weights those whose score is, of larger units those whose
        root mean square is, the scores being squares (`scores.magnitude` gives both).
    min_sparsity, max_sparsity: of every layer, a number or by name (of a layer, a module above it, or a glob pattern),
        rounded to whole units towards each other.
    per_row: unstructured, one layer at a time: as many weights of each output.
    heads: for pattern "head" the attentions whose projections the scores are of.

    Raises ValueError for scores that are not finite, and for floors and ceilings that the sparsity cannot meet.
    """
    pattern = Pattern.parse(pattern, op=op)
    if per_row and pattern.kind == "unstructured" and sparsity is not None:
        return _per_row(scores, pattern, sparsity, min_sparsity, max_sparsity, op)
    by_head = pattern.kind == "head"
    names = [attention.name for attention in heads] if by_head else list(scores)
    floors, ceilings = limits(min_sparsity, max_sparsity, names, op)
    # One after the other: without a global ranking no more than one layer's scores are in memory.
    made = (
        (_head_group(h, scores, op) for h in heads)
        if by_head
        else (_layer_group(n, scores[n], pattern, op) for n in names)
    )
    masks: Masks = {}
    if threshold is None and scope == "global":
        groups = list(made)
        ranges = [_range(group.units, floors[group.name], ceilings[group.name], pattern) for group in groups]
        pruned = _across(groups, ranges, _wanted(pattern, sparsity, groups), op)
        for group, units in zip(groups, pruned, strict=True):
            masks.update(group.masks(units))
        return masks
    for group in made:
        if threshold is None:
            ranked, wanted = group.scores, _wanted(pattern, sparsity, [group])
        else:
            ranked = _root_mean_squares(group)
            wanted = int((ranked < threshold).sum())
        least, most = _range(group.units, floors[group.name], ceilings[group.name], pattern)
        masks.update(group.masks(lowest(ranked, min(max(wanted, least), most))))
    return masks


def _wanted(pattern: Pattern, sparsity: float | None, groups: Sequence[_Group]) -> int:
    units = sum(group.units for group in groups)
    if sparsity is None:
        if pattern.sparsity is None:
            raise ValueError(f"pattern {pattern.text!r} needs a sparsity from 0 to 1")
        sparsity = pattern.sparsity
    return pattern.pruned_of(units, check_fraction(sparsity, "sparsity"))


def _layer_group(name: str, scores: Tensor, pattern: Pattern, op: str) -> _Group:
    check_scores(scores, name, op=op)
    pattern.check(scores.shape, name, op=op)
    # Only N:M looks at single weights again; the others' scores need not stay in memory, layer upon layer.
    held, shape = scores if pattern.kind == "n:m" else None, scores.shape

    def masks(pruned: Tensor) -> Masks:
        mask = ~pattern.spread(pruned, shape) if held is None else pattern.mask_from_units(held, pruned)
        return {name: mask}

    single, device = pattern.kind == "unstructured", scores.device
    weights = None if single else lambda: pattern.weights(shape, device)
    return _Group(name, pattern.unit_scores(scores), weights, masks)


def _head_group(attention: HeadNames, scores: Mapping[str, Tensor], op: str) -> _Group:
    """A head is its rows of query, key and value, and its columns of the output projection."""
    rows = attention.rows
    total, weights, shapes = None, 0, {}
    for name in attention.names:
        layer = scores[name]
        check_scores(layer, name, op=op)
        shapes[name] = layer.shape
        per_head = layer.double().sum(1 if name in rows else 0).view(attention.heads, -1).sum(1)
        total = per_head if total is None else total + per_head
        weights += layer.numel() // attention.heads
    assert total is not None

    def masks(pruned: Tensor) -> Masks:
        kept = ~pruned.repeat_interleave(shapes[attention.output][1] // attention.heads)
        by_row = {name: kept[:, None].expand(shapes[name]).contiguous() for name in rows}
        return {**by_row, attention.output: kept[None, :].expand(shapes[attention.output]).contiguous()}

    return _Group(attention.name, total, lambda: torch.full_like(total, weights), masks)


def _root_mean_squares(group: _Group) -> Tensor:
    if group.weights is None:
        return group.scores
    # float32 as the weights are, so that a block of 0.7 is not below a threshold of 0.7.
    return (group.scores / group.weights()).sqrt().float()


def _across(groups: Sequence[_Group], ranges: Sequence[tuple[int, int]], count: int, op: str) -> list[Tensor]:
    """The pruned units of each group, `count` in all: each group's floor first, then the lowest of all below its
    ceiling. With both that is the cheapest choice there is."""
    least, most = (sum(bounds) for bounds in zip(*ranges, strict=True)) if ranges else (0, 0)
    if not least <= count <= most:
        units = sum(group.units for group in groups)
        raise ValueError(
            f"{op}: the sparsity asked for prunes {count} of {units} units, but min_sparsity and max_sparsity of the "
            f"layers allow {least} to {most}; widen them or change the sparsity"
        )
    ranked = []
    for group, (lo, hi) in zip(groups, ranges, strict=True):
        scores = group.scores.double()
        if lo:
            scores = scores.masked_fill(lowest(group.scores, lo), -math.inf)
        if hi < group.units:
            scores = scores.masked_fill(~lowest(group.scores, hi), math.inf)
        ranked.append(scores.cpu())
    pruned = lowest(torch.cat(ranked), count) if ranked else torch.empty(0, dtype=torch.bool)
    parts = pruned.split([group.units for group in groups])
    return [part.to(group.scores.device) for part, group in zip(parts, groups, strict=True)]


def _per_row(
    scores: Mapping[str, Tensor], pattern: Pattern, sparsity: float, low: Limit, high: Limit, op: str
) -> Masks:
    floors, ceilings = limits(low, high, list(scores), op)
    masks = {}
    for name in scores:
        layer = scores[name]
        check_scores(layer, name, op=op)
        wanted = pattern.pruned_of(layer.numel(), check_fraction(sparsity, "sparsity"))
        lo, hi = _range(layer.numel(), floors[name], ceilings[name], pattern)
        masks[name] = pattern.mask_of_rows(layer, min(max(wanted, lo), hi))
    return masks


def _range(units: int, floor: float, ceiling: float, pattern: Pattern) -> tuple[int, int]:
    """The least and the most units to prune; where no whole number lies between, the one below."""
    if pattern.sparsity:  # a group of N:M loses this fraction of its weights
        floor, ceiling = min(floor / pattern.sparsity, 1.0), min(ceiling / pattern.sparsity, 1.0)
    most = math.floor(ceiling * units + ROUNDING)
    return min(math.ceil(floor * units - ROUNDING), most), most


def limits(low: Limit, high: Limit, names: list[str], op: str) -> tuple[dict[str, float], dict[str, float]]:
    """min_sparsity and max_sparsity of every layer in `names`; raises ValueError for one that is out of range."""
    floors, ceilings = _by_name(low, 0.0, "min_sparsity", names, op), _by_name(high, 1.0, "max_sparsity", names, op)
    for name in names:
        if floors[name] > ceilings[name]:
            raise ValueError(
                f"{op}: layer {name!r} has min_sparsity={floors[name]} above max_sparsity={ceilings[name]}"
            )
    return floors, ceilings


def _by_name(limit: Limit, usual: float, what: str, names: Iterable[str], op: str) -> dict[str, float]:
    if not isinstance(limit, Mapping):
        return dict.fromkeys(names, check_fraction(limit, f"{op}: {what}"))
    found = dict.fromkeys(names, usual)
    for key, value in limit.items():
        hits = [name for name in found if isinstance(key, str) and covers(key, name)]
        if not hits:
            close = closest(str(key), list(found))
            hint = f"; the closest names are {', '.join(map(repr, close))}" if close else ""
            raise ValueError(f"{op}: {what}[{key!r}] is of no layer that is pruned{hint}")
        found.update(dict.fromkeys(hits, check_fraction(value, f"{op}: {what}[{key!r}]")))
    return found
