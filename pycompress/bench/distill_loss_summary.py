"""What the rows of distill_loss show: a line while measuring, the figures to reach, tables for a README."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pycompress.bench.distill_loss_providers import MAIN
from pycompress.bench.figures import HEAD, Figure, bold, fastest, grid, heading, n_threads, not_ok, restless, us
from pycompress.bench.rows import Row

OURS, EAGER, COMPILE, LIGER = "pycompress", "torch-eager", "torch-compile", "liger-kernel"
SHOWN = {OURS: "pycompress", COMPILE: "torch.compile", EAGER: "torch eager", LIGER: "liger-kernel"}
FORWARD, BOTH = "forward", "forward+backward"
MAIN_OPTIONS = str(MAIN)
_WIDE = 30_000  # classes from which on the figures hold
_FIGURE_THREADS = 2
# Of the fraction of the floor, where no cache holds the logits: above it the floor was measured too high.
_IMPOSSIBLE = 1.05

Value = Callable[[Sequence[Row]], float | None]


class Case(NamedTuple):
    """What the rows of one comparison share; dtypes are within it."""

    op: str
    options: str
    tokens: int
    vocab: int
    threads: int
    covers: str

    def __str__(self) -> str:
        what = "" if self.options == MAIN_OPTIONS else f", {self.options}"
        linear = "linear " if self.op.startswith("linear") else ""
        return f"{linear}{self.tokens} x {self.vocab}{what}, {self.covers}, {n_threads(self.threads)}"


def case_of(row: Row) -> Case | None:
    if row.M is None or row.N is None or row.threads is None:
        return None
    return Case(row.op, row.options, row.M, row.N, row.threads, row.covers)


def measured(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.status == "ok" and r.p50_us is not None]


def by_case(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    cases: dict[Case, list[Row]] = {}
    for row in measured(rows):
        case = case_of(row)
        assert case is not None
        cases.setdefault(case, []).append(row)
    return cases


def find(rows: Sequence[Row], provider: str, dtype: str = "fp32") -> Row | None:
    return fastest([r for r in rows if r.dtype == dtype], provider)


def where(row: Row) -> str:
    case = case_of(row)
    return "" if case is None else f" {row.dtype}, {case}"


def progress_line(rows: Sequence[Row]) -> str:
    """One measured case in a line: the milliseconds of everyone, and who failed."""
    parts = [f"{case_of(rows[0])}:"]
    for row in measured(rows):
        share = f" ({row.fraction:.2f} of {row.peak_kind})" if row.provider == OURS and row.fraction else ""
        parts.append(f"{row.provider} {row.dtype} {us(row) / 1e3:.2f} ms{share};")
    parts += [f"[{r.provider} {r.dtype}: {r.status}]" for r in rows if r.status != "ok"]
    return " ".join(parts)


# ---- the figures to reach ----


def _speedup(*rivals: str) -> Value:
    """Over the fastest of them, in fp32."""

    def value(rows: Sequence[Row]) -> float | None:
        ours = find(rows, OURS)
        found = [us(row) for rival in rivals if (row := find(rows, rival))]
        return min(found) / us(ours) if ours and found else None

    return value


def _fraction(rows: Sequence[Row]) -> float | None:
    ours = find(rows, OURS)
    return None if ours is None else ours.fraction


def _bf16(rows: Sequence[Row]) -> float | None:
    narrow, wide = find(rows, OURS, "bf16"), find(rows, OURS)
    return us(wide) / us(narrow) if narrow and wide else None


def gradient_mb(row: Row) -> float:
    """1e6 bytes of the gradient of logits, or of the gradients of hidden states and weight."""
    assert row.M is not None
    assert row.N is not None
    elements = row.M * row.N if row.K is None else (row.M + row.N) * row.K
    return elements * (4 if row.dtype == "fp32" else 2) / 1e6


def _mb_a_thread(rows: Sequence[Row]) -> float | None:
    """Of the dtype that needs most besides its gradient."""
    found = [
        max(0.0, r.extra_mb - gradient_mb(r)) / r.threads
        for r in rows
        if r.provider == OURS and r.extra_mb is not None and r.threads
    ]
    return max(found, default=None)


def _memory_share(rows: Sequence[Row]) -> float | None:
    """Of the composition as it is written; of the compiled one the two gradients alone can be more than a tenth."""
    ours, theirs = find(rows, OURS), find(rows, EAGER)
    return ours.extra_mb / theirs.extra_mb if ours and theirs and ours.extra_mb and theirs.extra_mb else None


def _logits(covers: str, first: int = _WIDE, last: int = 1 << 62) -> Callable[[Case, Sequence[Row]], bool]:
    """Cases of the main loss with `first` to `last` classes. covers: "" for both directions."""

    def applies(case: Case, rows: Sequence[Row]) -> bool:
        same = case.op == "distill_loss" and case.options == MAIN_OPTIONS and case.threads == _FIGURE_THREADS
        return same and covers in ("", case.covers) and first <= case.vocab <= last

    return applies


def _linear(case: Case, rows: Sequence[Row]) -> bool:
    return case.op == "linear_distill_loss" and case.covers == BOTH and case.threads == _FIGURE_THREADS


FIGURES: tuple[Figure[Case], ...] = (
    Figure("x torch.compile, forward", 7.0, "worst", _logits(FORWARD), _speedup(COMPILE)),
    Figure("x torch eager, forward", 25.0, "worst", _logits(FORWARD), _speedup(EAGER)),
    Figure("x torch.compile, forward + backward", 9.0, "worst", _logits(BOTH), _speedup(COMPILE)),
    Figure("x torch eager, forward + backward", 35.0, "worst", _logits(BOTH), _speedup(EAGER)),
    Figure("of the floor, forward + backward", 0.6, "worst", _logits(BOTH), _fraction),
    Figure("x torch.compile, both, V = 1000", 5.0, "worst", _logits(BOTH, 1000, 1000), _speedup(COMPILE)),
    Figure("x torch.compile, both, V = 10", 2.0, "worst", _logits(BOTH, 10, 10), _speedup(COMPILE)),
    Figure("x our own fp32, bf16 logits", 1.1, "worst", _logits(""), _bf16),
    Figure("MB a thread besides the gradient", 1.0, "worst", _logits(BOTH), _mb_a_thread, at_most=True),
    Figure("linear: of the memory of torch eager", 0.1, "worst", _linear, _memory_share, at_most=True),
    Figure("linear: x the faster of the two, both", 1.0, "worst", _linear, _speedup(EAGER, COMPILE)),
)


def text(rows: Sequence[Row]) -> str:
    """The figures to reach: ratios of medians within one run, fp32, V >= 30000, 2 threads, if not said otherwise."""
    cases = by_case(rows)
    lines = ["Given logits, fp32, V >= 30000, 2 threads, if not said otherwise:", HEAD]
    lines += [figure.line(cases, str) for figure in FIGURES]
    ours = [r for r in measured(rows) if r.provider == OURS]
    lines += restless(ours)
    above = [r for r in ours if r.fraction and r.fraction > _IMPOSSIBLE and not _in_cache(r)]
    lines += [f"above the floor: {r.fraction:.2f} at{where(r)}; it was measured too high" for r in above]
    lines += not_ok(rows, where)
    return "\n".join(lines)


def _in_cache(row: Row) -> bool:
    """Whether a call may find the logits there that its predecessor read."""
    return row.op == "distill_loss" and 2 * gradient_mb(row) < 2**20 / 1e6 * (row.llc_mib or 0.0)


# ---- tables ----


def tables(rows: Sequence[Row]) -> str:
    """Markdown: the machine; times by shape; times by options; memory; the linear loss. On the most threads."""
    done = measured(rows)
    if not done:
        return "Nothing was measured.\n"
    most = max(r.threads for r in done if r.threads)
    cases = {case: found for case, found in by_case(rows).items() if case.threads == most}
    of_logits = {case: found for case, found in cases.items() if case.op == "distill_loss"}
    parts = [heading(done, rows)]
    main = {case: found for case, found in of_logits.items() if case.options == MAIN_OPTIONS}
    if main:
        title = f"Median milliseconds of `DistillationLoss`, {MAIN_OPTIONS}, {n_threads(most)}."
        parts.append(f"{title}\n\n{_times(main, _shape)}")
    if len({case.options for case in of_logits}) > 1:
        shapes = {case[2:4] for case in of_logits if case.options != MAIN_OPTIONS}
        same = {case: found for case, found in of_logits.items() if case[2:4] in shapes}
        parts.append(f"The same for other options, fp32.\n\n{_times(same, _options, dtypes=('fp32',))}")
    if any(r.extra_mb is not None for found in of_logits.values() for r in found):
        parts.append(f"MB that forward and backward need at most besides the logits.\n\n{_memory(of_logits)}")
    linear = {case: found for case, found in cases.items() if case.op == "linear_distill_loss"}
    if linear:
        parts.append(f"`LinearDistillationLoss`, {n_threads(most)}.\n\n{_linear_table(linear)}")
    return "\n\n".join(parts) + "\n"


def _shape(row: Row) -> str:
    return f"{row.M}×{row.N} {row.dtype}"


def _options(row: Row) -> str:
    return f"{row.M}×{row.N}, {row.options}"


def _shown(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _by_dtype(cases: dict[Case, list[Row]], dtypes: Sequence[str]) -> list[tuple[Row, dict[str, Row]]]:
    """For each case and dtype any of its rows, and all by provider."""
    found = []
    for of_case in cases.values():
        for dtype in dtypes:
            same = {r.provider: r for r in of_case if r.dtype == dtype}
            if same:
                found.append((next(iter(same.values())), same))
    return found


def _times(
    cases: dict[Case, list[Row]], label: Callable[[Row], str], dtypes: Sequence[str] = ("fp32", "bf16", "fp16")
) -> str:
    names = (OURS, COMPILE, EAGER)
    body = []
    for any_row, by_provider in _by_dtype(cases, dtypes):
        found = [by_provider.get(name) for name in names]
        best = min(us(r) for r in found if r)
        cells = ["-" if r is None else bold(_shown(us(r) / 1e3), us(r) == best) for r in found]
        ours = by_provider.get(OURS)
        ratios = [f"{us(r) / us(ours):.1f}×" if r and ours else "-" for r in found[1:]]
        share = f"{ours.fraction:.2f}" if ours and ours.fraction else "-"
        body.append([label(any_row), any_row.covers, *cells, *ratios, share])
    head = ["T×V", "pass", *(SHOWN[n] for n in names), *(f"vs {SHOWN[n]}" for n in names[1:]), "of the floor"]
    return grid(head, body)


def _memory(cases: dict[Case, list[Row]]) -> str:
    names = (OURS, COMPILE, EAGER)
    body = []
    for any_row, by_provider in _by_dtype(cases, ("fp32", "bf16", "fp16")):
        found = [by_provider.get(name) for name in names]
        if not any(r and r.extra_mb is not None for r in found):
            continue
        cells = ["-" if r is None or r.extra_mb is None else f"{r.extra_mb:.1f}" for r in found]
        body.append([_shape(any_row), f"{gradient_mb(any_row):.1f}", *cells])
    return grid(["T×V", "the gradient alone", *(SHOWN[n] for n in names)], body)


def _linear_table(cases: dict[Case, list[Row]]) -> str:
    body = []
    for any_row, by_provider in _by_dtype(cases, ("fp32", "bf16", "fp16")):
        found = [by_provider.get(name) for name in SHOWN]
        best = min(us(r) for r in found if r)
        cells = ["-" if r is None else bold(_shown(us(r) / 1e3), us(r) == best) for r in found]
        shape = f"{any_row.M}×{any_row.K}×{any_row.N} {any_row.dtype}"
        body.append([shape, f"{any_row.covers}, ms", *cells, ""])
        if any(r and r.extra_mb is not None for r in found):
            extra = ["-" if r is None or r.extra_mb is None else f"{r.extra_mb:.0f}" for r in found]
            body.append([shape, f"{any_row.covers}, MB", *extra, f"{gradient_mb(any_row):.0f}"])
    return grid(["T×H×V", "", *SHOWN.values(), "the gradients alone"], body)
