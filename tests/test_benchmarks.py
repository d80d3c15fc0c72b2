"""The benchmark harness: its statistics, its CSV, the correctness of every provider. No time is tested."""

import gc
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from pycompress import ops
from pycompress.bench import int8_matmul, int8_matmul_run, roofline, timing
from pycompress.bench import int8_matmul_summary as summary
from pycompress.bench.int8_matmul_providers import PROVIDERS, TOLERANCE, Bound, Layer, Provider
from pycompress.bench.provider import choose
from pycompress.bench.rows import Row, commit, read_csv, timed, write_csv


def row(provider: str, us: float | None, *, m: int = 128, k: int = 768, n: int = 768, **more: object) -> Row:
    """A row as if `provider` had taken `us` on a machine with a peak of 1000 GOP/s and 100 GB/s."""
    base = Row("int8_matmul", provider, "", "", "int8", "layer", M=m, N=n, K=k, threads=1, llc_mib=32.0)
    if us is not None:
        gop_s, gb_s = 2e-3 * m * n * k / us, 1e-3 * (n * k + 4 * m * (n + k)) / us
        fraction = gb_s / 100 if m == 1 else gop_s / 1000
        base = replace(base, p20_us=us, p50_us=us, p80_us=us, samples=9, gop_s=gop_s, gb_s=gb_s)
        kind, peak = ("read_gbps", 100.0) if m == 1 else ("int8_gops", 1000.0)
        base = replace(base, peak=peak, peak_kind=kind, fraction=fraction)
    return replace(base, **more)  # type: ignore[arg-type]


# ---- timing ----


def test_quantiles_interpolate_and_means_are_geometric() -> None:
    stats = timing.summarise([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (stats.p20, stats.p50, stats.p80, stats.samples) == (2.0, 3.5, 5.0, 6)
    assert timing.summarise([7.0]) == timing.Stats(7.0, 7.0, 7.0, 1)
    assert timing.geomean([1.0, 4.0]) == pytest.approx(2.0)


@pytest.mark.parametrize("reduce", [timing.summarise, timing.geomean])
def test_no_samples_raise(reduce: Callable[[list[float]], object]) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        reduce([])


def test_round_robin_gives_every_runner_a_burst_in_every_round() -> None:
    calls: list[str] = []
    runners = {name: timing.Runner(lambda name=name: calls.append(name), "pool") for name in "abc"}  # type: ignore[misc]
    found = timing.time_round_robin(runners, seconds=0.0, probe=lambda: calls.append("|"))
    rounds = "".join(calls).split("|")[2:]  # before: the calls and the probe that estimate costs
    assert len(rounds) == len(found.probes) == timing.MIN_ROUNDS
    for one in rounds:
        assert sorted(one[:: timing.MAX_BURST + 1]) == ["a", "b", "c"]
        assert {one.count(name) for name in "abc"} == {timing.MAX_BURST + 1}  # and the untimed call
    assert {s.samples for s in found.stats.values()} == {timing.MIN_ROUNDS * timing.MAX_BURST}
    assert gc.isenabled()


def test_round_robin_gives_as_long_a_burst_as_is_asked_for() -> None:
    runners = {"slow": timing.Runner(lambda: time.sleep(0.002), "")}
    found = timing.time_round_robin(runners, seconds=0.0, probe=lambda: None, burst_seconds=0.0)
    assert found.stats["slow"].samples == timing.MIN_ROUNDS


def test_round_robin_turns_garbage_collection_on_again_after_an_error() -> None:
    attempts = iter(range(3))  # two estimates, the untimed call, then StopIteration
    with pytest.raises(StopIteration):
        timing.time_round_robin({"a": timing.Runner(lambda: next(attempts), "")}, seconds=0, probe=lambda: None)
    assert gc.isenabled()


# ---- rows ----


def test_csv_round_trip(tmp_path: Path) -> None:
    absent = Row("int8_matmul", "openvino", "cpu", "", "int8", "layer", status="not installed: openvino")
    rows = [row("pycompress-dynamic", 12.5, error=0.0071, exact_sums="yes"), row("torchao", None), absent]
    write_csv(tmp_path / "rows.csv", rows)
    read = read_csv(tmp_path / "rows.csv")
    assert read[1:] == rows[1:]
    assert read[0].case == (1, 128, 768, 768)
    assert read[0].gop_s == pytest.approx(rows[0].gop_s, rel=1e-5)
    wanted = "op provider backend isa dtype M N K sparsity threads p20_us p50_us p80_us gop_s gb_s fraction"
    assert {*wanted.split(), "device", "commit"} < {f.name for f in fields(Row)}


def test_csv_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", [row("torchao", 1.0)])
    text = (tmp_path / "rows.csv").read_text().replace("fraction", "portion", 1)
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=r"missing \['fraction'\], unknown \['portion'\]"):
        read_csv(tmp_path / "rows.csv")


def test_result_files_older_than_a_column_are_read() -> None:
    published = read_csv(Path(__file__).parent.parent / "benchmarks" / "results" / "int8_matmul.csv")
    assert published
    assert {(r.options, r.extra_mb) for r in published} == {("", None)}


def test_only_whole_layers_with_a_time_count() -> None:
    product = row("torch-int_mm", 1.0, covers="product")
    rows = [row("torchao", 1.0), row("torchao", None, status="wrong"), product]
    assert timed(rows) == rows[:1]
    assert timed(rows, "product") == [product]


def test_commit_is_never_empty() -> None:
    assert commit().strip("+")


# ---- providers ----


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.name)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 48), (5, 96, 33)])
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
            assert int8_matmul_run.relative_error(y, data.y64) <= TOLERANCE[provider.dtype]
    assert provider.version


def test_choose_by_beginning_and_refuse_the_unknown() -> None:
    assert [p.name for p in choose(PROVIDERS, ["pycompress"])] == [p.name for p in PROVIDERS[:3]]
    assert choose(PROVIDERS, []) == list(PROVIDERS)
    with pytest.raises(ValueError, match="'tensorflow'; choose among: pycompress-dynamic"):
        choose(PROVIDERS, ["tensorflow"])


def test_exact_sums_notices_one_wrong_integer(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 130)
    assert int8_matmul_run.sums_are_exact(weight)
    honest = ops.int8_linear

    def off_by_one(*args: torch.Tensor, **options: object) -> torch.Tensor:
        y = honest(*args, **options)  # type: ignore[arg-type]
        y[-1, -1] += 1
        return y

    monkeypatch.setattr(ops, "int8_linear", off_by_one)
    assert not int8_matmul_run.sums_are_exact(weight)


def test_absent_failing_and_wrong_providers_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "POOL_GAP_SECONDS", 0.0)

    def raises(layer: Layer, threads: int) -> Callable[[torch.Tensor], Bound]:
        raise RuntimeError("engine  on fire")

    def zeros(layer: Layer, threads: int) -> Callable[[torch.Tensor], Bound]:
        y = torch.zeros(3, 48)
        return lambda x: Bound(lambda: y, lambda: y)

    nowhere = replace(PROVIDERS[0], name="nowhere", requires=("no_such_module_at_all",))
    broken, wrong = (replace(PROVIDERS[3], name=b.__name__, build=b) for b in (raises, zeros))
    cases = [((64, 48), [3])]
    rows = list(int8_matmul_run.run_all([nowhere, broken, wrong, PROVIDERS[3]], cases, [1], 0.01))
    assert [r.status for r in rows] == [
        "not installed: no_such_module_at_all",
        "failed: RuntimeError: engine on fire",
        "wrong",
        "ok",
    ]
    assert [r.p50_us is not None for r in rows] == [False, False, False, True]
    assert rows[2].error == pytest.approx(1.0)
    report = summary.text(rows)
    assert "nowhere: not installed" in report
    assert "raises, 3 x 64 x 48, 1 thread: failed" in report


# ---- what is made of the rows ----


def test_summary_compares_with_the_fastest_whole_layer_of_torch() -> None:
    rows = [
        row("pycompress-dynamic", 160.0, exact_sums="yes"),  # 944 of 1000 GOP/s
        row("torch-quantize_dynamic-x86", 300.0),
        row("torch-quantize_dynamic-onednn", 240.0),
        row("torch-int_mm", 100.0, covers="product"),  # less than the layer: no rival
        row("onnxruntime", 150.0),  # not torch
        row("pycompress-dynamic", 10.0, m=1),
        row("torch-quantize_dynamic-x86", 25.0, m=1),
        row("torch-fp32", 20.0, m=1),  # faster, but the figure is about quantize_dynamic
    ]
    lines = summary.text(rows).splitlines()

    def words(beginning: str) -> list[str]:
        line = next(line for line in lines if line.startswith(beginning))
        return line[len(beginning) :].split()

    assert words("of VNNI peak, M >= 128, K, N >= 384")[:4] == ["0.92", "0.94", "0.94", "reached"]
    assert words("x fastest torch layer, M >= 64 ")[:4] == ["1.20", "1.50", "1.50", "reached"]
    assert words("x quantize_dynamic, M = 1, K = N <= 768")[:4] == ["3.00", "2.50", "2.50", "MISSED"]
    assert words("x fp32 nn.Linear, both held to AVX2, M >= 64")[-2:] == ["not", "measured"]
    assert words("integer sums exact") == ["in", "every", "layer", "measured:", "yes"]


def test_summary_keeps_the_avx2_process_apart() -> None:
    ours, fp32 = row("pycompress-dynamic", 160.0), row("torch-fp32", 320.0)
    held = [replace(r, forced_isa="avx2", p50_us=r.p50_us and 3 * r.p50_us) for r in (ours, fp32)]
    lines = summary.text([ours, fp32, *held]).splitlines()
    assert "2.00   2.00  reached" in next(line for line in lines if "AVX2" in line)
    assert "x fastest torch layer, M >= 64 " in lines[3]
    assert summary.tables([ours, fp32, *held]) == summary.tables([ours, fp32])


def test_beyond_cache_means_twice_the_cache() -> None:
    figure = next(f for f in summary.FIGURES if "LLC" in f.what)
    assert figure.applies((1, 1, 8192, 8192), [row("pycompress-dynamic", 1.0, m=1, k=8192, n=8192)])
    assert not figure.applies((1, 1, 4096, 11008), [row("pycompress-dynamic", 1.0, m=1, k=4096, n=11008)])


def test_tables_mark_the_fastest_and_list_the_absent() -> None:
    absent = Row("int8_matmul", "openvino", "cpu", "", "int8", "layer", status="not installed: openvino")
    text = summary.tables([row("pycompress-dynamic", 160.0), row("torch-fp32", 320.0), absent])
    assert "| 768×768 | 128 | **160** | 320 | - | - | - | - | - | 0.94 |" in text
    assert "| 1 | 128 | 0.94 | 2.00× | - | - | - | - | - | 2.00× |" in text
    assert "Not installed: openvino." in text
    assert summary.tables([]) == "Nothing was measured.\n"


@pytest.mark.parametrize("tokens", [[1, 64], [1], [64]])
def test_roofline_writes_a_picture(tmp_path: Path, tokens: list[int]) -> None:
    rows = [row(name, 9.0, m=m) for name in ("pycompress-dynamic", "torchao") for m in tokens]
    roofline.plot(rows, tmp_path / "plot.png", summary.PLOTTED, title="int8_matmul")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_roofline_without_a_time_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        roofline.plot([], tmp_path / "none.png", summary.PLOTTED, title="int8_matmul")


# ---- the command ----


def test_main_measures_and_reports_again_from_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--shapes", "64x48", "--tokens", "1,3", "--threads", "1", "--seconds", "0.01"]
    arguments += ["--providers", "pycompress-dynamic,torch-fp32", "--out", str(tmp_path)]
    assert int8_matmul.main(arguments) == 0
    rows = read_csv(tmp_path / "int8_matmul.csv")
    assert [(r.provider, r.M) for r in rows] == [
        ("pycompress-dynamic", 1),
        ("torch-fp32", 1),
        ("pycompress-dynamic", 3),
        ("torch-fp32", 3),
    ]
    for r in rows:
        assert r.status == "ok"
        assert r.fraction is not None
        assert r.peak_kind == {1: "read_gbps"}.get(r.M or 0, {"int8": "int8_gops", "fp32": "fp32_gflops"}[r.dtype])
    assert torch.get_num_threads() == threads
    first = capsys.readouterr().out
    assert "integer sums exact in every layer measured: yes" in first

    again = tmp_path / "again"
    assert int8_matmul.main(["--from", str(tmp_path / "int8_matmul.csv"), "--out", str(again)]) == 0
    assert capsys.readouterr().out == first
    assert sorted(p.name for p in again.iterdir()) == ["int8_matmul.md", "int8_matmul.png"]


def test_main_keeps_what_it_measured_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object):  # type: ignore[no-untyped-def]
        yield row("torchao", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(int8_matmul, "run_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        int8_matmul.main(["--quick", "--out", str(tmp_path)])
    assert len(read_csv(tmp_path / "int8_matmul.csv")) == 1


@pytest.mark.parametrize(
    "bad",
    [
        ["--shapes", "768"],
        ["--tokens", "0"],
        ["--threads", "two"],
        ["--providers", "x"],
        ["--from", "no.csv"],
    ],
)
def test_main_refuses_bad_options(bad: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        int8_matmul.main([*bad, "--out", str(tmp_path / "unused")])
    assert bad[1] in capsys.readouterr().err
    assert not (tmp_path / "unused").exists()


def test_script_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "int8_matmul.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--list"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    listed = capsys.readouterr().out
    assert all(p.name in listed for p in PROVIDERS)
