"""What the rows of sparse_linear show: a line while measuring, the figures to reach, the break-even points."""

from collections.abc import Callable, Sequence
from statistics import median

from pycompress.bench.figures import HEAD, Figure, n_threads, restless, us
from pycompress.bench.rows import Row, timed
from pycompress.bench.sparse_linear_curves import (
    Case,
    Series,
    break_even,
    by_case,
    case_of,
    curves,
    dense_of,
    find,
    form_of,
    measured,
    speedup,
)

_FIGURE_THREADS = 2
_NARROWEST, _WIDEST = 768, 3072  # K and N of the layers that the figures are about
# Of the fraction of a compute peak: beyond it the measurement is at fault.
_IMPOSSIBLE = 1.05

Value = Callable[[Sequence[Row]], float | None]


def progress_line(rows: Sequence[Row]) -> str:
    """One measured case in a line: the time of dense, the speed-ups of ours, and who failed."""
    parts = [f"{case_of(rows[0])}:"]
    done = measured(rows)
    for dtype in dict.fromkeys(r.dtype for r in done):
        dense = dense_of(done, dtype)
        ratios = [
            f"{pattern} {ratio:.2f}x ({form})"
            for pattern in dict.fromkeys(r.options for r in done if r.dtype == dtype and r.options)
            for form in ("bitmap", "index", "auto")
            if (ratio := speedup(done, dtype, pattern, form)) is not None
        ]
        parts.append(" ".join([dtype, f"{us(dense):.0f} us" if dense else "-", *ratios]) + ";")
    parts += [f"[{r.provider}{' ' * bool(r.options)}{r.options}: {r.status}]" for r in rows if r.status != "ok"]
    return " ".join(parts)


# ---- the figures to reach ----


def _layers(sparsity: float, first: int, last: int) -> Callable[[Case, Sequence[Row]], bool]:
    """Layers of this sparsity with M from `first` to `last`."""

    def applies(case: Case, rows: Sequence[Row]) -> bool:
        sizes = min(case.k, case.n) >= _NARROWEST and max(case.k, case.n) <= _WIDEST
        same = case.covers == "layer" and case.threads == _FIGURE_THREADS and case.sparsity == sparsity
        return same and sizes and first <= case.m <= last

    return applies


def beyond_cache(case: Case, rows: Sequence[Row]) -> bool:
    """Whether no cache holds the fp32 weight: twice the last level, as half of less would still be served from it."""
    llc = rows[0].llc_mib
    return case.covers == "layer" and llc is not None and 4 * case.k * case.n >= 2 * llc * 2**20


def _one_token(sparsity: float) -> Callable[[Case, Sequence[Row]], bool]:
    def applies(case: Case, rows: Sequence[Row]) -> bool:
        same = case.m == 1 and case.threads == _FIGURE_THREADS and case.sparsity == sparsity
        return same and beyond_cache(case, rows)

    return applies


def _whole(covers: str) -> Callable[[Case, Sequence[Row]], bool]:
    return lambda case, _: case.covers == covers and case.threads in (0, _FIGURE_THREADS)


def _speedup(dtype: str, pattern: str, form: str) -> Value:
    return lambda rows: speedup(rows, dtype, pattern, form)


def of_fastest(rows: Sequence[Row]) -> float | None:
    """Of a case of the sweep: the time of the fastest of dense and every form, over that of auto."""
    return next((r.fraction for r in rows if form_of(r) == "auto" and r.peak_kind == "fastest"), None)


def _model(rows: Sequence[Row]) -> float | None:
    return speedup(rows, "int8", "4x4", "auto")


def file_share(rows: Sequence[Row]) -> float | None:
    sparse, dense = find(rows, "fp32", "unstructured", "auto"), dense_of(rows, "fp32")
    return sparse.state_mb / dense.state_mb if sparse and dense and sparse.state_mb and dense.state_mb else None


def _figures(
    dtype: str, pattern: str, form: str, reach: dict[float, float], tokens: tuple[int, int]
) -> list[Figure[Case]]:
    first, last = tokens
    shown = f"M >= {first}" if last > 512 else f"M = {first}..{last}"
    return [
        Figure(
            f"x dense {dtype}, {pattern}, {shown}, {sparsity:.0%}",
            goal,
            "worst",
            _layers(sparsity, first, last),
            _speedup(dtype, pattern, form),
        )
        for sparsity, goal in reach.items()
    ]


_ANY = 1 << 62
FIGURES: tuple[Figure[Case], ...] = (
    *_figures("fp32", "unstructured", "index", {0.5: 1.0, 0.7: 1.7, 0.8: 2.4, 0.9: 5.0, 0.95: 9.0}, (128, 512)),
    *_figures("int8", "4x4", "index", {0.5: 1.8, 0.8: 3.8, 0.9: 5.5}, (128, _ANY)),
    *_figures("int8", "4x1", "index", {0.8: 2.6, 0.9: 4.0}, (128, _ANY)),
    *_figures("int8", "1x4", "index", {0.8: 2.6, 0.9: 4.0}, (128, _ANY)),
    *(
        Figure(
            f"x dense fp32, M = 1, beyond the cache, {sparsity:.0%}",
            goal,
            "worst",
            _one_token(sparsity),
            _speedup("fp32", "unstructured", "bitmap"),
        )
        for sparsity, goal in {0.5: 1.6, 0.8: 3.0}.items()
    ),
    Figure("never slower: of the fastest, random layers", 0.9, "worst", _whole("sweep"), of_fastest),
    Figure("x dense int8, MiniLM, 80% 4x4", 1.4, "worst", _whole("model"), _model),
    Figure("of the dense file, fp32 80%", 0.24, "worst", _whole("file"), file_share, at_most=True),
)


def text(rows: Sequence[Row]) -> str:
    """The figures to reach: ratios of medians within one run, K, N = 768..3072, 2 threads, if not said otherwise."""
    cases = by_case(rows)
    lines = ["K, N = 768..3072, 2 threads, the form made for the case, if not said otherwise:", HEAD]
    lines += [figure.line(cases, str) for figure in FIGURES]
    lines += _sweep(rows)
    lines += _break_even(rows)
    lines += restless([r for r in timed(rows) if r.provider.startswith("pycompress")])
    above = [(r.fraction, r) for r in timed(rows) if r.fraction and r.peak_kind not in ("read_gbps", "fastest")]
    above = [(share, r) for share, r in above if share > _IMPOSSIBLE]
    if above:
        share, row = max(above, key=lambda pair: pair[0])
        most = f"{row.provider} {share:.2f} of it at {case_of(row)}"
        lines.append(f"above the peak: {len(above)} rows, {most}; it was measured too low")
    return "\n".join(lines + _not_ok(rows))


def _not_ok(rows: Sequence[Row]) -> list[str]:
    """A line for each provider and what became of it: one that fails does so in dozens of cases."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status != "ok":
            found.setdefault((row.provider, row.status), []).append(row)
    lines = []
    for (provider, status), of_it in found.items():
        first = of_it[0]
        where = "" if first.threads is None else f" {first.options}{', ' * bool(first.options)}{case_of(first)}"
        more = f" (and {len(of_it) - 1} more)" if len(of_it) > 1 else ""
        lines.append(f"{provider}{where}{more}: {status}")
    return lines


def _sweep(rows: Sequence[Row]) -> list[str]:
    ratios = [ratio for of_case in by_case(rows, "sweep").values() if (ratio := of_fastest(of_case)) is not None]
    if not ratios:
        return []
    slower = sum(ratio < 0.9 for ratio in ratios)
    share = f"worst {min(ratios):.2f}, median {median(ratios):.2f}, below 0.9: {slower}"
    return [f"never slower, {len(ratios)} random layers: {share}"]


def _break_even(rows: Sequence[Row]) -> list[str]:
    """The sparsity from which on each form is faster than dense, by the number of tokens."""
    threads = max((r.threads for r in timed(rows) if r.threads), default=0)
    found = curves(rows, threads)
    tokens = sorted({series.m for series in found})
    kinds = list(dict.fromkeys(series._replace(m=0) for series, points in found.items() if len(points) > 1))
    if not kinds:
        return []
    lines = ["", f"Break-even sparsity, {n_threads(threads)}, geometric mean of the speed-ups of the shapes:"]
    lines.append(f"{'':40}" + "".join(f"{f'M = {m}':>9}" for m in tokens))
    for kind in kinds:
        cells = [break_even(found.get(Series(m, *kind[1:]), [])) for m in tokens]
        lines.append(f"{kind!s:40}" + "".join(f"{cell:>9}" for cell in cells))
    return [*lines, ""]
