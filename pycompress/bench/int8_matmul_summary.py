"""What the rows of int8_matmul show: a line while measuring, the figures to reach, tables for a README."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

from pycompress.bench.figures import HEAD, Figure, bold, fastest, grid, heading, n_threads, not_ok, restless, us
from pycompress.bench.rows import Row, timed
from pycompress.bench.timing import geomean

OURS = "pycompress-dynamic"
QUANTIZE_DYNAMIC = "torch-quantize_dynamic"
# Column or curve -> the providers behind it; of several the fastest in each case.
PLOTTED = {
    "pycompress": OURS,
    "torch fp32": "torch-fp32",
    "torch bf16": "torch-bf16",
    "torch quantize_dynamic": QUANTIZE_DYNAMIC,
    "torchao": "torchao",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
}
_PEAKS = {
    "int8_gops": "int8 {:.0f} GOP/s",
    "bf16_gflops": "bf16 {:.0f} GFLOP/s",
    "fp32_gflops": "fp32 {:.0f} GFLOP/s",
    "read_gbps": "read {:.0f} GB/s",
}
_TABLE_TOKENS = (1, 16, 128, 1024)
# Of the fraction of a compute peak: beyond it the measurement is at fault.
_IMPOSSIBLE = 1.05
_OF_PEAK = "Of peak: of the VNNI peak, or of memory bandwidth for M = 1 (above 1: the weight stays in cache)."

Case = tuple[int, int, int, int]  # threads, M, K, N
Applies = Callable[[Case, Sequence[Row]], bool]
Value = Callable[[Sequence[Row]], float | None]


def by_case(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    """Timed whole-layer rows, grouped."""
    cases: dict[Case, list[Row]] = {}
    for row in timed(rows):
        cases.setdefault(row.case, []).append(row)
    return cases


def fastest_torch(rows: Sequence[Row]) -> Row | None:
    """The best whole layer that torch has: any dtype, any engine, torchao."""
    return fastest([r for r in rows if r.provider.startswith("torch")], "")


def label(case: Case) -> str:
    threads, m, k, n = case
    return f"{m} x {k} x {n}, {n_threads(threads)}"


def progress_line(rows: Sequence[Row]) -> str:
    """One measured case in a line: ours, the fastest of torch, and whoever failed."""
    parts = [label(rows[0].case) + ":"]
    done = timed(rows)
    if (ours := fastest(done, OURS)) is not None:
        share = "" if ours.fraction is None else f", {ours.fraction:.2f} of {ours.peak_kind}"
        parts.append(f"{OURS} {us(ours):.1f} us, {ours.gop_s:.0f} GOP/s{share};")
    if (other := fastest_torch(done)) is not None:
        parts.append(f"{other.provider} {us(other):.1f} us")
    parts += [f"[{r.provider}: {r.status}]" for r in rows if r.status != "ok"]
    return " ".join(parts)


# ---- the figures to reach ----


def _fraction(rows: Sequence[Row]) -> float | None:
    ours = fastest(rows, OURS)
    return None if ours is None else ours.fraction


def _speedup(other: Callable[[Sequence[Row]], Row | None]) -> Value:
    def value(rows: Sequence[Row]) -> float | None:
        ours, theirs = fastest(rows, OURS), other(rows)
        return None if ours is None or theirs is None else us(theirs) / us(ours)

    return value


def _tokens(first: int, width: int = 1, last: int | None = None) -> Applies:
    """Cases with M from `first` to `last`, K and N from `width` on."""
    return lambda case, _: first <= case[1] <= (last or case[1]) and min(case[2:]) >= width


def _small_square(case: Case, rows: Sequence[Row]) -> bool:
    return case[1] == 1 and case[2] == case[3] <= 768


def _beyond_cache(case: Case, rows: Sequence[Row]) -> bool:
    _, m, k, n = case
    llc = rows[0].llc_mib
    # Twice the cache: of a weight that just exceeds it, half would still be served from it.
    return m == 1 and llc is not None and k * n >= 2 * llc * 2**20


_vs_torch = _speedup(fastest_torch)
_vs_dynamic = _speedup(lambda rows: fastest(rows, QUANTIZE_DYNAMIC))
_vs_fp32 = _speedup(lambda rows: fastest(rows, "torch-fp32"))

FIGURES: tuple[Figure[Case], ...] = (
    Figure("of VNNI peak, M >= 128, K, N >= 384", 0.92, "worst", _tokens(128, 384), _fraction),
    Figure("of VNNI peak, M = 16, K, N >= 768", 0.85, "worst", _tokens(16, 768, 16), _fraction),
    Figure("x fastest torch layer, M >= 64", 1.2, "geomean", _tokens(64), _vs_torch),
    Figure("x fastest torch layer, M >= 64, every shape", 1.0, "worst", _tokens(64), _vs_torch),
    Figure("x fastest torch layer, M = 16", 1.4, "geomean", _tokens(16, last=16), _vs_torch),
    Figure("x quantize_dynamic, M = 1, K = N <= 768", 3.0, "worst", _small_square, _vs_dynamic),
    Figure("of read bandwidth, M = 1, weight >= 2 x LLC", 0.85, "worst", _beyond_cache, _fraction),
    Figure("x fp32 nn.Linear, both held to AVX2, M >= 64", 1.4, "worst", _tokens(64), _vs_fp32, "avx2"),
)


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """Without those of the process that was held to AVX2."""
    return [r for r in rows if r.forced_isa != "avx2"] or list(rows)


def text(rows: Sequence[Row]) -> str:
    """The figures to reach: ratios of medians within one run, over all its shapes and thread counts."""
    kept = {"": by_case(main_rows(rows)), "avx2": by_case([r for r in rows if r.forced_isa == "avx2"])}
    lines = [HEAD] + [figure.line(kept[figure.forced_isa], label) for figure in FIGURES]
    sums = {r.exact_sums for r in rows if r.exact_sums}
    if sums:
        lines.append(f"integer sums exact in every layer measured: {'yes' if sums == {'yes'} else 'NO'}")
    cases = [of_case for case, of_case in kept[""].items() if case[1] >= 16]
    winners = Counter(best.provider for of_case in cases if (best := fastest_torch(of_case)))
    shares = ", ".join(f"{name} ({count})" for name, count in winners.most_common())
    lines += [f"fastest torch layer, M >= 16: {shares}"] if shares else []
    lines += _doubts(rows)
    lines += not_ok(rows, lambda r: "" if r.threads is None else f", {label(r.case)}")
    return "\n".join(lines)


def _doubts(rows: Sequence[Row]) -> list[str]:
    """Why these rows should not be believed, if so."""
    doubts = restless([r for r in timed(rows) if r.provider == OURS])
    found = [(r.fraction, r) for r in [*timed(rows), *timed(rows, "product")] if r.fraction and r.M != 1]
    above = [(share, r) for share, r in found if share > _IMPOSSIBLE]
    if above:
        share, row = max(above, key=lambda pair: pair[0])
        most = f"{row.provider} {share:.2f} of it at {label(row.case)}"
        doubts.append(f"above the peak: {len(above)} of {len(found)} rows, {most}; it was measured too low")
    return doubts


# ---- tables ----


def tables(rows: Sequence[Row]) -> str:
    """Markdown: the machine, geometric means of the speed-up by M, and the medians of each shape."""
    rows = main_rows(rows)
    cases = by_case(rows)
    if not cases:
        return "Nothing was measured.\n"
    parts = [machine(rows), _speedups(cases), _medians(cases)]
    return "\n\n".join(parts) + "\n"


def machine(rows: Sequence[Row]) -> str:
    done = timed(rows)
    lines = [heading(done, rows)]
    for threads in sorted({r.threads for r in done if r.threads}):
        peaks = []
        for kind, shown in _PEAKS.items():
            found = [r.peak for r in done if r.peak_kind == kind and r.threads == threads and r.peak]
            peaks += [shown.format(median(found))] if found else []
        lines.append(f"Measured peaks, {n_threads(threads)}: {', '.join(peaks)}.")
    absent = [r.provider for r in rows if r.status.startswith("not installed")]
    return "\n".join(lines + ([f"Not installed: {', '.join(absent)}."] if absent else []))


def shown(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _speedups(cases: dict[Case, list[Row]]) -> str:
    rivals: dict[str, Callable[[Sequence[Row]], Row | None]] = {
        f"vs {label}": partial(fastest, prefix=prefix) for label, prefix in PLOTTED.items() if prefix != OURS
    }
    rivals["vs fastest torch"] = fastest_torch
    body = []
    for threads, m in sorted({case[:2] for case in cases}):
        group = [of_case for case, of_case in cases.items() if case[:2] == (threads, m)]
        line = [str(threads), str(m)]
        for value, shown in (
            (_fraction, "{:.2f}"),
            *((_speedup(rival), "{:.2f}×") for rival in rivals.values()),
        ):
            found = [v for of_case in group if (v := value(of_case)) is not None]
            line.append(shown.format(geomean(found)) if found else "-")
        body.append(line)
    title = "How many times faster the dynamic int8 layer of pycompress is; geometric mean over the layers. "
    return title + _OF_PEAK + "\n\n" + grid(["threads", "M", "of peak", *rivals], body)


def _medians(cases: dict[Case, list[Row]]) -> str:
    threads = max(case[0] for case in cases)
    body = []
    for case in sorted(cases, key=lambda c: (c[2] * c[3], c[2], c[1])):
        count, m, k, n = case
        if count != threads or m not in _TABLE_TOKENS:
            continue
        found = [fastest(cases[case], prefix) for prefix in PLOTTED.values()]
        best = min(us(r) for r in found if r)
        cells = ["-" if r is None else bold(shown(us(r)), us(r) == best) for r in found]
        share = _fraction(cases[case])
        body.append([f"{k}×{n}", str(m), *cells, "-" if share is None else f"{share:.2f}"])
    title = f"Median µs of one layer (K×N) for M tokens, {n_threads(threads)}. "
    return title + _OF_PEAK + "\n\n" + grid(["K×N", "M", *PLOTTED, "of peak"], body)
