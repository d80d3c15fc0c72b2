"""``pycompress bench int4_matmul``: the correctness of every provider, rows, figures and tables. No time is tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pycompress.bench import int4_matmul, int8_matmul_run
from pycompress.bench import int4_matmul_summary as summary
from pycompress.bench.int4_matmul_providers import ELEMENT_BYTES, INT4_TOLERANCE, PROVIDERS
from pycompress.bench.int8_matmul_providers import Provider
from pycompress.bench.rows import Row, read_csv


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.name)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 256, 64), (5, 128, 96)])
def test_provider_computes_the_layer(provider: Provider, m: int, k: int, n: int) -> None:
    if provider.missing:
        pytest.skip(f"{provider.missing} not installed")
    with torch.inference_mode():
        data = int8_matmul_run.make_data((k, n), m)
        bound = provider.build(data.layer, 1)(data.x)
        for _ in range(2):  # a second call reads the same input and writes the same output
            bound.run()
            y = bound.output()
            assert y.shape == (m, n)
            assert int8_matmul_run.relative_error(y, data.y64) <= INT4_TOLERANCE[provider.dtype]
    assert provider.version
    assert provider.dtype in ELEMENT_BYTES


def row(provider: str, us: float, m: int = 1, k: int = 8192, n: int = 16384) -> Row:
    return Row(
        "int4_matmul", provider, "", "", "int4", "layer", M=m, N=n, K=k, threads=1, llc_mib=32.0, p20_us=us, p50_us=us,
        p80_us=us, samples=9, gop_s=1.0, gb_s=1.0, peak=1.0, peak_kind="read_gbps", fraction=0.9,
    )  # fmt: skip


def test_figures() -> None:
    rows = [row("pycompress-int4", 100.0), row("pycompress-int8", 170.0), row("torch-fp32", 80.0)]
    lines = summary.text(rows).splitlines()
    assert "1.60     1.70   1.70  reached" in lines[1]
    assert "1.00     0.80   0.80  MISSED" in lines[2]
    within = [replace(r, K=4096) for r in rows]
    assert "not measured" in summary.text(within).splitlines()[1]  # half of it might be in the cache


def test_tables_mark_the_fastest() -> None:
    absent = Row("int4_matmul", "openvino", "cpu", "", "int4", "layer", status="not installed: openvino")
    text = summary.tables([row("pycompress-int4", 160.0), row("torch-fp32", 320.0), absent])
    assert "| 8192×16384 | 1 | **160** | - | - | 320 | - | - | - | - | - | - | 0.90 |" in text
    assert "Not installed: openvino." in text
    assert summary.tables([]) == "Nothing was measured.\n"


def test_main_measures_and_reports_again_from_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "256x48", "--tokens", "1,3", "--threads", "1", "--seconds", "0.01"]
    arguments += ["--providers", "pycompress-int4,torch-fp32", "--out", str(tmp_path)]
    assert int4_matmul.main(arguments) == 0
    rows = read_csv(tmp_path / "int4_matmul.csv")
    assert [(r.op, r.provider, r.M, r.status) for r in rows] == [
        ("int4_matmul", "pycompress-int4", 1, "ok"),
        ("int4_matmul", "torch-fp32", 1, "ok"),
        ("int4_matmul", "pycompress-int4", 3, "ok"),
        ("int4_matmul", "torch-fp32", 3, "ok"),
    ]
    for r in rows:
        assert r.gb_s is not None
        assert r.exact_sums == ""
        assert r.peak_kind == ("read_gbps" if r.M == 1 else "fp32_gflops")
    first = capsys.readouterr().out

    again = tmp_path / "again"
    assert int4_matmul.main(["--from", str(tmp_path / "int4_matmul.csv"), "--out", str(again)]) == 0
    assert capsys.readouterr().out == first
    assert sorted(p.name for p in again.iterdir()) == ["int4_matmul.md", "int4_matmul.png"]
