"""pycompress compress and pycompress report: a real run, what is refused before the model is made, exit codes."""

import json
import math
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from pycompress import cli, info, workflow
from pycompress.workflow import CompressError, StageRecord
from pycompress.workflow.seeds import SeedsReport

runner = CliRunner()

TASK = """
    import torch
    from torch import nn

    made = []
    BATCHES = [torch.ones(4, 8)]

    def model(seed, width=16):
        made.append(seed)
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))

    def batches(epoch):
        yield torch.randn(4, 8), torch.randint(0, 4, (4,))

    def loader(size=4):
        return [(torch.ones(size, 8), torch.zeros(size, dtype=torch.int64))]

    def accuracy(model, scale=1.0):
        return {"mean": scale * model(torch.ones(1, 8)).mean().item()}

    def broken():
        raise RuntimeError("no such data")

    def nothing():
        return None

    def fails(model):
        raise ZeroDivisionError("of nothing")
"""
CONFIG = """
    model: task.py:model
    train_batches: task.py:batches
    eval_fn: task.py:accuracy
    seed: 5
    measure: {batch_sizes: [2], rounds: 3, layers: false}
    stages:
      - finetune: {steps: 3}
      - quantize
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Under pytest Triton is interpreted, and asking what it can do takes seconds.
    monkeypatch.setattr(info, "collect", lambda **options: {})
    (tmp_path / "task.py").write_text(textwrap.dedent(TASK))
    (tmp_path / "config.yaml").write_text(textwrap.dedent(CONFIG))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """What compress() was called with, instead of calling it."""
    found = []

    class Result:
        def __str__(self):
            return "the result"

        def report(self):
            return "report.html"

    def compress(model, recipe, **options):
        found.append({"model": model, "recipe": recipe, **options})
        return Result()

    monkeypatch.setattr(workflow, "compress", compress)
    return found


def invoke(*arguments: str):
    return runner.invoke(cli.app, list(arguments))


def rewritten(folder: Path, before: str, after: str) -> None:
    path = folder / "config.yaml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def test_a_run_from_the_file_to_the_report(folder):
    result = invoke("compress", "config.yaml", "--out", "run")
    assert result.exit_code == 0, result.output
    assert "2 quantize" in result.output
    assert "report: " in result.output
    page = folder / "run" / "report.html"
    assert page.is_file()
    state = json.loads((folder / "run" / "run.json").read_text())
    assert state["status"] == "finished"
    assert state["recipe"]["seed"] == 5
    assert [stage["name"] for stage in state["stages"]] == ["baseline", "finetune", "quantize"]
    assert set(state["stages"][2]["metrics"]) == {"mean"}
    again = invoke("compress", "config.yaml", "--out", "run")
    assert again.exit_code == 0
    assert json.loads((folder / "run" / "run.json").read_text())["stages"] == state["stages"]
    page.unlink()
    assert invoke("report", "run").exit_code == 0
    assert page.is_file()
    assert invoke("report", "run", "--out", "elsewhere").exit_code == 0
    assert (folder / "elsewhere" / "report.html").is_file()


def test_seeds_make_a_table(folder):
    result = invoke("compress", "config.yaml", "--seeds", "2", "--out", "run")
    assert result.exit_code == 0, result.output
    for seed in (5, 6):
        assert json.loads((folder / "run" / f"seed-{seed}" / "run.json").read_text())["recipe"]["seed"] == seed
    table = result.output[result.output.index("before") :]
    for cell in ("mean", "file, MB", "latency of a batch of 2, ms", "±", "×", "of 2 seeds: 5, 6"):
        assert cell in table


def test_the_table_of_seeds():
    def run(accuracy, size, speedup):
        first = StageRecord(0, "baseline", metrics={"accuracy": 98.0, "odd": 1.0}, file_bytes=4_000_000)
        last = StageRecord(1, "quantize", metrics={"accuracy": accuracy, "odd": math.nan})
        times = {"before": {"p50": 0.4}, "after": {"p50": 0.1}, "speedup": {"p50": speedup}}
        return SimpleNamespace(records=[first, last], model_bytes=size, latency={"512": times})

    report = SeedsReport([3, 4], [run(97.0, 200_000, 4.0), run(99.0, 250_000, 5.0)])
    assert report.rows() == [
        ("accuracy", "98.00 ± 0.00", "98.00 ± 1.41", "+0.000 ± 1.414"),
        ("file, MB", "4.000 ± 0.000", "0.2250 ± 0.0354", "×18.00 ± 2.83"),
        ("latency of a batch of 512, ms", "400.0 ± 0.0", "100.0 ± 0.0", "×4.500 ± 0.707"),
    ]
    assert report.summary() == "mean ± standard deviation of 2 seeds: 3, 4"


def test_what_compress_is_called_with(folder, calls):
    assert invoke("compress", "config.yaml", "--seed", "9", "--restart").exit_code == 0
    (call,) = calls
    assert call["recipe"].seed == 9
    assert call["resume"] is False
    assert call["out"] == Path("runs/config")
    assert call["eval_fn"](torch.nn.Linear(8, 4)).keys() == {"mean"}
    assert next(iter(call["train_batches"](0)))[0].shape == (4, 8)
    assert "teacher" not in call
    assert invoke("compress", "config.yaml", "--seed", "9").exit_code == 0
    assert torch.equal(calls[1]["model"][0].weight, call["model"][0].weight)
    assert calls[1]["resume"] is True


def test_functions_with_arguments(folder, calls):
    rewritten(folder, "model: task.py:model", "model: {call: 'task.py:model', width: 3, seed: 77}\nout: here")
    rewritten(folder, "task.py:batches", "{call: 'task.py:loader', size: 2}")
    rewritten(folder, "eval_fn: task.py:accuracy", "eval_fn: {call: 'task.py:accuracy', scale: 0}")
    result = invoke("compress", "config.yaml")
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert call["model"][0].out_features == 3
    assert call["train_batches"][0][0].shape == (2, 8)
    assert call["eval_fn"](call["model"]) == {"mean": 0}
    assert call["out"] == Path("here")


def test_functions_of_a_module(folder, calls):
    (folder / "mine").mkdir()
    (folder / "mine" / "deep.py").write_text((folder / "task.py").read_text())
    rewritten(folder, "task.py:model", "mine.deep:model")
    result = invoke("compress", "config.yaml")
    assert result.exit_code == 0, result.output


def test_check_makes_no_model(folder, calls):
    rewritten(folder, "task.py:model", "task.py:broken")
    result = invoke("compress", "config.yaml", "--check")
    assert result.exit_code == 0
    assert "config.yaml: no mistake found; finetune, quantize; seed 5" in result.output
    assert calls == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("steps: 3", "stepz: 3", "config.yaml:8: unknown key 'stepz' in finetune; did you mean 'steps'?"),
        ("stages:", "stage:", "did you mean 'stages'? valid keys: stages, seed, measure, checkpoint_seconds, model, "),
        ("- quantize", "- quantize\n  - prune", "prune (stage 3) cannot come after quantize (stage 2)"),
        ("task.py:model", "task.py:modle", "config.yaml:2: model: task.py defines no 'modle'; did you mean 'model'?"),
        ("task.py:model", "task.py:zzz", "task.py defines no 'zzz'; it defines model, batches, loader, accuracy, "),
        ("task.py:model", "tusk.py:model", "there is no file "),
        ("task.py:model", "no_such_package.task:model", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("task.py:model", "task.py:BATCHES", "task.py:BATCHES is a list; expected a function that returns it"),
        ("task.py:model", "task.py:accuracy", "model: task.py:accuracy cannot be called as accuracy(): missing a"),
        ("task.py:accuracy", "task.py:broken", "eval_fn: task.py:broken cannot be called as broken(model): too many"),
        ("task.py:model", "{call: 'task.py:model', widht: 4}", "takes no 'widht'; did you mean 'width'? it takes"),
        ("train_batches: task.py:batches", "", "config.yaml:8: finetune trains, but there is no train_batches:"),
        ("- finetune: {steps: 3}\n  - quantize", "- quantize: {mode: static}", ""),
    ],
)  # fmt: skip
def test_refused_before_the_model_is_made(folder, calls, before, after, expected):
    rewritten(folder, before, after)
    if not expected:
        rewritten(folder, "train_batches: task.py:batches", "")
        expected = "config.yaml:8: quantize looks at model inputs, but there is neither calibration: nor train_batches:"
    for options in ([], ["--check"]):
        result = invoke("compress", "config.yaml", *options)
        assert result.exit_code == 1
        assert expected in result.stderr
        assert "error: " in result.stderr
    assert calls == []


def test_all_problems_of_a_file_at_once(folder):
    rewritten(folder, "task.py:model", "task.py:modle")
    rewritten(folder, "task.py:accuracy", "task.py:acuracy")
    lines = invoke("compress", "config.yaml").stderr.splitlines()
    assert "config.yaml:2: model:" in lines[0]
    assert "config.yaml:4: eval_fn:" in lines[1]


def test_a_file_with_a_mistake_names_its_line(folder):
    (folder / "task.py").write_text("import torch\n\nmodel = torch.nn.Linaer(3, 4)\n")
    result = invoke("compress", "config.yaml")
    assert result.exit_code == 1
    assert "task.py cannot be loaded: AttributeError: module 'torch.nn' has no" in result.stderr
    assert "(task.py, line 3)" in result.stderr


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("broken", r"model: task.py:broken raised RuntimeError: no such data (task.py, line "),
        ("nothing", "model: task.py:nothing returned a NoneType; expected a torch.nn.Module"),
    ],
)
def test_functions_that_fail(folder, calls, function, expected):
    rewritten(folder, "task.py:model", f"task.py:{function}")
    result = invoke("compress", "config.yaml")
    assert result.exit_code == 1
    assert expected in result.stderr


def test_an_evaluation_that_fails_is_named_with_its_line(folder):
    rewritten(folder, "task.py:accuracy", "task.py:fails")
    result = invoke("compress", "config.yaml")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
    assert "of nothing" in result.stderr
    assert "(task.py, line 28)" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (CompressError("stage 1 failed"), 1, "error: stage 1 failed"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt("saved at step 3"), 130, "saved at step 3"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
    ],
)
def test_exit_codes(folder, monkeypatch, error, code, expected):
    def compress(*args, **options):
        raise error

    monkeypatch.setattr(workflow, "compress", compress)
    result = invoke("compress", "config.yaml")
    assert result.exit_code == code
    assert expected in result.stderr


def test_report_of_no_run(folder):
    result = invoke("report", "nothing")
    assert result.exit_code == 1
    assert "run.json" in result.stderr


def test_threads(folder, calls):
    assert invoke("compress", "config.yaml", "--threads", "2", "--check").exit_code == 0
    assert torch.get_num_threads() == 2


def test_help_says_what_a_function_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    output = invoke("compress", "--help").output
    for word in ("train_batches", "file.py:name", "--seeds", "--restart", "--check"):
        assert word in output
