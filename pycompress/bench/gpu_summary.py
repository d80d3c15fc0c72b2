"""What the rows of a benchmark on a GPU show: a line while measuring, and the tables."""

from collections.abc import Sequence

from pycompress.bench.figures import bold, fastest, grid, heading, not_ok, us
from pycompress.bench.rows import Row

OURS = "pycompress"
_FLOOR = (
    "Of floor: the least time that this GPU could take, over the time; the bytes that must move at the measured "
    "bandwidth, or the operations at the measured rate of torch's dense product, whichever takes longer."
)

Case = tuple[object, ...]


def case_of(row: Row) -> Case:
    return row.op, row.M, row.K, row.N, row.sparsity, row.options


def eager(covers: str) -> str:
    """Row.covers of the time that a caller waits for who makes one call after the other."""
    return "eager" if covers == "layer" else f"{covers}, eager"


def _label(row: Row) -> str:
    sizes = " x ".join(str(size) for size in (row.M, row.K, row.N) if size is not None)
    sparsity = f", {row.sparsity:.0%} zeros" if row.sparsity else ""
    return f"{row.op} {sizes}{sparsity}{f', {row.options}' if row.options else ''}"


def _on_device(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.status == "ok" and r.p50_us is not None and not r.covers.endswith("eager")]


def progress_line(rows: Sequence[Row]) -> str:
    """One measured case in a line: our fastest backend, the fastest of the others, and whoever failed."""
    if not rows:
        return "no provider for this case"
    parts = [_label(rows[0]) + ":"]
    done = [r for r in _on_device(rows) if r.covers != "product"]
    for best in (fastest(done, OURS), fastest([r for r in done if not r.provider.startswith(OURS)], "")):
        if best is not None:
            share = "" if best.fraction is None else f" ({best.fraction:.2f} of {best.peak_kind})"
            parts.append(f"{best.provider} {us(best):.1f} us{share};")
    parts += [f"[{r.provider}: {r.status}]" for r in rows if r.status != "ok"]
    return " ".join(parts)


def tables(rows: Sequence[Row]) -> str:
    """Markdown: the device, its peaks, a table for each case, and who is missing."""
    done = _on_device(rows)
    if not done:
        return "\n".join(["Nothing was measured.", *not_ok(rows, lambda r: "")]) + "\n"
    parts = [f"{heading(done, rows)}\n\n{_FLOOR}"]
    for case in dict.fromkeys(case_of(r) for r in done):
        parts.append(_table([r for r in rows if case_of(r) == case]))
    missing = not_ok(rows, lambda r: "" if r.M is None else f", {_label(r)}")
    return "\n\n".join(parts + (["\n".join(f"- {line}" for line in missing)] if missing else [])) + "\n"


def _table(rows: Sequence[Row]) -> str:
    done = _on_device(rows)
    body = []
    for covers in dict.fromkeys(r.covers for r in done):
        group = sorted((r for r in done if r.covers == covers), key=us)
        for row in group:
            waited = next((r for r in rows if r.provider == row.provider and r.covers == eager(covers)), None)
            body.append(
                [
                    row.provider,
                    row.dtype,
                    covers,
                    bold(f"{us(row):.1f}", row is group[0]),
                    f"{row.p20_us:.1f}–{row.p80_us:.1f}",
                    "-" if waited is None or waited.p50_us is None else f"{waited.p50_us:.1f}",
                    "-" if row.gb_s is None else f"{row.gb_s:.0f}",
                    "-" if row.gop_s is None else f"{row.gop_s / 1e3:.1f}",
                    "-" if row.fraction is None else f"{row.fraction:.2f} {row.peak_kind}",
                ]
            )
    head = ["provider", "dtype", "covers", "µs", "p20–p80", "eager µs", "GB/s", "TOP/s", "of floor"]
    return f"### {_label(done[0])}\n\n{grid(head, body)}"

