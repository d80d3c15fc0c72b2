"""The rows of sparse_linear as tables in Markdown, for a README."""

from collections.abc import Sequence
from statistics import median

from pycompress.bench.figures import bold, grid, heading, n_threads, us
from pycompress.bench.rows import Row
from pycompress.bench.sparse_linear_curves import (
    Case,
    Point,
    Series,
    break_even,
    by_case,
    curves,
    dense_of,
    find,
    form_of,
    measured,
)
from pycompress.bench.sparse_linear_summary import beyond_cache, file_share, of_fastest

_OVER_DENSE = "fp32 and bf16 over `nn.Linear`, int8 over our own dense `Int8Linear`"


def tables(rows: Sequence[Row]) -> str:
    """The machine; speed-ups of auto and of torch; of each form; beyond the cache; the sweep; the model."""
    done = measured(rows)
    if not done:
        return "Nothing was measured.\n"
    parts = [heading(done, rows)]
    threads = max((r.threads for r in done if r.threads), default=0)
    found = curves(rows, threads)
    shapes = sorted({(c.k, c.n) for c, of_case in by_case(rows, "layer").items() if not beyond_cache(c, of_case)})
    over = f"{_OVER_DENSE}; {n_threads(threads)}, geometric mean over K×N = {', '.join(f'{k}×{n}' for k, n in shapes)}"
    for forms, title in (
        (("auto", "csr", "bsr"), 'How many times faster `SparseLinear` with `format="auto"` is, and torch.sparse'),
        (("bitmap", "index"), "The same for each form alone, whether or not auto would choose it"),
    ):
        chosen = {series: points for series, points in found.items() if series.form in forms}
        if chosen:
            parts.append(f"{title}: {over}. Bold: faster than dense.\n\n{_speedups(chosen)}")
    parts += _beyond(rows) + _sweep(rows) + _model(rows) + _file(rows)
    return "\n\n".join(parts) + "\n"


def _speedups(found: dict[Series, list[Point]]) -> str:
    sparsities = sorted({sparsity for points in found.values() for sparsity, _ in points})
    body = []
    for series, points in found.items():
        ratios = dict(points)
        cells = [bold(f"{ratios[s]:.2f}×", ratios[s] >= 1) if s in ratios else "-" for s in sparsities]
        form = f"torch {series.form.upper()}" if series.form in ("csr", "bsr") else series.form
        body.append([str(series.m), f"{series.dtype} {series.pattern}", form, *cells, break_even(points)])
    return grid(["M", "weight", "form", *(f"{s:.0%}" for s in sparsities), "break-even"], body)


def _beyond(rows: Sequence[Row]) -> list[str]:
    body = []
    for case, of_case in sorted(by_case(rows, "layer").items()):
        dense, bitmap = dense_of(of_case, "fp32"), find(of_case, "fp32", "unstructured", "bitmap")
        if not beyond_cache(case, of_case) or case.m != 1 or dense is None or bitmap is None:
            continue
        times = [f"{us(r) / 1e3:.2f}" for r in (dense, bitmap)]
        share = f"{bitmap.fraction:.2f}" if bitmap.fraction else "-"
        ratio = f"{us(dense) / us(bitmap):.2f}×"
        size = f"{case.k}×{case.n}"
        body.append([size, str(case.threads), f"{case.sparsity:.0%}", *times, ratio, share])
    if not body:
        return []
    head = ["K×N", "threads", "sparsity", "nn.Linear", "bitmap", "bitmap over nn.Linear", "of read bandwidth"]
    return [f"Milliseconds for one token and an fp32 weight that no cache holds.\n\n{grid(head, body)}"]


def _sweep(rows: Sequence[Row]) -> list[str]:
    groups: dict[str, list[tuple[float, Case, str]]] = {}
    for case, of_case in by_case(rows, "sweep").items():
        ratio, auto = of_fastest(of_case), next((r for r in of_case if form_of(r) == "auto"), None)
        if ratio is None or auto is None:
            continue
        rest = [r for r in of_case if r is not auto]
        winner = form_of(min(rest, key=us)) if rest else "-"
        groups.setdefault(f"{auto.dtype} {auto.options}", []).append((ratio, case, winner))
    if not groups:
        return []
    everything = [entry for group in groups.values() for entry in group]
    body = []
    for name, group in [*groups.items(), ("all", everything)]:
        worst, case, winner = min(group)
        dense = sum(entry[2] == "dense" for entry in group)
        ratios = [entry[0] for entry in group]
        at = f"{case.m}×{case.k}×{case.n} at {case.sparsity:.0%}, where {winner} is fastest"
        body.append([name, str(len(group)), str(dense), f"{worst:.2f}", f"{median(ratios):.2f}", at])
    title = "Never slower: random layers, `auto` against the fastest of dense and of every form (1 is as fast)."
    head = ["weight", "layers", "dense is fastest", "worst", "median", "worst at M×K×N"]
    return [f"{title}\n\n{grid(head, body)}"]


def _model(rows: Sequence[Row]) -> list[str]:
    parts = []
    for case, of_case in by_case(rows, "model").items():
        dense = dense_of(of_case, "int8")
        body = []
        for row in of_case:
            what = f"{row.dtype} {row.sparsity:.0%} {row.options}" if row.options else f"{row.dtype} dense"
            ratio = f"{us(dense) / us(row):.2f}×" if dense else "-"
            body.append([what, f"{us(row) / 1e3:.1f}", ratio, f"{row.error:.3f}" if row.error is not None else "-"])
        title = f"{case}: milliseconds of the whole model. The error is against its own weights in float64."
        parts.append(f"{title}\n\n{grid(['model', 'ms', 'over our dense int8', 'error'], body)}")
    return parts


def _file(rows: Sequence[Row]) -> list[str]:
    parts = []
    for of_case in by_case(rows, "file").values():
        sparse, dense = find(of_case, "fp32", "unstructured", "auto"), dense_of(of_case, "fp32")
        if sparse is None or dense is None or (share := file_share(of_case)) is None:
            continue
        sizes = f"{dense.state_mb:.1f} MB dense, {sparse.state_mb:.1f} MB pruned"
        parts.append(f"File of MiniLM's {sparse.sparsity:.0%} pruned layers in fp32: {sizes}, {share:.3f} of it.")
    return parts
