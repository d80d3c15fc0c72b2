"""Which weights are pruned together: single ones, blocks, N of M, rows, columns, attention heads.

A pattern cuts a weight (N, K) = (outputs, inputs) into units. A unit's score is the sum of its weights' scores, and
the units with the lowest scores are pruned: exactly `round(sparsity * units)` of them, of equal scores those with the
lower index. At a ragged edge a unit is smaller (the missing weights count as zeros), but it is a unit.
"""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

PATTERNS = ("unstructured", "RxC as 4x1, 1x4, 4x4, 16x16", "N:M as 2:4", "row", "column", "head")
_WHOLE = ("row", "column")
ROUNDING = 1e-9  # 0.3 * 10 is a little more than 3


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; `Pattern.parse(text)` makes one.

    block: (R, C) outputs x inputs of a unit of "unstructured" (1, 1) and "RxC"; keep: (N, M) of "N:M".
    """

    text: str
    kind: str  # "unstructured", "block", "n:m", "row", "column" or "head"
    block: tuple[int, int] = (1, 1)
    keep: tuple[int, int] = (1, 1)

    @classmethod
    def parse(cls, text: str | Pattern, *, op: str = "") -> Pattern:
        """Raises ValueError for what is no pattern, TypeError for what is no text."""
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise TypeError(f"{_prefix(op)}pattern is a {type(text).__name__}; expected one of {', '.join(PATTERNS)}")
        if text == "unstructured" or text == "head" or text in _WHOLE:
            return cls(text, text)
        if match := re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text):
            rows, columns = int(match[1]), int(match[2])
            return cls(text, "unstructured" if rows == columns == 1 else "block", block=(rows, columns))
        if match := re.fullmatch(r"(\d{1,9}):([1-9]\d{0,8})", text):
            kept, group = int(match[1]), int(match[2])
            if kept <= group:
                return cls(text, "n:m", keep=(kept, group))
            raise ValueError(f"{_prefix(op)}pattern {text!r} keeps {kept} of {group}; expected N <= M, as in '2:4'")
        raise ValueError(f"{_prefix(op)}unknown pattern {text!r}; expected one of {', '.join(PATTERNS)}")

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself gives (N:M: 1 - N/M), else None."""
        return 1.0 - self.keep[0] / self.keep[1] if self.kind == "n:m" else None

    def check(self, shape: tuple[int, ...] | torch.Size, name: str = "weight", *, op: str = "") -> None:
        """Raises ValueError where a weight (N, K) is too small for one whole unit; a ragged edge is not refused."""
        n, k = shape
        if n == 0 or k == 0:
            return
        need_n, need_k = (1, self.keep[1]) if self.kind == "n:m" else self.block
        for need, have, what, dimension in ((need_n, n, "outputs", 0), (need_k, k, "inputs", 1)):
            if need > have:
                raise ValueError(
                    f"{_prefix(op)}layer {name!r}: pattern {self.text!r} needs {need} {what} (dimension {dimension} of "
                    f"the weight), but the layer has {have}; choose a smaller pattern, or leave the layer out "
                    f"with skip={name!r}"
                )

    def grid(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
        """How many units a weight (N, K) has down and across; those of N:M are its groups of M."""
        n, k = shape
        self._refuse_head()
        if self.kind in _WHOLE:
            return (n, 1) if self.kind == "row" else (1, k)
        rows, columns = (1, self.keep[1]) if self.kind == "n:m" else self.block
        return -(-n // rows), -(-k // columns)

    def units(self, shape: tuple[int, ...] | torch.Size) -> int:
        """How many units a weight (N, K) has."""
        down, across = self.grid(shape)
        return down * across

    def unit_scores(self, scores: Tensor) -> Tensor:
        """The sums of scores (N, K) over each unit, flat and in order; float64 where more than one is added."""
        if self.kind == "n:m":
            return self._group_losses(scores)
        if self.kind in _WHOLE:
            return scores.double().sum(1 if self.kind == "row" else 0)
        rows, columns = self.block
        if rows == columns == 1:
            return scores.flatten()
        down, across = self.grid(scores.shape)
        padded = _padded(scores.double(), down * rows, across * columns)
        return padded.view(down, rows, across, columns).sum((1, 3)).flatten()

    def spread(self, units: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """One value for each unit, flat, to one for each weight (N, K)."""
        n, k = shape
        down, across = self.grid(shape)
        grid = units.view(down, across)
        if self.kind in _WHOLE:
            return grid.expand(n, k).contiguous()
        rows, columns = (1, self.keep[1]) if self.kind == "n:m" else self.block
        return grid.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k].contiguous()

    def weights(self, shape: tuple[int, ...] | torch.Size, device: torch.device | None = None) -> Tensor:
        """How many weights each unit has, flat, float64: fewer at a ragged edge."""
        one = torch.ones(shape, dtype=torch.float64, device=device)
        return one.flatten() if self.kind == "unstructured" else _as_block(self).unit_scores(one)

    def mask_from_scores(self, scores: Tensor, sparsity: float | None = None, *, per_row: bool = False) -> Tensor:
        """A mask (N, K), True where a weight is kept, of exactly `round(sparsity * units)` pruned units.

        scores: (N, K) float, the higher the more it matters; finite.
        sparsity: 0 to 1. With N:M at most 1 - N/M, the default: below it only a fraction of the groups is cut down to
            N, those that lose least by it.
        per_row: "unstructured" only: every output loses the same number of weights, give or take one.

        Raises ValueError for scores of another kind, NaN or Inf in them, or a sparsity out of range.
        """
        check_scores(scores)
        sparsity = self.sparsity if sparsity is None else check_fraction(sparsity, "sparsity")
        if sparsity is None:
            raise ValueError(f"pattern {self.text!r} needs a sparsity from 0 to 1")
        if per_row and self.kind == "unstructured":
            return self.mask_of_rows(scores, self.pruned_of(scores.numel(), sparsity))
        count = self.pruned_of(self.units(scores.shape), sparsity)
        return self.mask_from_units(scores, lowest(self.unit_scores(scores), count))

    def pruned_of(self, units: int, sparsity: float) -> int:
        """How many of so many units are pruned at this sparsity (of N:M: how many groups are cut)."""
        if self.kind != "n:m":
            return round(sparsity * units)
        most = self.sparsity or 0.0
        if sparsity > most + ROUNDING:
            raise ValueError(f"pattern {self.text!r} prunes {most:g} of the weights; got sparsity={sparsity}, more")
        return round(min(sparsity / most, 1.0) * units) if most else 0

    def mask_from_units(self, scores: Tensor, pruned: Tensor) -> Tensor:
        """The mask (N, K), True where a weight is kept, with the units `pruned` (flat, bool) pruned.

        Of a pruned group of N:M the N weights with the highest scores stay.
        """
        mask = ~self.spread(pruned, scores.shape)
        return mask | self._best_of_groups(scores) if self.kind == "n:m" else mask

    def mask_of_rows(self, scores: Tensor, count: int) -> Tensor:
        """The mask (N, K) without `count` single weights, as many of each output, give or take one."""
        return ~_lowest_per_row(scores, count)

    def kept_of_groups(self, mask: Tensor) -> Tensor:
        """N:M only: how many weights of each group a mask (N, K) keeps, flat."""
        return self._grouped(mask.float()).clamp(min=0).sum(1)

    def _grouped(self, scores: Tensor) -> Tensor:
        """(N * groups, M), -inf beyond a ragged edge."""
        down, across = self.grid(scores.shape)
        padded = _padded(scores, down, across * self.keep[1], -math.inf)
        return padded.view(down * across, self.keep[1])

    def _best_of_groups(self, scores: Tensor) -> Tensor:
        down, across = self.grid(scores.shape)
        grouped = self._grouped(scores)
        order = grouped.argsort(dim=1, stable=True)
        kept = torch.zeros_like(grouped, dtype=torch.bool)
        kept.scatter_(1, order[:, self.keep[1] - self.keep[0] :], True)
        return kept.view(down, across * self.keep[1])[:, : scores.shape[1]]

    def _group_losses(self, scores: Tensor) -> Tensor:
        cut = self.keep[1] - self.keep[0]
        lost = self._grouped(scores).double().sort(dim=1).values[:, :cut]
        return torch.where(lost == -math.inf, 0.0, lost).sum(1)

    def _refuse_head(self) -> None:
        if self.kind == "head":
            raise ValueError("pattern 'head' spans several layers; pycompress.prune_ prunes whole models with it")


def _as_block(pattern: Pattern) -> Pattern:
    """N:M as blocks of the same shape, for what counts weights and does not compare them."""
    return Pattern(pattern.text, "block", block=(1, pattern.keep[1])) if pattern.kind == "n:m" else pattern


def _padded(values: Tensor, n: int, k: int, fill: float = 0.0) -> Tensor:
    if values.shape == (n, k):
        return values.contiguous()
    return F.pad(values, (0, k - values.shape[1], 0, n - values.shape[0]), value=fill)


def lowest(scores: Tensor, count: int) -> Tensor:
    """A bool tensor like `scores` (1-D), True at exactly `count` lowest of them; of equal ones the first.

    Linear in the number of scores, where sorting would take a multiple: models have 10^8.
    """
    if count <= 0 or count >= scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    bound = _kth_lowest(scores, count)
    chosen = scores < bound
    ties = (scores == bound).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def _kth_lowest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of scores (1-D)."""
    if scores.device.type != "cpu":
        return scores.kthvalue(count).values
    # On the CPU kthvalue is quadratic where scores fall from first to last, and else takes 4 times as long.
    values = scores.detach().float() if scores.dtype == torch.bfloat16 else scores.detach()
    return torch.from_numpy(numpy.partition(values.numpy(), count - 1))[count - 1].to(scores.dtype)


def _lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """True at `count` scores (N, K), as many in every row; the remainder falls on the rows that lose least by it."""
    n, k = scores.shape
    if n == 0 or k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    each, rest = divmod(count, n)
    chosen = torch.full_like(scores, each == k, dtype=torch.bool)
    if 0 < each < k:
        bound = scores.kthvalue(each, dim=1, keepdim=True).values
        chosen, ties = scores < bound, scores == bound
        chosen |= ties & (ties.cumsum(1) <= each - chosen.sum(1, keepdim=True))
    if rest:
        following = scores.masked_fill(chosen, math.inf).min(dim=1, keepdim=True)
        chosen.scatter_(1, following.indices, lowest(following.values.flatten(), rest)[:, None])
    return chosen


def is_finite(tensor: Tensor) -> bool:
    """In one pass; torch.isfinite takes three and as much memory again."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def _prefix(op: str) -> str:
    return f"{op}: " if op else ""


def check_fraction(value: object, what: str) -> float:
    """`value` as a float from 0 to 1; raises ValueError otherwise, NaN included."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # NumPy's too
    if not number or not 0.0 <= float(value) <= 1.0:  # type: ignore[arg-type]
        raise ValueError(f"{what}={value!r}; expected a number from 0 (keeps all) to 1 (prunes all)")
    return float(value)  # type: ignore[arg-type]


def check_scores(scores: Tensor, name: str = "", *, op: str = "") -> None:
    """Raises ValueError where scores are not a finite float tensor (N, K)."""
    of = f" of layer {name!r}" if name else ""
    if not isinstance(scores, Tensor) or scores.dim() != 2 or not scores.is_floating_point():
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{_prefix(op)}the scores{of} are {got}; expected a float tensor (outputs, inputs)")
    if not is_finite(scores):
        raise ValueError(f"{_prefix(op)}the scores{of} hold NaN or Inf; expected finite numbers")
