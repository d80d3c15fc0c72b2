"""The benchmark of distill_loss: its data, its floor, the correctness of every provider. No time is tested."""

import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pycompress import peaks
from pycompress.bench import distill_loss, distill_loss_plot, distill_loss_run, memory
from pycompress.bench import distill_loss_summary as summary
from pycompress.bench.distill_loss import OPTIONS
from pycompress.bench.distill_loss_providers import MAIN, PROVIDERS, LossFn, Options, Provider, composition
from pycompress.bench.distill_loss_run import BOTH, FORWARD, TOLERANCE, Call, Case
from pycompress.bench.rows import Row, read_csv

OURS, EAGER, COMPILE, LIGER = PROVIDERS


def row(provider: str, us: float | None, covers: str = BOTH, *, v: int = 30522, t: int = 512, **more: object) -> Row:
    """As if `provider` had taken `us` on a machine with a floor of 1000 µs."""
    base = Row("distill_loss", provider, "", "", "fp32", covers, M=t, N=v, threads=2, options=str(MAIN), llc_mib=32.0)
    if us is not None:
        base = replace(base, p20_us=us, p50_us=us, p80_us=us, samples=9, gb_s=1e5 / us)
        base = replace(base, peak=50.0, peak_kind="read_gbps", fraction=1000 / us)
    return replace(base, **more)  # type: ignore[arg-type]


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without the C++ compiler, which takes most of a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


# ---- what is computed ----


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_composition_is_the_formula(options: Options) -> None:
    data = distill_loss_run.make_data(Case(5, 7, options=options), "fp32")
    s, t, labels = data.arguments
    assert s is not None
    assert t is not None
    tau, alpha, beta = options.temperature, options.alpha, options.beta
    expected = 0.0
    for row_ in range(5):
        q, p, hard = (
            (x.double() / x_tau).exp() / (x.double() / x_tau).exp().sum()
            for x, x_tau in ((s[row_], tau), (t[row_], tau), (s[row_], 1.0))
        )
        m = beta * p + (1 - beta) * q
        kl = {
            "forward_kl": (p * (p / q).log()).sum(),
            "reverse_kl": (q * (q / p).log()).sum(),
            "jsd": beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum(),
        }[options.divergence]
        expected += (1 - alpha) * tau**2 * float(kl) / 5
        if labels is not None:
            expected -= alpha * float(hard[labels[row_]].log()) / 5
    assert (labels is None) == (alpha == 0)
    assert composition(options)(s.double(), t.double(), labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("hidden", [None, 8], ids=["logits", "linear"])
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.name)
def test_provider_computes_loss_and_gradient(provider: Provider, hidden: int | None) -> None:
    if provider.missing:
        pytest.skip(f"{provider.missing} not installed")
    if hidden is None and provider.loss is None:
        assert "GPU" in provider.why_not
        return
    case = Case(6, 33, hidden)
    data = distill_loss_run.make_data(case, "fp32")
    exact = distill_loss_run.truth(case, data)
    call = Call(provider, "fp32", distill_loss_run.build(provider, case), data, data.wanting_gradients())
    for direction in (FORWARD, BOTH, BOTH):  # a second gradient replaces the first, it does not add to it
        assert call.error(direction, exact) <= TOLERANCE["fp32"]
    assert provider.version


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_half_precision_is_within_its_tolerance(options: Options, dtype: str) -> None:
    case = Case(64, 1000, options=options)
    data = distill_loss_run.make_data(case, dtype)
    exact = distill_loss_run.truth(case, data)
    for provider in (OURS, EAGER):
        call = Call(provider, dtype, distill_loss_run.build(provider, case), data, data.wanting_gradients())
        assert call.error(BOTH, exact) <= TOLERANCE[dtype]


def test_a_gradient_of_nan_is_an_error_of_nan() -> None:
    case = Case(3, 5)
    data = distill_loss_run.make_data(case, "fp32")
    exact = distill_loss_run.truth(case, data)

    def bad(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        loss = composition(MAIN)(student, teacher, labels)
        return loss + (student[0, 0] - student[0, 0].detach()) * float("nan") if student.requires_grad else loss

    call = Call(EAGER, "fp32", bad, data, data.wanting_gradients())
    assert call.error(FORWARD, exact) <= 1e-5
    assert not call.error(BOTH, exact) <= 1e-5


def test_absent_failing_and_wrong_providers_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_loss_run, "PEAK_SECONDS", 0.001)

    def raises(options: Options) -> LossFn:
        raise RuntimeError("no  compiler")

    def half(options: Options) -> LossFn:
        return lambda *arguments: 0.5 * composition(options)(*arguments)

    nowhere = replace(EAGER, name="nowhere", requires=("no_such_module_at_all",))
    broken, wrong = (replace(EAGER, name=make.__name__, loss=make) for make in (raises, half))
    unable = replace(EAGER, name="unable", loss=None, why_not="for GPUs")
    rows = list(distill_loss_run.run_all([nowhere, broken, wrong, unable, EAGER], [Case(4, 9)], [1], 0.0, False))
    assert [(r.provider, r.covers, r.status) for r in rows] == [
        ("nowhere", BOTH, "not installed: no_such_module_at_all"),
        ("unable", BOTH, "no logits: for GPUs"),
        ("raises", FORWARD, "failed: RuntimeError: no compiler"),
        ("half", FORWARD, "wrong"),
        ("torch-eager", FORWARD, "ok"),
        ("raises", BOTH, "failed: RuntimeError: no compiler"),
        ("half", BOTH, "wrong"),
        ("torch-eager", BOTH, "ok"),
    ]
    assert [r.p50_us is not None for r in rows] == [r.status == "ok" for r in rows]
    assert rows[3].error == pytest.approx(0.5)
    report = summary.text(rows)
    assert "unable: no logits: for GPUs" in report
    assert f"half fp32, 4 x 9, {BOTH}, 1 thread: wrong" in report


# ---- the floor ----


@pytest.mark.parametrize(
    ("options", "dtype", "direction", "giga_bytes", "giga_exponentials"),
    [
        (MAIN, "fp32", FORWARD, 8, 2),
        (MAIN, "bf16", BOTH, 6, 2),
        (OPTIONS["tau1"], "fp32", BOTH, 12, 2),
        (OPTIONS["tau3"], "fp32", BOTH, 12, 3),
        (replace(OPTIONS["tau3"], alpha=0.0), "fp32", BOTH, 12, 2),
    ],
)
def test_floor_counts_passes_and_exponentials(
    options: Options, dtype: str, direction: str, giga_bytes: float, giga_exponentials: float
) -> None:
    work = distill_loss_run.floor_work(Case(1000, 1_000_000, options=options), dtype, direction)
    assert work == pytest.approx({"read_gbps": giga_bytes, "exp_g": giga_exponentials})


def test_floor_is_the_slower_of_what_the_machine_tells() -> None:
    work = {"read_gbps": 12.0, "exp_g": 2.0}

    def of(read: float | None, exp: float | None) -> dict[str, object]:
        probe = SimpleNamespace(read_gbps=read, exp_g=exp)
        return distill_loss_run.of_floor(work, [probe], 0.5)  # type: ignore[list-item]

    assert of(48, 16) == {"peak": 48, "peak_kind": "read_gbps", "fraction": 0.5}
    assert of(48, 5) == {"peak": 5, "peak_kind": "exp_g", "fraction": 0.8}
    assert of(48, None)["peak_kind"] == "read_gbps"
    assert of(None, None) == {}


def test_work_of_the_linear_loss_is_its_products() -> None:
    case = Case(10, 1000, 100)
    assert distill_loss_run.floor_work(case, "fp32", FORWARD)["fp32_gflops"] == pytest.approx(2 * 2e-3)
    assert distill_loss_run.floor_work(case, "fp32", BOTH)["fp32_gflops"] == pytest.approx(4 * 2e-3)


# ---- memory ----


@pytest.mark.skipif(not memory.can_measure(), reason="needs /proc/self/clear_refs")
def test_peak_extra_bytes_sees_what_is_freed_again() -> None:
    x = torch.randn(1000, 8000)
    torch.neg(torch.neg(x[:10]))
    assert 60e6 < memory.peak_extra_bytes(lambda: torch.neg(torch.neg(x)).sum()) < 75e6
    assert memory.peak_extra_bytes(lambda: None) < 2e6


def test_a_failing_subprocess_gives_its_error() -> None:
    with pytest.raises(RuntimeError, match=r"shutil:which: TypeError: .*'nonsense'"):
        memory.in_subprocess("shutil:which", nonsense=1)


@pytest.mark.skipif(not memory.can_measure(), reason="needs /proc/self/clear_refs")
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    case = Case(64, 30522)
    data = distill_loss_run.make_data(case, "fp32")
    call = Call(OURS, "fp32", distill_loss_run.build(OURS, case), data, data.wanting_gradients())
    found = distill_loss_run.measured_memory(call, case, 1)
    gradient = 64 * 30522 * 4 / 1e6
    assert found is not None
    assert 0.9 * gradient < found < 1.5 * gradient


# ---- what is made of the rows ----


def _rows() -> list[Row]:
    return [
        row("pycompress", 1250.0, extra_mb=62.5 + 1.0),  # 0.80 of the floor, half a MB a thread
        row("torch-compile", 10_000.0, extra_mb=187.0),
        row("torch-eager", 50_000.0, extra_mb=400.0),
        row("pycompress", 1000.0, dtype="bf16"),
        row("pycompress", 100.0, FORWARD),
        row("torch-compile", 900.0, FORWARD),
        row("pycompress", 10.0, v=10),
        row("torch-compile", 15.0, v=10),
        row("pycompress", 1.0, options=str(OPTIONS["jsd"])),
        row("torch-compile", 1.0, options=str(OPTIONS["jsd"])),
        row("pycompress", 30.0, op="linear_distill_loss", K=384, extra_mb=40.0),
        row("torch-compile", 60.0, op="linear_distill_loss", K=384, extra_mb=300.0),
        row("torch-eager", 20.0, op="linear_distill_loss", K=384, extra_mb=800.0),
    ]


def test_summary_sets_the_figures_against_the_goals() -> None:
    lines = summary.text(_rows()).splitlines()

    def words(beginning: str) -> list[str]:
        line = next(line for line in lines if line.startswith(beginning))
        return line[len(beginning) :].split()

    assert words("x torch.compile, forward  ")[:4] == ["7.00", "9.00", "9.00", "reached"]
    assert words("x torch.compile, forward + backward")[:4] == ["9.00", "8.00", "8.00", "MISSED"]
    assert words("x torch eager, forward + backward")[:4] == ["35.00", "40.00", "40.00", "reached"]
    assert words("of the floor, forward + backward")[:4] == ["0.60", "0.80", "0.80", "reached"]
    assert words("x torch.compile, both, V = 10 ")[:4] == ["2.00", "1.50", "1.50", "MISSED"]
    assert words("x torch.compile, both, V = 1000")[-2:] == ["not", "measured"]
    assert words("x our own fp32, bf16 logits")[:4] == ["1.10", "1.25", "1.25", "reached"]
    assert words("MB a thread besides the gradient")[:4] == ["1.00", "0.50", "0.50", "reached"]
    assert words("linear: of the memory of torch eager")[:4] == ["0.10", "0.05", "0.05", "reached"]
    assert words("linear: x the faster of the two, both")[:4] == ["1.00", "0.67", "0.67", "MISSED"]


def test_figures_are_of_two_threads_only() -> None:
    assert "reached" not in summary.text([replace(r, threads=1) for r in _rows()])


def test_a_floor_that_is_exceeded_is_doubted() -> None:
    found = summary.text([row("pycompress", 900.0), row("pycompress", 100.0, v=10)])
    assert found.count("measured too high") == 1


def test_tables_mark_the_fastest() -> None:
    text = summary.tables(_rows())
    assert "| 512×30522 fp32 | forward+backward | **1.25** | 10.0 | 50.0 | 8.0× | 40.0× | 0.80 |" in text
    assert "| 512×30522 bf16 | forward+backward | **1.00** | - | - | - | - | 1.00 |" in text
    assert "| 512×30522, jsd beta=0.5 temperature=2 alpha=0.5 | forward+backward |" in text
    assert "| 512×30522 fp32 | 62.5 | 63.5 | 187.0 | 400.0 |" in text
    assert "| 512×384×30522 fp32 | forward+backward, ms | 0.03 | 0.06 | **0.02** | - |  |" in text
    assert "| 512×384×30522 fp32 | forward+backward, MB | 40 | 300 | 800 | - | 48 |" in text
    assert summary.tables([]) == "Nothing was measured.\n"


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    distill_loss_plot.plot(_rows(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_a_time_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        distill_loss_plot.plot([], tmp_path / "none.png")


# ---- the command ----


def test_main_measures_and_reports_again_from_the_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = peaks.measure(threads=1, seconds=0.001)
    monkeypatch.setattr(peaks, "measure", lambda **options: machine)
    threads = torch.get_num_threads()
    arguments = ["--cases", "3x11,4x5x9", "--threads", "1", "--seconds", "0.01", "--dtypes", "fp32,fp16"]
    arguments += ["--providers", "pycompress,torch-eager", "--out", str(tmp_path)]
    assert distill_loss.main(arguments) == 0
    rows = read_csv(tmp_path / "distill_loss.csv")
    expected = [
        (op, covers, provider, dtype)
        for op in ("distill_loss", "linear_distill_loss")
        for covers in (FORWARD, BOTH)
        for provider in ("pycompress", "torch-eager")
        for dtype in ("fp32", "fp16")
    ]
    assert [(r.op, r.covers, r.provider, r.dtype) for r in rows] == expected
    for r in rows:
        assert r.status == "ok"
        assert ((3, 11, None) if r.op == "distill_loss" else (4, 9, 5)) == (r.M, r.N, r.K)
        assert r.options == str(MAIN)
        assert r.fraction is not None
    assert torch.get_num_threads() == threads
    first = capsys.readouterr().out

    again = tmp_path / "again"
    assert distill_loss.main(["--from", str(tmp_path / "distill_loss.csv"), "--out", str(again)]) == 0
    assert capsys.readouterr().out == first
    assert sorted(p.name for p in again.iterdir()) == ["distill_loss.md", "distill_loss.png"]


def test_main_keeps_what_it_measured_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object):  # type: ignore[no-untyped-def]
        yield row("torch-eager", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_loss, "run_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill_loss.main(["--quick", "--out", str(tmp_path)])
    assert len(read_csv(tmp_path / "distill_loss.csv")) == 1


@pytest.mark.parametrize(
    "bad",
    [
        ["--cases", "768"],
        ["--cases", "0x10"],
        ["--dtypes", "fp8", "--cases", "1x2"],
        ["--options", "tau1"],
        ["--threads", "two"],
        ["--providers", "x"],
        ["--from", "no.csv"],
    ],
)
def test_main_refuses_bad_options(bad: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill_loss.main([*bad, "--out", str(tmp_path / "unused")])
    assert bad[0] in capsys.readouterr().err or bad[1] in capsys.readouterr().err
    assert not (tmp_path / "unused").exists()


def test_script_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "distill_loss.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--list"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    listed = capsys.readouterr().out
    assert all(p.name in listed for p in PROVIDERS)
