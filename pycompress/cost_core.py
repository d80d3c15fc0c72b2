"""What a linear layer with a pruned weight costs in each of its forms, and which form each number of tokens takes.

The forms of `y = x @ (W * mask)^T`: "bitmap" (values expanded in registers), "index" (lists of what is kept),
"dense". For each form, weight dtype and some numbers of tokens M the time is a sum of counts times
coefficients, none negative, fitted to times measured on this machine so that the relative error is least; between
two such M the time is interpolated. A *correction* is a time measured on a layer of this very shape and sparsity:
it takes the place of the prediction at its M and scales those beside it.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from pycompress.peaks import last_level_cache_bytes

if TYPE_CHECKING:
    from pycompress.nn import SparseLinear

FORMS = ("bitmap", "index", "dense")  # the position is the code in a choice
DTYPES = ("float32", "bfloat16", "int8")
DEFAULT_TOKENS = (1, 8, 32, 128, 512)
ANY_M = 2**62
# The largest M of each bucket. Buckets that take the same form are merged, so a fine grid costs a call nothing.
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, ANY_M)
# A form may cost this much more than the best where it spares a switch, and the memory of one more form.
SLACK = 1.03
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
# The CPU's index kernels step in whole registers of tokens.
_TOKENS_A_STEP = {"bitmap": 1, "index": 16, "dense": 1}

Choice = tuple[int, ...]  # (largest M, code of the form, largest M, code, ...); the last largest M is ANY_M


@dataclass(frozen=True)
class Shape:
    """What the time depends on besides M: W is (n, k), `nnz` of its weights are kept.

    columns, units, blocks: how many 4x1, 1x4 and 4x4 blocks hold a kept weight.
    dense: the dtype of the dense layer that it competes with, which is x's unless that is int8.
    """

    n: int
    k: int
    nnz: int
    dtype: str
    columns: int
    units: int
    blocks: int
    dense: str

    @classmethod
    def of(cls, bitmap: Tensor, k: int, dtype: str, dense: str | None = None) -> Shape:
        """bitmap: uint8 (N, ceil(K / 8)), bit k % 8 of byte k // 8 set where the weight is kept, on any device."""
        for name in (dtype, dense or dtype):
            if name not in DTYPES:
                raise ValueError(f"cost_model: dtype={name!r}, expected one of {', '.join(DTYPES)}")
        if bitmap.is_meta:
            raise ValueError("cost_model: the bitmap is on the meta device; load its values first")
        n = bitmap.shape[0]
        rows = bitmap.cpu().contiguous().numpy()
        fours = numpy.concatenate([rows, numpy.zeros((-n % 4, rows.shape[1]), dtype=numpy.uint8)])
        groups = numpy.bitwise_or.reduce(fours.reshape(-(-n // 4), 4, rows.shape[1]), axis=1)
        return cls(n, k, _ones(rows), dtype, _ones(groups), _nibbles(rows), _nibbles(groups), dense or dtype)

    @classmethod
    def of_layer(cls, layer: SparseLinear) -> Shape:
        """Of a SparseLinear, whose bias tells the dtype of x."""
        both = layer.dtype == "bfloat16" and layer.bias is not None and layer.bias.dtype == torch.bfloat16
        dense = "int8" if layer.dtype == "int8" else "bfloat16" if both else "float32"
        return cls.of(layer.weight_bitmap, layer.in_features, layer.dtype, dense)

    @classmethod
    def random(cls, n: int, k: int, sparsity: float, dtype: str) -> Shape:
        """What an unstructured mask of this sparsity has on average."""

        def blocks(cells: int) -> int:
            return math.ceil(n * k / cells * (1 - sparsity**cells))

        return cls(n, k, round(n * k * (1 - sparsity)), dtype, blocks(4), blocks(4), blocks(16), dtype)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.nnz / (self.n * self.k) if self.n * self.k else 0.0

    def key(self) -> tuple[int | str, ...]:
        """Equal for layers that cost the same: percents of weights kept and of what the index form visits."""
        cells = max(self.n * self.k, 1)
        kept, visited = (round(100 * count / cells) for count in (self.nnz, sum(self._visited())))
        return self.n, self.k, self.dtype, self.dense, kept, visited

    def figures(self, form: str) -> tuple[str, str]:
        """Which fit tells this form's time."""
        return (self.dense if form == "dense" else self.dtype), form

    def step(self, form: str) -> int:
        """The kernels of a form take so many tokens at a time: between two multiples the time does not change."""
        return _TOKENS_A_STEP[form]

    def _visited(self) -> tuple[int, int, int, int]:
        """What the index form walks: list entries and weights of these; then the same for gathered columns.

        Four rows share a list, whose entries are columns, or for int8 four neighbouring columns or four gathered
        ones; the packing takes of the two what costs less, by the cycles of csrc/sparse_linear/index_pack.cpp.
        """
        if self.dtype != "int8":
            return self.columns, self.nnz, 0, 0
        neighbours, gathered = 3.1 * self.blocks + 1.5 * self.units, 1.5 * self.columns + 0.5 * self.nnz
        return (self.blocks, self.units, 0, 0) if neighbours <= gathered else (0, 0, self.columns, self.nnz)

    def counts(self, form: str) -> tuple[float, ...]:
        """What the coefficients of a form are multiplied with."""
        n, k, cells = self.n, self.k, self.n * self.k
        bytes_each = VALUE_BYTES[self.dense if form == "dense" else self.dtype]
        if form == "dense":
            return (1.0, n, k, cells, *_beyond(cells * bytes_each))
        if form == "bitmap":
            return (1.0, n, cells, self.nnz, *_beyond(cells / 8 + self.nnz * bytes_each))
        visited = self._visited()
        entries = visited[0] + visited[2]
        kept = visited[1] * (4 if self.dtype == "int8" else bytes_each) + visited[3]
        # Each list entry reads a row of the panel, which with K outgrows a core's first cache and then its second.
        return (1.0, n, k, *visited, k * entries, *_beyond(2 * entries + kept))


def _ones(rows: numpy.ndarray) -> int:
    return int(numpy.unpackbits(rows).sum(dtype=numpy.int64))


def _nibbles(rows: numpy.ndarray) -> int:
    return int(numpy.count_nonzero(rows & 15)) + int(numpy.count_nonzero(rows >> 4))


def _beyond(size: float) -> tuple[float, float]:
    """Bytes past a core's own cache; and all bytes, so far as they no longer stay in the last level between calls.

    The last level is shared with other cores and machines, and evicts what is read in a circle: with 32 MiB of it
    weights of 16 MB were read at 57 GB/s, of 21 MB at 24 GB/s, of 37 MB at 21 GB/s.
    """
    last = _last_level()
    streamed = min(max((size - 0.45 * last) / (0.2 * last), 0.0), 1.0)
    return max(0.0, size - (1 << 20)), size * streamed


_last_level = functools.cache(last_level_cache_bytes)


def describe_choice(choice: Sequence[int]) -> str:
    """In words: `bitmap to 8, index`."""
    pairs = list(zip(choice[::2], choice[1::2], strict=True))
    return ", ".join(FORMS[code] if m == ANY_M else f"{FORMS[code]} to {m}" for m, code in pairs)


def form_at(choice: Sequence[int], m: int) -> str:
    """The form that a choice names for M = m."""
    return next(FORMS[code] for most, code in zip(choice[::2], choice[1::2], strict=True) if m <= most)


@dataclass(frozen=True)
class Fit:
    """The coefficients of one form and dtype: `rows[i]` are those at M = `tokens[i]`, in seconds."""

    tokens: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]

    def predict(self, m: int, counts: Sequence[float]) -> float:
        """Seconds at M = m: log-linear between the grid's M, in proportion to M beyond the last."""

        def at(i: int) -> float:
            return max(sum(a * b for a, b in zip(self.rows[i], counts, strict=True)), 1e-9)

        if m <= self.tokens[0]:
            return at(0)
        if m >= self.tokens[-1]:
            return at(-1) * m / self.tokens[-1]
        i = bisect.bisect_right(self.tokens, m) - 1
        low, high = math.log(self.tokens[i]), math.log(self.tokens[i + 1])
        share = (math.log(m) - low) / (high - low)
        return math.exp((1 - share) * math.log(at(i)) + share * math.log(at(i + 1)))


def fit(samples: Sequence[tuple[int, Sequence[float], float]]) -> Fit:
    """From (M, counts, measured seconds), several of each M, to the coefficients that miss least relatively."""
    by_m: dict[int, list[tuple[Sequence[float], float]]] = {}
    for m, counts, seconds in samples:
        by_m.setdefault(m, []).append((counts, seconds))
    tokens = tuple(sorted(by_m))
    return Fit(tokens, tuple(_least_relative([c for c, _ in by_m[m]], [t for _, t in by_m[m]]) for m in tokens))


def _least_relative(counts: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Nonnegative least squares of counts @ c / seconds = 1, by trying every set of columns: there are few."""
    a = numpy.asarray(counts, dtype=numpy.float64) / numpy.asarray(seconds)[:, None]
    size = numpy.abs(a).max(axis=0)
    used = [i for i in range(a.shape[1]) if size[i] > 0]
    best, least = numpy.zeros(a.shape[1]), math.inf
    for some in itertools.chain.from_iterable(itertools.combinations(used, r) for r in range(1, len(used) + 1)):
        part = a[:, some] / size[list(some)]
        found = numpy.linalg.lstsq(part, numpy.ones(len(a)), rcond=None)[0]
        error = float(((part @ found - 1.0) ** 2).sum())
        if (found >= 0).all() and error < least - 1e-12 and found.sum() > 0:
            least, best = error, numpy.zeros(a.shape[1])
            best[list(some)] = found / size[list(some)]
    return tuple(float(c) for c in best)


class CostModel:
    """Predicts times and chooses forms, for one machine and number of threads.

    fits: by what Shape.figures names. measured: the dtypes whose fits were measured on this machine, not built in.
    machine: what the times depend on besides the layer, as cost_target.py tells it; empty: the CPU with these threads.
    """

    def __init__(
        self,
        fits: Mapping[tuple[str, str], Fit],
        *,
        threads: int,
        measured: frozenset[str],
        machine: Mapping[str, Any] | None = None,
    ) -> None:
        self.fits, self.threads, self.measured, self.machine = dict(fits), threads, measured, dict(machine or {})
        self._corrections: dict[tuple[object, ...], dict[int, float]] = {}

    def predict(self, form: str, m: int, shape: Shape, *, corrected: bool = True) -> float:
        """Seconds of one call with m tokens. corrected: with what was measured on layers of this shape.

        Raises:
            ValueError: an unknown form or dtype, or one that this model holds no figures for.
        """
        fitted = self.fits.get(shape.figures(form))
        if fitted is None:
            known = ", ".join(sorted({f"{d} {f}" for d, f in self.fits}))
            raise ValueError(f"CostModel: no figures for {' '.join(shape.figures(form))!r}; there are {known}")
        step = shape.step(form)
        whole = -(-m // step) * step if m > step else max(m, 1)
        seconds = fitted.predict(whole, shape.counts(form))
        found = self._corrections.get((*shape.key(), form)) if corrected else None
        if not found:
            return seconds
        return seconds * _interpolate(sorted(found.items()), m)

    def knows(self, form: str, shape: Shape) -> bool:
        return shape.figures(form) in self.fits

    def correct(self, form: str, m: int, shape: Shape, seconds: float) -> None:
        """Remember a time that was measured on a layer of this shape."""
        predicted = self.predict(form, m, shape, corrected=False)
        self._corrections.setdefault((*shape.key(), form), {})[m] = seconds / predicted

    def is_corrected(self, form: str, m: int, shape: Shape) -> bool:
        return m in self._corrections.get((*shape.key(), form), {})

    @property
    def corrections(self) -> list[tuple[tuple[object, ...], int, float]]:
        """(key of the shape and the form, M, measured time over predicted), for the cache file."""
        return [(key, m, ratio) for key, found in self._corrections.items() for m, ratio in found.items()]

    def restore(self, corrections: Sequence[tuple[tuple[object, ...], int, float]]) -> None:
        for key, m, ratio in corrections:
            self._corrections.setdefault(tuple(key), {})[m] = ratio

    def choose(self, shape: Shape, tokens: Sequence[int] | None = None) -> Choice:
        """The form for every M: within each bucket the one that loses least against the best at its ends.

        tokens: the M that matter. Buckets below the smallest and above the largest take the form of the bucket
            beside them, which spares the memory of forms that would never run.
        """
        codes = [(form, code) for code, form in enumerate(FORMS) if self.knows(form, shape)]
        if not codes:
            raise ValueError(
                f"CostModel: no figures for a {shape.dtype} layer; calibrate_cost_model({shape.dtype!r}) measures them"
            )
        taken: list[int] = []
        low = 1
        for high in BUCKETS:
            ends = (low, high if high < ANY_M else 2 * low)
            times = [{code: self.predict(form, m, shape) for form, code in codes} for m in ends]
            losses = {code: max(t[code] / min(t.values()) for t in times) for _, code in codes}
            limit = SLACK * min(losses.values())
            before = [taken[-1]] if taken else []
            taken.append(next(code for code in (*before, *losses) if losses[code] <= limit))
            low = high + 1
        if tokens:
            first, last = (bisect.bisect_left(BUCKETS, f(tokens)) for f in (min, max))
            taken = [taken[min(max(i, first), last)] for i in range(len(taken))]
        return merged(zip(BUCKETS, taken, strict=True))


def merged(entries: Iterable[tuple[int, int]]) -> Choice:
    """The flat choice of (largest M, code) pairs, neighbours of one code as one."""
    flat: list[int] = []
    for most, code in entries:
        if len(flat) >= 2 and flat[-1] == code:
            flat[-2] = most
        else:
            flat += [most, code]
    return tuple(flat)


def _interpolate(points: Sequence[tuple[int, float]], m: int) -> float:
    """The ratio at m: geometric between two measured M, that of the nearest outside them."""
    tokens = [p for p, _ in points]
    i = bisect.bisect_left(tokens, m)
    if i == 0 or i == len(points) or tokens[i] == m:
        return points[min(i, len(points) - 1)][1]
    (low, a), (high, b) = points[i - 1], points[i]
    share = (math.log(m) - math.log(low)) / (math.log(high) - math.log(low))
    return math.exp((1 - share) * math.log(a) + share * math.log(b))
