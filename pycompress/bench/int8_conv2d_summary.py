"""What the rows of int8_conv2d show: a line while measuring, the figures to reach, a table."""

from collections.abc import Callable, Sequence

from pycompress.bench.figures import HEAD, Figure, bold, fastest, grid, heading, n_threads, not_ok, restless, us
from pycompress.bench.rows import Row, timed

OURS, LAST = "pycompress-dynamic", "pycompress-dynamic-channels_last"
FP32 = "torch-fp32"
COLUMNS = {
    "dynamic": OURS,
    "dynamic, channels last": LAST,
    "static": "pycompress-static",
    "static, channels last": "pycompress-static-channels_last",
    "fp32": FP32,
    "fp32, channels last": "torch-fp32-channels_last",
    "torch static": "torch-static",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
}
Case = tuple[int, str]  # threads, the layer


def by_case(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    cases: dict[Case, list[Row]] = {}
    for row in timed(rows):
        assert row.threads is not None
        cases.setdefault((row.threads, row.options), []).append(row)
    return cases


def _find(rows: Sequence[Row], name: str) -> Row | None:
    """The provider of that name; of several engines ("torch-static-x86") the fastest."""
    exact = [r for r in rows if r.provider == name]
    return exact[0] if exact else fastest(rows, "torch-static-") if name == "torch-static" else None


def _speedup(ours: str, prefix: str) -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        mine, theirs = _find(rows, ours), fastest(rows, prefix)
        return None if mine is None or theirs is None else us(theirs) / us(mine)

    return value


def _batch(size: str) -> Callable[[Case, Sequence[Row]], bool]:
    return lambda case, _: case[1].startswith(f"batch {size},")


FIGURES: tuple[Figure[Case], ...] = (
    Figure("x fp32 (the better format), batch 8, last", 1.5, "worst", _batch("8"), _speedup(LAST, FP32)),
    Figure("x fp32 (the better format), batch 8, NCHW", 1.5, "geomean", _batch("8"), _speedup(OURS, FP32)),
    Figure("x fp32 (the better format), batch 1, last", 1.5, "geomean", _batch("1"), _speedup(LAST, FP32)),
    Figure("x torch's static int8, batch 8, last", 1.0, "geomean", _batch("8"), _speedup(LAST, "torch-static")),
)


def _label(case: Case) -> str:
    return f"{case[1]}, {n_threads(case[0])}"


def progress_line(rows: Sequence[Row]) -> str:
    """One measured case in a line: ours, fp32 and whoever failed."""
    parts = [f"{rows[0].options}, {n_threads(rows[0].threads or 1)}:"]
    for name in (OURS, LAST, FP32, "torch-fp32-channels_last"):
        found = _find(timed(rows), name)
        parts += [f"{name} {us(found):.0f} us;"] if found else []
    parts += [f"[{r.provider}: {r.status}]" for r in rows if r.status != "ok"]
    return " ".join(parts)


def text(rows: Sequence[Row]) -> str:
    """The figures to reach: ratios of medians within one run."""
    cases = by_case(rows)
    lines = [HEAD] + [figure.line(cases, _label) for figure in FIGURES]
    lines += restless([r for r in timed(rows) if r.provider == OURS])
    lines += not_ok(rows, lambda r: "" if r.threads is None else f", {r.options}, {n_threads(r.threads)}")
    return "\n".join(lines)


def tables(rows: Sequence[Row]) -> str:
    """Markdown: the machine, and the medians of each layer."""
    cases = by_case(rows)
    if not cases:
        return "Nothing was measured.\n"
    body = []
    for (threads, layer), of_case in cases.items():
        found = [_find(of_case, name) for name in COLUMNS.values()]
        best = min(us(r) for r in found if r)
        cells = ["-" if r is None else bold(f"{us(r):.0f}", us(r) == best) for r in found]
        ratio = _speedup(LAST, FP32)(of_case)
        body.append([layer, str(threads), *cells, "-" if ratio is None else f"{ratio:.2f}×"])
    title = "Median µs of one layer, fp32 to fp32; at the right ours (dynamic, channels last) against the better fp32."
    table = grid(["layer", "threads", *COLUMNS, "vs fp32"], body)
    return "\n\n".join([heading(timed(rows), rows), title, table]) + "\n"
