"""Speed-up against sparsity, from rows: what the summary, the tables and the plot of sparse_linear are made of."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pycompress.bench.figures import n_threads, us
from pycompress.bench.rows import Row, timed
from pycompress.bench.timing import geomean

# The layer that a sparse one is compared with: the same dtype, dense.
DENSE = {"fp32": "torch-dense-fp32", "bf16": "torch-dense-bf16", "int8": "pycompress-dense-int8"}
FORMS = ("auto", "bitmap", "index", "csr", "bsr")


class Case(NamedTuple):
    """What the rows of one comparison share; dtypes, patterns and forms are within it. 0 for what it has not."""

    covers: str
    threads: int
    m: int
    k: int
    n: int
    sparsity: float

    def __str__(self) -> str:
        if self.covers in ("model", "file"):
            return "MiniLM" if self.covers == "file" else f"MiniLM, {self.m} tokens, {n_threads(self.threads)}"
        return f"{self.m} x {self.k} x {self.n} at {self.sparsity:g}, {n_threads(self.threads)}"


class Series(NamedTuple):
    """A curve: one form of one pattern, for one number of tokens."""

    m: int
    dtype: str
    pattern: str
    form: str

    def __str__(self) -> str:
        who = "torch" if self.form in ("csr", "bsr") else "pycompress"
        return f"{who} {self.dtype} {self.pattern}, {self.form}"


Point = tuple[float, float]  # sparsity, how many times as fast as dense


def case_of(row: Row) -> Case:
    whole = row.covers in ("model", "file")  # compares sparse with dense, which have no sparsity in common
    return Case(row.covers, row.threads or 0, row.M or 0, row.K or 0, row.N or 0, 0.0 if whole else row.sparsity)


def measured(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.status == "ok" and (r.p50_us is not None or r.state_mb is not None)]


def by_case(rows: Sequence[Row], covers: str = "") -> dict[Case, list[Row]]:
    """covers: "" for all."""
    cases: dict[Case, list[Row]] = {}
    for row in measured(rows):
        if covers in ("", row.covers):
            cases.setdefault(case_of(row), []).append(row)
    return cases


def form_of(row: Row) -> str:
    """"index" of "pycompress-index-fp32"."""
    return row.provider.split("-")[1]


def dense_of(rows: Sequence[Row], dtype: str) -> Row | None:
    return next((r for r in rows if r.provider == DENSE[dtype]), None)


def find(rows: Sequence[Row], dtype: str, pattern: str, form: str) -> Row | None:
    """Of one case."""
    return next((r for r in rows if (r.dtype, r.options, form_of(r)) == (dtype, pattern, form)), None)


def speedup(rows: Sequence[Row], dtype: str, pattern: str, form: str) -> float | None:
    """Of one case: over the dense layer of the same dtype."""
    sparse, dense = find(rows, dtype, pattern, form), dense_of(rows, dtype)
    return us(dense) / us(sparse) if sparse and dense else None


def curves(rows: Sequence[Row], threads: int) -> dict[Series, list[Point]]:
    """Geometric means over the shapes that a series was measured with, of those with the most sparsities.

    So the one weight beyond the cache, measured at few, does not bend a curve.
    """
    found: dict[Series, dict[tuple[int, int], list[Point]]] = {}
    for case, of_case in by_case(timed(rows)).items():
        for row in of_case if case.threads == threads else ():
            ratio = speedup(of_case, row.dtype, row.options, form_of(row))
            if row.options and ratio is not None:
                series = Series(case.m, row.dtype, row.options, form_of(row))
                found.setdefault(series, {}).setdefault((case.k, case.n), []).append((case.sparsity, ratio))
    result = {}
    for series, shapes in found.items():
        most = max(len(points) for points in shapes.values())
        together: dict[float, list[float]] = {}
        for points in shapes.values():
            for sparsity, ratio in points if len(points) == most else ():
                together.setdefault(sparsity, []).append(ratio)
        result[series] = sorted((sparsity, geomean(ratios)) for sparsity, ratios in together.items())
    return dict(sorted(result.items(), key=lambda item: _order(item[0])))


def _order(series: Series) -> tuple[int, int, str, int]:
    patterns = {"unstructured": "0", "2:4": "z"}
    dtypes = list(DENSE)
    return series.m, dtypes.index(series.dtype), patterns.get(series.pattern, series.pattern), FORMS.index(series.form)


def break_even(points: Sequence[Point]) -> str:
    """The sparsity from which on the curve is above 1: "0.62", or "< 0.5" or "> 0.95" where it is outside.

    Read off between two points where log(speed-up) is a line over log(1 - sparsity), as it is where the time is
    proportional to a power of the weights kept. "-" for fewer than two points.
    """
    if len(points) < 2:
        return "-"
    slow = [i for i, (_, ratio) in enumerate(points) if ratio < 1]
    if not slow:
        return f"< {points[0][0]:g}"
    last = slow[-1]
    if last == len(points) - 1:
        return f"> {points[-1][0]:g}"
    (left, low), (right, high) = points[last], points[last + 1]
    share = -math.log(low) / (math.log(high) - math.log(low))
    return f"{1 - (1 - left) ** (1 - share) * (1 - right) ** share:.2f}"
