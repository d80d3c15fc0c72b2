"""The benchmark of sparse_linear: its masks, its cases, the correctness of every provider. No time is tested."""

import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pycompress import peaks
from pycompress.bench import sparse_linear, sparse_linear_model, sparse_linear_run, timing
from pycompress.bench import sparse_linear_summary as summary
from pycompress.bench.provider import Machine
from pycompress.bench.rows import Row, read_csv, write_csv
from pycompress.bench.sparse_linear_providers import (
    PATTERNS,
    PROVIDERS,
    TOLERANCE,
    Built,
    Layer,
    Provider,
    block,
    fixed_sparsity,
    random_mask,
)
from pycompress.bench.sparse_linear_run import SWEPT, Cell, calls_of, make_data, sweep

DENSE = {p.dtype: p for p in PROVIDERS if p.form == "dense"}
ABSENT = Row("sparse_linear", "torch-dense-fp32", "", "", "fp32", "layer", status="not installed: x")


@pytest.fixture
def one_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = peaks.measure(threads=1, seconds=0.001)
    monkeypatch.setattr(peaks, "measure", lambda **options: machine)


# ---- masks ----


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.98])
def test_masks_prune_whole_blocks_and_as_many_as_wanted(pattern: str, sparsity: float) -> None:
    sparsity = fixed_sparsity(pattern) or sparsity
    mask = random_mask(pattern, (64, 96), sparsity, torch.Generator().manual_seed(0))
    assert mask.dtype == torch.bool
    assert mask.shape == (64, 96)
    if pattern == "2:4":
        assert mask.view(-1, 4).sum(1).eq(2).all()
        return
    rows, columns = block(pattern)
    blocks = mask.view(64 // rows, rows, 96 // columns, columns).transpose(1, 2).flatten(2)
    assert torch.equal(blocks.all(2), blocks.any(2))
    assert int((~blocks.all(2)).sum()) == round(sparsity * blocks.shape[0] * blocks.shape[1])


def test_ties_of_the_random_numbers_are_counted_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
    assert int(random_mask("unstructured", (8, 10), 0.7, torch.Generator()).sum()) == 24


@pytest.mark.parametrize(
    ("pattern", "shape", "sparsity", "why"),
    [
        ("2:4", (4, 8), 0.8, "expected 0.5"),
        ("2:4", (4, 6), 0.5, "multiple of 4"),
        ("4x4", (6, 8), 0.5, "6 x 8"),
        ("diagonal", (4, 4), 0.5, "expected unstructured"),
    ],
)
def test_impossible_masks_are_refused(pattern: str, shape: tuple[int, int], sparsity: float, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        random_mask(pattern, shape, sparsity, torch.Generator())


# ---- what is computed ----


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.name)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 48), (9, 96, 36)])
def test_provider_computes_the_pruned_layer(provider: Provider, m: int, k: int, n: int) -> None:
    for pattern in provider.patterns or PATTERNS[:1]:
        _, found = made = make_data(Cell((k, n), (m,), fixed_sparsity(pattern) or 0.75, (pattern,)))
        layer = found[pattern].layer
        assert torch.equal(layer.weight != 0, layer.mask)
        exact = made[0].double() @ (layer.weight * layer.mask).double().T + layer.bias.double()
        assert torch.equal(found[pattern].y64, exact)
        bound = provider.build(layer, 1).bind(made[0])
        for _ in range(2):  # a second call reads the same input
            y = bound.output()
            assert y.shape == (m, n)
            assert sparse_linear_run.relative_error(y, exact) <= TOLERANCE[provider.dtype]
    assert provider.version


@pytest.mark.usefixtures("one_peak")
def test_absent_failing_and_wrong_providers_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "POOL_GAP_SECONDS", 0.0)

    def raises(layer: Layer, threads: int) -> Built:
        raise RuntimeError("no  such format")

    def zeros(layer: Layer, threads: int) -> Built:
        return Built(lambda x: torch.zeros(x.shape[0], layer.bias.numel()))

    fp32 = DENSE["fp32"]
    nowhere = replace(fp32, name="no-where-fp32", requires=("no_such_module_at_all",))
    broken, wrong = (replace(fp32, name=f"x-{b.__name__}-fp32", build=b, patterns=("4x4",)) for b in (raises, zeros))
    few = replace(fp32, name="x-few-fp32", most=1)
    cells = [Cell((64, 48), (1, 3), 0.5, ("unstructured", "4x4"), ("fp32",))]
    providers = [nowhere, broken, wrong, few, fp32]
    rows = list(sparse_linear_run.run_all(providers, cells, [1], lambda cell: 0.0, False))
    assert [(r.provider, r.M, r.options, r.status) for r in rows] == [
        ("no-where-fp32", None, "", "not installed: no_such_module_at_all"),
        ("x-raises-fp32", 1, "4x4", "failed: RuntimeError: no such format"),
        ("x-zeros-fp32", 1, "4x4", "wrong"),
        ("x-few-fp32", 1, "", "ok"),
        ("torch-dense-fp32", 1, "", "ok"),
        ("x-raises-fp32", 3, "4x4", "failed: RuntimeError: no such format"),
        ("x-zeros-fp32", 3, "4x4", "wrong"),
        ("torch-dense-fp32", 3, "", "ok"),
    ]
    assert [r.p50_us is not None for r in rows] == [r.status == "ok" for r in rows]
    assert rows[2].error == pytest.approx(1.0)
    dense = rows[4]
    assert (dense.peak_kind, rows[7].peak_kind) == ("read_gbps", "fp32_gflops")
    assert dense.p50_us is not None
    assert dense.gb_s == pytest.approx(1e-3 * 4 * (64 * 48 + 64 + 48) / dense.p50_us)
    report = summary.text(rows)
    assert "no-where-fp32: not installed" in report
    assert "x-zeros-fp32 4x4, 1 x 64 x 48 at 0.5, 1 thread (and 1 more): wrong" in report


@pytest.mark.usefixtures("one_peak")
def test_operations_are_those_of_the_weights_kept() -> None:
    sparse = replace(DENSE["fp32"], name="pycompress-index-fp32", form="index", patterns=("4x1",))
    cell = Cell((64, 48), (8,), 0.75, ("4x1",), ("fp32",))
    rows = list(sparse_linear_run.run_all([DENSE["fp32"], sparse], [cell], [1], lambda cell: 0.0, False))
    for found, kept in zip(rows, (1.0, 0.25), strict=True):
        assert found.p50_us is not None
        assert found.gop_s == pytest.approx(kept * 2e-3 * 8 * 64 * 48 / found.p50_us)


# ---- the cases ----


def test_calls_are_of_the_cells_dtypes_forms_and_patterns() -> None:
    def names(**options: object) -> list[str]:
        cell = replace(Cell((64, 64), (1,), 0.5, ("unstructured", "4x4")), **options)  # type: ignore[arg-type]
        return [call.name for call in calls_of(cell, PROVIDERS)]

    assert names(dtypes=("bf16",)) == [
        "pycompress-bitmap-bf16 unstructured",
        "pycompress-index-bf16 unstructured",
        "pycompress-index-bf16 4x4",
        "pycompress-auto-bf16 unstructured",
        "pycompress-auto-bf16 4x4",
        "torch-dense-bf16",
    ]
    assert names(forms=("csr", "bsr")) == ["torch-csr-fp32 unstructured", "torch-bsr-fp32 4x4"]
    assert names(patterns=("4x4",), forms=("dense", "bitmap")) == [f"{DENSE[d].name}" for d in DENSE]


def test_the_sweep_is_the_same_every_time_and_covers_the_ranges() -> None:
    cells = sweep(100)
    assert cells == sweep(100)
    assert cells != sweep(100, seed=1)
    assert {(cell.dtypes[0], cell.patterns[0]) for cell in cells} == set(SWEPT)
    tokens = [cell.tokens[0] for cell in cells]
    assert 1 <= min(tokens) <= 2
    assert 256 < max(tokens) <= 512
    assert 8 < math.exp(sum(map(math.log, tokens)) / 100) < 64  # as often below 22 as above
    assert all(256 - 3 <= size <= 3072 for cell in cells for size in cell.shape)
    assert all(0.3 <= cell.sparsity <= 0.98 for cell in cells)
    for cell in cells:
        if cell.patterns != ("unstructured",):
            assert cell.shape[0] % 4 == cell.shape[1] % 4 == 0


def test_a_case_of_the_sweep_sets_auto_against_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []

    def timed(runners: dict[str, object], *, seconds: float, **options: object) -> timing.Timing[None]:
        budgets.append(seconds)
        slow = 1.0 if len(budgets) == 1 else 2.0
        times = {"torch-dense-fp32": 3.0, "x-one-fp32": 1.9, "x-auto-fp32": slow + 1}
        return timing.Timing({name: timing.Stats(times[name], times[name], times[name], 1) for name in runners}, [])

    monkeypatch.setattr(sparse_linear_run, "time_round_robin", timed)
    fp32 = DENSE["fp32"]
    providers = [fp32, replace(fp32, name="x-one-fp32", form="index"), replace(fp32, name="x-auto-fp32", form="auto")]
    cell = Cell((64, 48), (2,), 0.5, ("4x4",), ("fp32",), covers="sweep")
    rows = list(sparse_linear_run.run_all(providers, [cell], [1], lambda cell: 0.5, False))
    assert budgets == [0.5, 0.5 * sparse_linear_run.LONGER]  # 1.9 / 2.0 was doubted
    assert {r.covers for r in rows} == {"sweep"}
    assert [r.fraction for r in rows] == [None, None, pytest.approx(1.9 / 3)]
    assert rows[2].peak_kind == "fastest"


# ---- the model ----


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.register_buffer("one", torch.ones(1))

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.inner(x * self.one))


def test_the_model_is_measured_in_three_ways_and_its_file_in_two() -> None:
    model = _Tiny().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = list(sparse_linear_model.run_model(1, 0.01, lambda: (model, {"x": torch.randn(24, 64)})))
    assert [(r.provider, r.covers, r.options, r.status) for r in rows] == [
        ("torch-dense-fp32", "model", "", "ok"),
        ("pycompress-dense-int8", "model", "", "ok"),
        ("pycompress-auto-int8", "model", "4x4", "ok"),
        ("torch-dense-fp32", "file", "", "ok"),
        ("pycompress-auto-fp32", "file", "unstructured", "ok"),
    ]
    assert all(r.p50_us is not None and r.M == 24 * 64 for r in rows[:3])
    assert rows[3].state_mb == pytest.approx(4e-6 * (2 * 64 * 128 + 64 + 128), rel=0.1)
    assert {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )


def test_a_model_that_cannot_be_measured_is_a_row() -> None:
    def nowhere() -> tuple[nn.Module, dict[str, Tensor]]:
        raise RuntimeError("no  weights")

    threads = torch.get_num_threads()
    (found,) = sparse_linear_model.run_model(1, 0.01, nowhere)
    assert (found.covers, found.status) == ("model", "failed: RuntimeError: no weights")
    assert torch.get_num_threads() == threads


def test_state_mb_is_the_file_that_torch_saves(tmp_path: Path) -> None:
    layer = nn.Linear(300, 200)
    torch.save({f"a.{key}": value for key, value in layer.state_dict().items()}, tmp_path / "a.pt")
    size = sparse_linear_model.state_mb({"a": layer})
    assert size == pytest.approx((tmp_path / "a.pt").stat().st_size / 1e6, rel=0.01)


# ---- the command ----


@pytest.mark.usefixtures("one_peak")
def test_main_measures_and_reports_again_from_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--shapes", "64x48", "--tokens", "1,40", "--sparsities", "0.5,0.75", "--patterns", "unstructured,2:4"]
    arguments += ["--dtypes", "fp32,int8", "--threads", "1", "--seconds", "0.01", "--out", str(tmp_path)]
    arguments += ["--providers", "pycompress-bitmap,pycompress-index,torch,pycompress-dense"]
    assert sparse_linear.main(arguments) == 0
    rows = read_csv(tmp_path / "sparse_linear.csv")
    index = [("pycompress-index", "unstructured"), ("pycompress-index", "2:4")]
    expected = []
    for s in (0.5, 0.75):
        for m in (1, 40):
            ours = [("pycompress-bitmap", "unstructured")] * (m == 1) + index[: 2 if s == 0.5 else 1]
            expected += [(s, m, f"{name}-{dtype}", pattern) for dtype in ("fp32", "int8") for name, pattern in ours]
            dense = ("torch-dense-fp32", "pycompress-dense-int8")
            expected += [(s, m, name, "") for name in dense] + [(s, m, "torch-csr-fp32", "unstructured")]
    assert [(r.sparsity, r.M, r.provider, r.options) for r in rows] == expected
    assert {(r.op, r.covers, r.status, r.K, r.N, r.threads) for r in rows} == {
        ("sparse_linear", "layer", "ok", 64, 48, 1)
    }
    assert torch.get_num_threads() == threads
    first = capsys.readouterr().out
    assert "Break-even sparsity, 1 thread" in first

    again = tmp_path / "again"
    assert sparse_linear.main(["--from", str(tmp_path / "sparse_linear.csv"), "--out", str(again)]) == 0
    assert capsys.readouterr().out == first
    assert sorted(p.name for p in again.iterdir()) == ["sparse_linear.md", "sparse_linear.png"]


def test_a_full_run_has_four_parts_and_a_quick_one_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def run_all(
        providers: object, cells: list[Cell], threads: list[int], seconds: object, calibrated: bool
    ) -> list[Row]:
        seen.update(cells=cells, calibrated=calibrated)
        return []

    def run_model(threads: int, seconds: float) -> list[Row]:
        seen["model"] = threads
        return []

    monkeypatch.setattr(sparse_linear, "run_all", run_all)
    monkeypatch.setattr(sparse_linear, "run_model", run_model)

    def parts(*arguments: str) -> tuple[int, int, int, bool, bool]:
        seen.clear()
        assert sparse_linear.main([*arguments, "--no-report", "--threads", "2", "--out", str(tmp_path)]) == 0
        cells = seen["cells"]
        assert isinstance(cells, list)
        beyond = [c for c in cells if c.shape == sparse_linear.BEYOND_CACHE]
        random = [c for c in cells if c.covers == "sweep"]
        rest = len(cells) - len(beyond) - len(random)
        return rest, len(beyond), len(random), bool(seen["calibrated"]), "model" in seen

    assert parts() == (18, 3, 100, True, True)
    assert parts("--quick") == (3, 0, 5, False, False)
    assert parts("--tokens", "4", "--model", "--random", "7") == (18, 0, 7, False, True)
    assert parts("--patterns", "2:4") == (3, 0, 0, False, False)


def test_main_keeps_what_it_measured_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object):  # type: ignore[no-untyped-def]
        yield ABSENT
        raise KeyboardInterrupt

    monkeypatch.setattr(sparse_linear, "run_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        sparse_linear.main(["--quick", "--out", str(tmp_path)])
    assert len(read_csv(tmp_path / "sparse_linear.csv")) == 1


def test_result_files_of_other_operations_have_no_states() -> None:
    published = read_csv(Path(__file__).parent.parent / "benchmarks" / "results" / "distill_loss.csv")
    assert {r.state_mb for r in published} == {None}


def test_csv_keeps_the_size_of_a_state(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", [replace(ABSENT, state_mb=40.5)])
    assert read_csv(tmp_path / "rows.csv")[0].state_mb == 40.5


@pytest.mark.parametrize(
    "bad",
    [
        ["--shapes", "768"],
        ["--tokens", "0"],
        ["--sparsities", "1"],
        ["--sparsities", "half"],
        ["--patterns", "4x0"],
        ["--dtypes", "fp8"],
        ["--random", "-1"],
        ["--threads", "two"],
        ["--providers", "x"],
        ["--from", "no.csv"],
    ],
)
def test_main_refuses_bad_options(bad: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sparse_linear.main([*bad, "--out", str(tmp_path / "unused")])
    assert bad[1] in capsys.readouterr().err
    assert not (tmp_path / "unused").exists()


def test_script_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "sparse_linear.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--list"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    listed = capsys.readouterr().out
    assert all(p.name in listed for p in PROVIDERS)


def test_machine_rows_carry_the_sparsity() -> None:
    found = Machine("cpu", 32.0, "abc").row("sparse_linear", DENSE["fp32"], "fp32", "layer", sparsity=0.5)
    assert (found.sparsity, found.device) == (0.5, "cpu")
