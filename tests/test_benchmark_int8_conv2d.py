"""The benchmark of convolutions: every provider is right, and the report reads its own rows. No time is tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pycompress.bench import int8_conv2d as bench
from pycompress.bench import int8_conv2d_summary as summary
from pycompress.bench.int8_conv2d_providers import PROVIDERS
from pycompress.bench.provider import Machine
from pycompress.bench.rows import read_csv


def test_the_layers_are_those_of_the_networks() -> None:
    assert len(set(bench.RESNET50)) == len(bench.RESNET50) == 23
    assert bench.Shape(1024, 2048, 1, 2, 14) in bench.RESNET50
    assert bench.Shape(256, 512, 3, 2, 14) in bench.RESNET18
    assert set(bench.SHAPES) == {*bench.RESNET50, *bench.RESNET18}


@pytest.mark.usefixtures("one_thread")
def test_every_provider_is_right() -> None:
    shape = bench.Shape(8, 16, 3, 2, 10)
    present = [p for p in PROVIDERS if not p.missing]
    with torch.inference_mode():
        rows = bench.run_case(Machine.of("a CPU", 32.0), present, shape, 2, 1, 0.0)
    assert {r.provider: r.status for r in rows} == {p.name: "ok" for p in present}
    assert (rows[0].M, rows[0].K, rows[0].N) == (50, 72, 16)


@pytest.mark.usefixtures("one_thread")
def test_main_writes_what_it_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", (bench.Shape(4, 8, 1, 1, 6),))
    options = ["--quick", "--batch=8", "--threads=1", "--providers=pycompress,torch-fp32", "--seconds=0.001"]
    assert bench.main([*options, "--out", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "int8_conv2d.csv")
    assert "batch 8, 4x6x6 to 8, 1x1/1" in (tmp_path / "int8_conv2d.md").read_text(encoding="utf-8")
    assert "x fp32 (the better format), batch 8, last" in summary.text(rows)
    assert "not measured" in summary.text(rows)
