"""What the rows of the benchmark of sparse_linear show: figures, break-even points, tables and the plot."""

from dataclasses import replace
from pathlib import Path

import pytest

from pycompress.bench import sparse_linear_plot
from pycompress.bench import sparse_linear_summary as summary
from pycompress.bench.rows import Row
from pycompress.bench.sparse_linear_curves import Series, break_even, curves
from pycompress.bench.sparse_linear_tables import tables


def row(name: str, us: float | None, pattern: str = "", *, m: int = 128, s: float = 0.8, **more: object) -> Row:
    """As if `name`, which ends with its dtype, had taken `us`."""
    base = Row(
        "sparse_linear", name, "", "", name.split("-")[-1], "layer", M=m, N=768, K=768, sparsity=s, threads=2,
        llc_mib=32.0, options=pattern,
    )  # fmt: skip
    if us is not None:
        base = replace(base, p20_us=us, p50_us=us, p80_us=us, samples=9)
    return replace(base, **more)  # type: ignore[arg-type]


def _rows() -> list[Row]:
    rows = []
    for s, fp32, block4 in ((0.5, 1250.0, 400.0), (0.8, 500.0, 200.0), (0.9, 100.0, 100.0)):
        rows += [
            row("torch-dense-fp32", 1000.0, s=s),
            row("pycompress-index-fp32", fp32, "unstructured", s=s),
            row("pycompress-auto-fp32", min(fp32, 1000.0), "unstructured", s=s),
            row("torch-csr-fp32", 4 * fp32, "unstructured", s=s),
            row("pycompress-dense-int8", 800.0, s=s),
            row("pycompress-index-int8", block4, "4x4", s=s),
        ]
    beyond = {"m": 1, "K": 8192, "N": 16384}
    rows += [row("torch-dense-fp32", 9000.0, **beyond), row("pycompress-bitmap-fp32", 2500.0, "unstructured", **beyond)]
    for us, m in ((90.0, 7), (100.0, 8)):
        auto = row("pycompress-auto-int8", 100.0, "4x4", covers="sweep", m=m, s=0.6)
        rows += [
            replace(auto, peak_kind="fastest", fraction=us / 100),
            row("pycompress-dense-int8", us, covers="sweep", m=m, s=0.6),
            row("pycompress-index-int8", 120.0, "4x4", covers="sweep", m=m, s=0.6),
        ]
    whole = {"covers": "model", "m": 1024, "K": None, "N": None}
    rows += [row("torch-dense-fp32", 9e4, s=0.0, error=1e-6, **whole)]
    rows += [row("pycompress-dense-int8", 4e4, s=0.0, **whole), row("pycompress-auto-int8", 3e4, "4x4", **whole)]
    file = {"covers": "file", "threads": None, "M": None, "K": None, "N": None}
    rows += [row("torch-dense-fp32", None, s=0.0, state_mb=40.0, **file)]
    rows += [row("pycompress-auto-fp32", None, "unstructured", state_mb=9.2, **file)]
    return rows


def test_summary_sets_the_figures_against_the_goals() -> None:
    lines = summary.text(_rows()).splitlines()

    def words(beginning: str) -> list[str]:
        line = next(line for line in lines if line.startswith(beginning))
        return line[len(beginning) :].split()

    assert words("x dense fp32, unstructured, M = 128..512, 50%")[:4] == ["1.00", "0.80", "0.80", "MISSED"]
    assert words("x dense fp32, unstructured, M = 128..512, 90%")[:4] == ["5.00", "10.00", "10.00", "reached"]
    assert words("x dense fp32, unstructured, M = 128..512, 95%")[-2:] == ["not", "measured"]
    assert words("x dense int8, 4x4, M >= 128, 50%")[:4] == ["1.80", "2.00", "2.00", "reached"]
    assert words("x dense int8, 1x4, M >= 128, 80%")[-2:] == ["not", "measured"]
    assert words("x dense fp32, M = 1, beyond the cache, 80%")[:4] == ["3.00", "3.60", "3.60", "reached"]
    assert words("never slower: of the fastest, random layers")[:4] == ["0.90", "0.95", "0.90", "reached"]
    assert words("never slower, 2 random layers:") == ["worst", "0.90,", "median", "0.95,", "below", "0.9:", "0"]
    assert words("x dense int8, MiniLM, 80% 4x4")[:4] == ["1.40", "1.33", "1.33", "MISSED"]
    assert words("of the dense file, fp32 80%")[:4] == ["0.24", "0.23", "0.23", "reached"]


def test_figures_are_of_two_threads_only() -> None:
    one = [replace(r, threads=1) for r in _rows() if r.covers != "file"]
    assert "reached" not in summary.text(one)


def test_break_even_is_where_the_curve_crosses_one() -> None:
    assert break_even([(0.5, 0.5), (0.75, 1.0), (0.9, 2.5)]) == "0.75"
    assert break_even([(0.5, 0.8), (0.9, 4.0)]) == "0.60"  # time proportional to the weights kept: 0.4 / (1 - s)
    assert break_even([(0.5, 1.2), (0.7, 0.9), (0.9, 3.0)])[:3] == "0.7"
    assert break_even([(0.5, 1.0), (0.9, 3.0)]) == "< 0.5"
    assert break_even([(0.5, 0.1), (0.9, 0.9)]) == "> 0.9"
    assert break_even([(0.5, 2.0)]) == "-"
    report = summary.text(_rows())
    assert "Break-even sparsity, 2 threads" in report
    line = next(line for line in report.splitlines() if line.startswith("pycompress fp32 unstructured, index"))
    assert line.split()[-1] == "0.60"
    assert "- " not in line.split()


def test_curves_are_means_over_the_shapes_measured_at_most_sparsities() -> None:
    rows = _rows()
    wider = [replace(r, K=3072, p50_us=r.p50_us / 4) for r in rows if r.covers == "layer" and r.K == 768 and r.p50_us]
    wider = [replace(r, p50_us=r.p50_us * 4) if "dense" in r.provider and r.p50_us else r for r in wider]
    found = curves([*rows, *wider], 2)
    sparsities, ratios = zip(*found[Series(128, "fp32", "unstructured", "index")], strict=True)
    assert sparsities == (0.5, 0.8, 0.9)
    assert ratios == pytest.approx((1.6, 4.0, 20.0))  # of 0.8 and 3.2 and so on
    assert found[Series(1, "fp32", "unstructured", "bitmap")] == [(0.8, pytest.approx(3.6))]
    once = [replace(r, M=1) for r in rows if r.covers == "layer" and r.provider.endswith("fp32") and r.K == 768]
    once = [replace(r, provider=r.provider.replace("index", "bitmap")) for r in once]
    found = curves([*rows, *once], 2)  # three sparsities of 768 x 768, one of the weight beyond the cache
    assert [s for s, _ in found[Series(1, "fp32", "unstructured", "bitmap")]] == [0.5, 0.8, 0.9]
    assert curves(rows, 1) == {}


def test_tables_hold_every_part() -> None:
    text = tables(_rows())
    assert "| 128 | fp32 unstructured | auto | **1.00×** | **2.00×** | **10.00×** | < 0.5 |" in text
    assert "| 128 | fp32 unstructured | torch CSR | 0.20× | 0.50× | **2.50×** |" in text
    assert "| 128 | int8 4x4 | index | **2.00×** | **4.00×** | **8.00×** | < 0.5 |" in text
    assert "| 8192×16384 | 2 | 80% | 9.00 | 2.50 | 3.60× | - |" in text
    assert "| int8 4x4 | 2 | 2 | 0.90 | 0.95 | 7×768×768 at 60%, where dense is fastest |" in text
    assert "| int8 80% 4x4 | 30.0 | 1.33× | - |" in text
    assert "40.0 MB dense, 9.2 MB pruned, 0.230 of it" in text
    assert tables([]) == "Nothing was measured.\n"


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    assert sparse_linear_plot.can_plot(_rows())
    sparse_linear_plot.plot(_rows(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_a_curve_says_so(tmp_path: Path) -> None:
    rows = [row("torch-dense-fp32", 1.0)]
    assert not sparse_linear_plot.can_plot(rows)
    with pytest.raises(ValueError, match="nothing to plot"):
        sparse_linear_plot.plot(rows, tmp_path / "none.png")
