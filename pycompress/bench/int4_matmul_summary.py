"""What the rows of int4_matmul show: a line while measuring, the figures to reach, tables for a README."""

from collections.abc import Sequence

from pycompress.bench.figures import HEAD, Figure, bold, fastest, grid, n_threads, not_ok, restless, us
from pycompress.bench.int4_matmul_providers import ELEMENT_BYTES
from pycompress.bench.int8_matmul_summary import Case, by_case, label, machine, shown
from pycompress.bench.rows import Row, timed

OURS = "pycompress-int4"
# Column or curve -> the beginning of the names behind it; of several the fastest in each case.
PLOTTED = {
    "int4": OURS,
    "nf4": "pycompress-nf4",
    "int8 weights": "pycompress-int8",
    "torch fp32": "torch-fp32",
    "torch bf16": "torch-bf16",
    "torch int4pack": "torch-int4pack",
    "ONNX Runtime": "onnxruntime-fp32",
    "OpenVINO": "openvino-fp32",
}
# In tables also who rounds the activations to int8.
_COLUMNS = PLOTTED | {"ONNX Runtime a8": "onnxruntime-a8", "OpenVINO a8": "openvino-a8"}


def progress_line(rows: Sequence[Row]) -> str:
    """One measured case in a line: ours, our int8, fp32, and whoever failed."""
    parts, done = [label(rows[0].case) + ":"], timed(rows)
    for name in (OURS, "pycompress-nf4", "pycompress-int8", "torch-fp32"):
        if (row := fastest(done, name)) is not None:
            share = "" if row.fraction is None or name != OURS else f" ({row.fraction:.2f} of {row.peak_kind})"
            parts.append(f"{name} {us(row):.1f} us{share}")
    parts += [f"[{r.provider}: {r.status}]" for r in rows if r.status != "ok"]
    return " ".join(parts)


def _beyond_cache(case: Case, rows: Sequence[Row]) -> bool:
    """Twice the cache: of a weight that just exceeds it, half would still be served from it."""
    _, m, k, n = case
    llc = rows[0].llc_mib
    return m == 1 and llc is not None and ELEMENT_BYTES["int4"][0] * k * n >= 2 * llc * 2**20


def _speedup(prefix: str, rows: Sequence[Row]) -> float | None:
    ours, theirs = fastest(rows, OURS), fastest(rows, prefix)
    return None if ours is None or theirs is None else us(theirs) / us(ours)


def _fraction(rows: Sequence[Row]) -> float | None:
    ours = fastest(rows, OURS)
    return None if ours is None else ours.fraction


FIGURES: tuple[Figure[Case], ...] = (
    Figure(
        "x int8 weights, M = 1, int4 weight >= 2 x LLC", 1.6, "worst", _beyond_cache,
        lambda rows: _speedup("pycompress-int8", rows),
    ),
    Figure(
        "x fp32 nn.Linear, M <= 4", 1.0, "worst", lambda case, _: case[1] <= 4,
        lambda rows: _speedup("torch-fp32", rows),
    ),
)  # fmt: skip


def text(rows: Sequence[Row]) -> str:
    """The figures to reach: ratios of medians within one run."""
    cases = by_case(rows)
    lines = [HEAD] + [figure.line(cases, label) for figure in FIGURES]
    lines += restless([r for r in timed(rows) if r.provider == OURS])
    lines += not_ok(rows, lambda r: "" if r.threads is None else f", {label(r.case)}")
    return "\n".join(lines)


def tables(rows: Sequence[Row]) -> str:
    """Markdown: the machine, and the medians of each shape, a table a number of threads."""
    cases = by_case(rows)
    if not cases:
        return "Nothing was measured.\n"
    counts = sorted({case[0] for case in cases}, reverse=True)
    return "\n\n".join([machine(rows), *(_medians(cases, threads) for threads in counts)]) + "\n"


def _medians(cases: dict[Case, list[Row]], threads: int) -> str:
    body = []
    for case in sorted(cases, key=lambda c: (c[2] * c[3], c[2], c[1])):
        count, m, k, n = case
        if count != threads:
            continue
        found = [fastest(cases[case], prefix) for prefix in _COLUMNS.values()]
        best = min(us(r) for r in found if r)
        cells = ["-" if r is None else bold(shown(us(r)), us(r) == best) for r in found]
        share = _fraction(cases[case])
        body.append([f"{k}×{n}", str(m), *cells, "-" if share is None else f"{share:.2f}"])
    title = f"Median µs of one layer (K×N) for M tokens, {n_threads(threads)}. Of peak: of what pycompress-int4 could "
    title += "reach at the fp32 peak, or at the memory's bandwidth for M = 1 (above 1: the weight stays in cache). "
    title += "a8: with activations rounded to int8."
    return title + "\n\n" + grid(["K×N", "M", *_COLUMNS, "of peak"], body)
