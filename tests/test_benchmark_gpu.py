"""The benchmarks on a GPU and `make gpu-check`, as far as they go without one: with a clock that only counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from pycompress.bench import (
    distill_loss,
    gpu_distill_loss,
    gpu_int8_matmul,
    gpu_run,
    gpu_sparse_linear,
    gpu_summary,
    int8_matmul,
    sparse_linear,
)
from pycompress.bench.gpu_meter import GpuPeaks, HostClock, Meter, limits
from pycompress.bench.gpu_run import Bound, GpuCase, GpuProvider, Work
from pycompress.bench.options import wants_gpu
from pycompress.bench.rows import read_csv

CPU = torch.device("cpu")


class CountingClock:
    """Each call takes a millisecond, whatever it does."""

    def __init__(self) -> None:
        self.calls = 0

    def time(self, run: Callable[[], object], times: int) -> list[float]:
        run()
        self.calls += 1
        return [0.001] * times

    def wall(self, run: Callable[[], object], times: int) -> float:
        run()
        self.calls += 1
        return 0.001


def meter() -> Meter:
    return Meter(CPU, CountingClock(), peak_size=32)


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own GPU backends are reported as not usable: nothing is emulated here."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


# ---- the meter ----


def test_peaks_are_rates() -> None:
    found = meter().peaks()
    assert found.bf16_gflops == pytest.approx(2e-9 * 32**3 / 0.001)
    assert found.int8_gops == pytest.approx(found.bf16_gflops)
    assert found.copy_gbps == pytest.approx(2e-9 * 16 * 32**2 / 0.001)
    assert found.read_gbps == pytest.approx(1e-9 * 16 * 32**2 / 0.001)


def test_a_product_that_torch_lacks_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("not for this device")

    monkeypatch.setattr(torch, "_int_mm", fails)
    assert meter().peaks().int8_gops is None
    assert "int8_gops" not in limits([meter().peaks()])


def test_limits_are_medians_of_the_better_memory_rate() -> None:
    probes = [GpuPeaks(1.0, None, 10.0, 20.0), GpuPeaks(3.0, None, 30.0, 20.0), GpuPeaks(2.0, None, None, 25.0)]
    assert limits(probes) == {"int8_gops": 2.0, "memory_gbps": 25.0}
    assert limits([]) == {}


def test_everyone_has_turns() -> None:
    order: list[str] = []
    runners = {name: lambda name=name: order.append(name) for name in "abc"}
    timing = meter().in_turns(runners, seconds=0.1)
    assert set(timing.stats) == set("abc")
    assert len({stats.samples for stats in timing.stats.values()}) == 1
    assert len(timing.probes) == timing.stats["a"].samples // 4
    assert order[-3:] != order[-6:-3] or order[-6:-3] != order[-9:-6]  # shuffled


def test_the_host_clock_measures() -> None:
    clock = HostClock()
    assert all(seconds > 0 for seconds in clock.time(lambda: sum(range(1000)), 3))
    assert clock.wall(lambda: sum(range(1000)), 10) > 0
    assert Meter.of(CPU).name == "cpu"
    assert Meter.of(CPU).isa == ""


# ---- cases, floors, rows ----


def test_the_floor_is_what_takes_longest() -> None:
    rates = {"memory_gbps": 100.0, "int8_gops": 1000.0}
    assert Work(1.0, 1.0, "int8_gops").floor(rates) == (0.01, "memory_gbps", 100.0)
    assert Work(1.0, 50.0, "int8_gops").floor(rates) == (0.05, "int8_gops", 1000.0)
    assert Work(1.0, 50.0, "bf16_gflops").floor(rates) == (0.01, "memory_gbps", 100.0)
    assert Work(1.0).floor({}) is None


def test_bytes_of_an_int8_layer() -> None:
    data, _ = gpu_int8_matmul.make(4, 32, 16, CPU)
    assert data.work("int8").gbytes == pytest.approx(1e-9 * (32 * 16 + 2 * 4 * (32 + 16)))
    assert data.work("bf16").gbytes == pytest.approx(1e-9 * (2 * 32 * 16 + 2 * 4 * (32 + 16)))
    assert data.work("int8-weight").kind == "bf16_gflops"


def test_bytes_of_a_loss() -> None:
    case = gpu_distill_loss.Case(8, 100)
    forward = gpu_distill_loss.make(case, gpu_distill_loss.FORWARD, CPU)[0].work()
    both = gpu_distill_loss.make(case, gpu_distill_loss.BOTH, CPU)[0].work()
    assert (forward.gbytes, both.gbytes) == pytest.approx((4e-9 * 800, 6e-9 * 800))


def test_bytes_of_a_pruned_layer() -> None:
    data, _ = gpu_sparse_linear.make(2, 64, 32, "unstructured", 0.75, CPU)
    xy = 2 * 2 * (64 + 32)
    assert data.work("bf16", "bitmap").gbytes == pytest.approx(1e-9 * (2 * 512 + 256 + xy))
    assert data.work("bf16", "dense").gbytes == pytest.approx(1e-9 * (2 * 2048 + xy))


def provider(name: str, value: float, **fields: str) -> GpuProvider:
    def build(data: float) -> Bound:
        if value < 0:
            raise RuntimeError("cannot\nrun")
        return Bound(lambda: None, lambda: [torch.tensor([value])], Work(1e-3))

    return GpuProvider(name, fields.pop("backend", "eager"), build, **fields)  # type: ignore[arg-type]


def test_what_fails_or_is_wrong_has_no_time() -> None:
    providers = (
        provider("right", 1.0),
        provider("wrong", 2.0),
        provider("nan", float("nan")),
        provider("failing", -1.0),
        provider("absent", 1.0, requires=("no_such_module",)),
        provider("pycompress-cuda", 1.0, backend="cuda"),
    )
    case = GpuCase("op", {"M": 1}, lambda device: (1.0, [torch.tensor([1.0])]), providers, {"bf16": 1e-2})
    rows = list(gpu_run.run_all(meter(), [case], providers, seconds=0.01))
    states = {(r.provider, r.covers): r.status for r in rows}
    assert states[("right", "layer")] == states[("right", "eager")] == "ok"
    assert states[("wrong", "layer")] == states[("nan", "layer")] == "wrong"
    assert states[("failing", "layer")] == "failed: RuntimeError: cannot run"
    assert states[("absent", "layer")] == "not installed: no_such_module"
    assert states[("pycompress-cuda", "layer")].startswith("not usable: x is on cpu")
    assert {r.provider for r in rows if r.p50_us is not None} == {"right"}
    right = next(r for r in rows if r.provider == "right")
    assert right.peak_kind == "memory_gbps"
    assert right.fraction == pytest.approx(1e-3 / right.peak / 1e-3)
    text = gpu_summary.tables(rows)
    assert "| right |" in text
    assert "failing, op 1: failed" in text


# ---- the commands ----

COMMANDS = {
    "int8_matmul": (gpu_int8_matmul.main, ["--shapes", "32x64", "--tokens", "1,17"]),
    "distill_loss": (gpu_distill_loss.main, ["--cases", "4x30,4x8x30"]),
    "sparse_linear": (gpu_sparse_linear.main, ["--shapes", "64x128", "--tokens", "2", "--patterns", "2:4,16x16"]),
}
EAGER = "--providers=torch-bf16,torch-eager,torch-dense,pycompress-dense,pycompress-auto,pycompress-cuda,torch-int_mm"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_its_rows(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, arguments = COMMANDS[name]
    known = {p.name for p in gpu_run_providers(name)}
    chosen = [n for n in EAGER.split("=")[1].split(",") if any(p.startswith(n) for p in known)]
    chosen = [n for n in chosen if n != "torch-int_mm"] + (["torch-int_mm"] if name == "int8_matmul" else [])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    given = ["--device", "cpu", "--providers", ",".join(chosen), "--out", str(tmp_path), "--seconds", "0.01"]
    assert run([*given, *arguments], meter=meter()) == 0
    rows = read_csv(tmp_path / f"{name}-cuda.csv")
    done = [r for r in rows if r.p50_us is not None]
    assert done
    assert all(r.status == "ok" for r in done)
    assert any(r.covers.endswith("eager") for r in done)
    assert any(r.status.startswith("not usable") for r in rows if r.provider.startswith("pycompress-cuda"))
    table = (tmp_path / f"{name}-cuda.md").read_text()
    assert table == capsys.readouterr().out
    assert run(["--from", str(tmp_path / f"{name}-cuda.csv"), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.splitlines()[4:7] == table.splitlines()[4:7]


def gpu_run_providers(name: str) -> tuple[GpuProvider, ...]:
    if name == "sparse_linear":
        return gpu_sparse_linear.BITMAP + gpu_sparse_linear.INDEX + gpu_sparse_linear.AUTO + gpu_sparse_linear.DENSE
    return {"int8_matmul": gpu_int8_matmul, "distill_loss": gpu_distill_loss}[name].PROVIDERS


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_lists_and_refuses(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = COMMANDS[name]
    assert run(["--list"]) == 0
    assert "pycompress-cuda" in capsys.readouterr().out
    refused = [["--device", "abacus"], ["--device", "meta"], ["--providers", "nobody"]]
    refused += [] if torch.cuda.is_available() else [["--device", "cuda"]]
    for arguments in refused:
        with pytest.raises(SystemExit) as stopped:
            run([*arguments, "--out", str(tmp_path)])
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("module", "gpu_module"),
    [(int8_matmul, gpu_int8_matmul), (distill_loss, gpu_distill_loss), (sparse_linear, gpu_sparse_linear)],
)
def test_device_cuda_takes_the_other_command(
    module: object, gpu_module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[object] = []
    monkeypatch.setattr(gpu_module, "main", lambda argv: got.append(argv) or 7)
    for argv in (["--device", "cuda"], ["--quick", "--device=cuda:1", "--help"]):
        assert module.main(argv) == 7  # type: ignore[attr-defined]
    assert got == [["--device", "cuda"], ["--quick", "--device=cuda:1", "--help"]]
    assert not wants_gpu(["--device", "cpu"])
    assert not wants_gpu(["--quick"])


# ---- make gpu-check ----


def checked(monkeypatch: pytest.MonkeyPatch, *arguments: str, fails: str = "", sanitizer: str | None = "/s") -> tuple:
    ran: list[gpu_check.Command] = []
    made: list[int] = []

    def runner(command: gpu_check.Command) -> int:
        ran.append(command)
        return 1 if fails and fails in str(command) else 0

    monkeypatch.setattr(gpu_check, "missing_packages", lambda has: [])
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: sanitizer)
    status = gpu_check.main(list(arguments), runner, lambda: made.append(1))
    return status, ran, made


def test_gpu_check_runs_every_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, ran, made = checked(monkeypatch, "--targets", "90a")
    assert status == 0
    assert made == [1]
    said = [str(command) for command in ran]
    assert "cmake.define.PYCOMPRESS_CUDA=ON" in said[0]
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=90a" in said[0]
    assert "--no-deps" in said[0]  # the torch that is there stays
    assert "--no-index" in said[0]
    tests = next(s for s in said if "pytest" in s)
    assert "tests/test_gpu_device.py" in tests
    for tool in ("memcheck", "racecheck"):
        assert any(f"--tool {tool}" in s and "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in s for s in said)
    for name in gpu_check.BENCHMARKS:
        assert any(f"bench {name} --device cuda" in s and "--quick" in s for s in said)
    shown = capsys.readouterr().out
    assert all(f"{step:10} ok" in shown for step in gpu_check.STEPS)


def test_gpu_check_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, ran, _ = checked(monkeypatch, "--full", fails="pytest", sanitizer=None)
    assert status == 1
    assert any("bench int8_matmul" in str(c) and "--quick" not in str(c) for c in ran)
    shown = capsys.readouterr().out
    assert "tests      FAILED: " in shown
    assert "sanitize   skipped: no compute-sanitizer" in shown


def test_gpu_check_stops_where_nothing_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    status, ran, _ = checked(monkeypatch, fails="pip install")
    assert status == 1
    assert len(ran) == 1


def test_gpu_check_without_nvidia_smi_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(monkeypatch, "--only", "info", fails="nvidia-smi")[0] == 0


def test_gpu_check_names_what_is_missing() -> None:
    assert gpu_check.missing_packages(lambda module: True) == []
    assert "scikit-build-core" in gpu_check.missing_packages(lambda module: module != "scikit_build_core")
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nonsense"])


def test_gpu_check_makes_an_environment_beside_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PLACE", tmp_path)
    monkeypatch.setattr(gpu_check, "PYTHON", tmp_path / "venv" / "bin" / "python")
    gpu_check.make_environment()
    code = "import sys, torch, pip; print(sys.prefix, torch.__version__)"
    command = [str(gpu_check.PYTHON), "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert said == [str(tmp_path / "venv"), torch.__version__]
    assert sys.prefix != said[0]


def test_a_command_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.run(gpu_check.Command(("no-such-program-here",))) == 127
    assert "not installed" in capsys.readouterr().out
