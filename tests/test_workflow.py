"""compress(): what it returns, what it writes down, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import json
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from pycompress import layer_kinds
from pycompress.model_file import load_model, save_model
from pycompress.nn import FakeQuantLinear, Int4Linear, Int8Conv2d, Int8Linear, MaskedLinear
from pycompress.recipe import Finetune, Prune, Quantize, Recipe
from pycompress.workflow import CompressResult, StageRecord, compress
from tests.workflow_runs import QUIET, RECIPE, accuracy, make_data, make_loader, make_model, run

pytestmark = pytest.mark.usefixtures("one_thread", "no_machine")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> CompressResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYCOMPRESS_COST_MODEL", "builtin")
        return run(tmp_path_factory.mktemp("finished") / "run")


def test_every_stage_is_recorded(finished: CompressResult) -> None:
    names = [(record.index, record.name) for record in finished.records]
    assert names == [(0, "baseline"), (1, "prune"), (2, "distill"), (3, "qat"), (4, "sparsify")]
    assert [record.steps for record in finished.records] == [0, 6, 5, 4, 0]
    assert finished.records[1].options == Recipe.of(RECIPE).to_dict()["stages"][0]["prune"]
    assert all(record.summary for record in finished.records)
    assert all(record.seconds > 0 for record in finished.records[1:])


def test_the_baselines_figures_are_those_of_the_model_by_hand(finished: CompressResult, tmp_path: Path) -> None:
    baseline = finished.records[0]
    weights, biases, norm = 16 * 32 + 32 * 32 + 32 * 4, 32 + 32 + 4, 2 * 32
    assert baseline.parameters == weights + biases + norm
    assert baseline.nonzero == baseline.parameters - 32  # batch norm's bias is 0
    assert baseline.sparsity == 0
    running = 2 * 32 * 4 + 8  # mean and variance, and a count of batches in int64
    assert baseline.memory_bytes == 4 * baseline.parameters + running
    assert baseline.file_bytes == save_model(make_model(), tmp_path / "model.safetensors")
    assert baseline.metrics == accuracy(make_model().eval())


def test_a_stages_figures_are_those_of_its_file_by_hand(finished: CompressResult) -> None:
    assert finished.out is not None
    for record in finished.records[1:]:
        path = finished.out / "stages" / f"{record.index}-{record.name}.safetensors"
        assert record.file_bytes == path.stat().st_size
        assert record.metrics == accuracy(load_model(path, make_model().eval()))
    pruned = load_model(finished.out / "stages" / "1-prune.safetensors", make_model())
    masks = [module.mask for module in pruned.modules() if isinstance(module, MaskedLinear)]
    zeros, total = sum(int((~mask).sum()) for mask in masks), sum(mask.numel() for mask in masks)
    assert finished.records[1].sparsity == pytest.approx(zeros / total, abs=1e-12)
    assert zeros / total == 0.75
    nonzero = sum(int((p != 0).sum()) for p in pruned.parameters())
    assert finished.records[1].nonzero == nonzero
    assert finished.records[1].memory_bytes == finished.records[0].memory_bytes + total  # a byte a mask's element


def test_the_result_is_the_model_of_the_file(finished: CompressResult) -> None:
    assert finished.out is not None
    again = load_model(finished.out / "model.safetensors", make_model()).eval()
    x, _ = make_data()
    assert not finished.model.training
    assert torch.equal(finished.model(x), again(x))
    assert finished.metrics == accuracy(finished.model)
    assert finished.file_bytes == (finished.out / "model.safetensors").stat().st_size
    assert finished.file_bytes < finished.records[-1].file_bytes
    assert not (finished.out / "checkpoint.safetensors").exists()


def test_it_prints_as_a_table(finished: CompressResult) -> None:
    text = str(finished)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["stage", "metrics", "parameters"]
    assert [line.split()[1] for line in lines[2:7]] == ["baseline", "prune", "distill", "qat", "sparsify"]
    assert "smaller" in lines[-1]
    assert finished.__rich__().row_count == 5


def test_a_terminal_of_80_columns_shows_every_figure() -> None:
    first = StageRecord(0, "baseline", {}, 0.0, 0, {"accuracy": 0.9722}, 22_713_216, 0, 0.0, 90_852_864, 90_900_000,
                        {"1": 0.0123, "512": 0.345}, "the model as it came")  # fmt: skip
    last = replace(first, index=1, name="sparsify", seconds=12345.6, sparsity=0.8975, summary="warning: none [x]; 0")
    console = Console(width=80, file=io.StringIO())
    console.print(CompressResult(nn.Linear(1, 1), [first, last], file_bytes=10_000))
    text = console.file.getvalue()
    for shown in ("accuracy", "0.9722", "22,713,216", "0.8975", "1: 12.3", "512: 345", "12345.6", "sparsify: none [x]"):
        assert shown in text, (shown, text)


def test_run_json_says_the_same(finished: CompressResult) -> None:
    assert finished.out is not None
    content = json.loads((finished.out / "run.json").read_text())
    assert (content["format"], content["version"], content["status"]) == ("pycompress.run", 1, "finished")
    assert Recipe.of(content["recipe"]) == Recipe.of(RECIPE)
    assert [StageRecord.from_dict(stage) for stage in content["stages"]] == finished.records
    assert content["model"]["parameters"] == finished.records[0].parameters
    assert content["machine"]["versions"]["torch"] == torch.__version__


def test_history_has_the_steps_of_every_training_stage(finished: CompressResult) -> None:
    assert finished.out is not None
    stored = [json.loads(line) for line in (finished.out / "history.jsonl").read_text().splitlines()]
    assert stored == finished.history
    assert [(line["stage"], line["step"]) for line in stored] == [
        (stage, step) for stage, steps in ((1, 6), (2, 5), (3, 4)) for step in range(1, steps + 1)
    ]
    assert all(line["loss"] > 0 and line["lr"] >= 0 for line in stored)
    assert stored[5]["sparsity"] == 0.75
    assert "sparsity" not in stored[6]


def test_without_a_folder_the_model_is_the_same(finished: CompressResult) -> None:
    result = run(None)
    assert result.out is None
    x, _ = make_data()
    assert torch.equal(result.model(x), finished.model(x))
    assert result.metrics == finished.metrics
    assert result.history[-1]["loss"] == finished.history[-1]["loss"]
    assert result.file_bytes == finished.file_bytes
    with pytest.raises(ValueError, match="has no folder"):
        result.report()


def test_a_finished_run_is_returned_at_once(finished: CompressResult) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("a finished run asks for nothing")

    again = run(finished.out, train_batches=never, eval_fn=never)
    x, _ = make_data()
    assert again.records == finished.records
    assert again.history == finished.history
    assert torch.equal(again.model(x), finished.model(x))


def test_what_was_given_is_left_as_it_was(tmp_path: Path) -> None:
    model, teacher = make_model().train(), make_model()
    teacher[3].train(False)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model), copy.deepcopy(teacher)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    handler, threads, count = signal.getsignal(signal.SIGINT), set(threading.enumerate()), torch.get_num_threads()
    run(tmp_path / "run", model=model, teacher=teacher)
    for now, then in zip((model, teacher), before, strict=True):
        assert [(name, type(m), m.training) for name, m in now.named_modules()] == [
            (name, type(m), m.training) for name, m in then.named_modules()
        ]
        for (name, tensor), (_, old) in zip(now.named_parameters(), then.named_parameters(), strict=True):
            assert torch.equal(tensor, old), name
            assert tensor.requires_grad == old.requires_grad
            assert tensor.grad is None
        assert all(torch.equal(a, b) for a, b in zip(now.buffers(), then.buffers(), strict=True))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002
    assert signal.getsignal(signal.SIGINT) is handler
    assert set(threading.enumerate()) == threads
    assert torch.get_num_threads() == count


def test_another_seed_is_another_model_and_the_same_seed_the_same() -> None:
    stages = [{"finetune": {"steps": 3}}]
    x, _ = make_data()
    outputs = [run(None, recipe={"stages": stages, "seed": seed, **QUIET}).model(x) for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_latency_is_measured_beside_the_baseline(tmp_path: Path) -> None:
    recipe = {"stages": [{"quantize": {}}], "measure": {"rounds": 2, "batch_sizes": [1, 4]}}
    x, _ = make_data()
    result = compress(make_model(), recipe, calibration=[x], out=tmp_path / "run", progress=False)
    assert [list(record.latency) for record in result.records] == [["1", "4"], ["1", "4"]]
    assert all(seconds > 0 for record in result.records for seconds in record.latency.values())
    assert result.latency["4"]["after"]["p50"] == result.records[1].latency["4"]
    assert {row["name"] for row in result.layers} == {"0", "3", "6"}
    assert "at batch 4" in result.summary()


@pytest.mark.parametrize(
    ("stage", "warning"),
    [
        ({"prune": {"sparsity": 0.0}}, "nothing was pruned"),
        ({"sparsify": {}}, "no layer became sparse"),
        ({"quantize": {"skip": ["0", "3", "6"]}}, "no layer was quantised"),
        ({"quantize": {"skip": ["0", "3", "6"], "mode": "static", "smooth": 0.5}}, "no layer was quantised"),
        ({"finetune": {"steps": 1, "lr": 1e-30, "freeze": ["4"]}}, ""),
    ],
)
def test_a_stage_that_did_nothing_says_so(stage: dict[str, Any], warning: str) -> None:
    record = run(None, recipe={"stages": [stage], **QUIET}).records[1]
    assert record.warning == warning
    if warning:
        assert f"warning: {warning}" in record.summary


def test_training_that_changes_nothing_says_so() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    record = run(None, model=model, recipe={"stages": [{"finetune": {"steps": 2, "lr": 1e-30}}], **QUIET}).records[1]
    assert record.warning == "this stage changed nothing"


@pytest.mark.parametrize(
    "stages",
    [
        [{"low_rank": {"rank": 4, "skip": ["6"]}}, {"prune": {"sparsity": 0.5, "method": "wanda"}}, "sparsify"],
        [{"prune": {"sparsity": 0.5, "method": "taylor"}}, {"finetune": {"steps": 2}}, "quantize"],
        [
            {"prune": {"sparsity": 0.5, "method": "movement", "skip": ["6"]}},
            {"sparsify": {"format": "bitmap"}},
            "quantize",
        ],
        [{"qat": {"mode": "static", "train": {"steps": 2}}}, {"quantize": {"mode": "static"}}],
        [{"quantize": {"mode": "static", "method": "mse", "smooth": 0.5}}],
        [{"quantize": {"sensitivity": {"target": 0.99999}}}],
        [{"quantize": {"mode": "int4", "group_size": 8, "symmetric": False, "layers": "all"}}],
    ],
)
def test_recipes_of_all_stages_run(stages: list[Any], tmp_path: Path) -> None:
    result = run(tmp_path / "run", recipe={"stages": stages, **QUIET})
    assert len(result.records) == len(stages) + 1
    assert result.file_bytes < result.records[0].file_bytes
    assert all(not record.warning for record in result.records)
    x, _ = make_data()
    assert result.model(x).isfinite().all()


@pytest.mark.parametrize("mode", ["static", "nf4"])
def test_layers_of_other_kinds_are_quantised_too(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_kinds, "why_not", lambda conv: "")  # however small
    model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    stage = Quantize(mode=mode, layers=("conv2d", "linear"), group_size=16 if mode == "nf4" else 128)
    result = run(tmp_path / "run", model=model, recipe={"stages": [stage], **QUIET})
    assert type(result.model[1]) is (Int8Conv2d if mode == "static" else nn.Conv2d)
    assert type(result.model[4]) is (Int8Linear if mode == "static" else Int4Linear)
    loaded = load_model(tmp_path / "run" / "model.safetensors", copy.deepcopy(model))
    x, _ = make_data()
    assert torch.equal(loaded.eval()(x), result.model.eval()(x))


def test_conv1d_is_pruned_while_it_trains(tmp_path: Path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(8, 16), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), conv1d(4, 8))
    stages = [{"prune": {"sparsity": 0.5, "method": "taylor", "skip": ["4"], "train": {"steps": 4}}}, "quantize"]
    result = run(tmp_path / "run", model=model, recipe={"stages": stages, **QUIET})
    pruned = load_model(tmp_path / "run" / "stages" / "1-prune.safetensors", copy.deepcopy(model))
    assert [type(layer) for layer in pruned[::2]] == [MaskedLinear, MaskedLinear, conv1d]
    assert pruned[0].sparsity == pruned[2].sparsity == 0.5
    assert not torch.equal(pruned[0].weight[pruned[0].mask], model[0].weight.t()[pruned[0].mask])  # it was trained
    assert all(not record.warning for record in result.records)


def test_a_target_out_of_reach_takes_what_comes_nearest(tmp_path: Path) -> None:
    stage = Quantize(sensitivity={"target": 0.9999999, "gentler": ["weight_only"]})
    record = run(tmp_path / "run", recipe=Recipe(stages=(stage,), **QUIET)).records[1]
    assert "no choice reaches" in record.warning


def test_masks_and_fake_quantisation_last_from_stage_to_stage(finished: CompressResult) -> None:
    assert finished.out is not None
    distilled = load_model(finished.out / "stages" / "2-distill.safetensors", make_model())
    assert all(isinstance(distilled[i], MaskedLinear) for i in (0, 3, 6))
    qat = load_model(finished.out / "stages" / "3-qat.safetensors", make_model())
    assert all(isinstance(qat[i], FakeQuantLinear) and qat[i].mask is not None for i in (0, 3, 6))


def test_stages_may_be_objects_and_a_number_is_a_metric() -> None:
    stages = [Prune(sparsity=0.5), Finetune(steps=2)]
    result = run(None, recipe=Recipe(stages=tuple(stages), **QUIET), eval_fn=lambda model: torch.tensor(0.5))
    assert result.metrics == {"metric": 0.5}


def test_a_metric_that_becomes_nan_is_kept_as_such(tmp_path: Path) -> None:
    values = iter([1.0, float("nan")])
    recipe = {"stages": ["quantize"], **QUIET}
    result = run(tmp_path / "run", recipe=recipe, eval_fn=lambda model: next(values))
    assert np.isnan(result.metrics["metric"])
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["stages"][1]["metrics"] == {"metric": None}
    assert np.isnan(run(tmp_path / "run", recipe=recipe).metrics["metric"])


def test_a_loader_with_a_generator_of_its_own_repeats() -> None:
    loaders = [make_loader(), make_loader()]
    for loader in loaders:
        loader.generator = torch.Generator()
    next(iter(loaders[1]))  # has been used before
    recipe = {"stages": [{"finetune": {"steps": 7}}], **QUIET}
    first, second = (run(None, recipe=recipe, train_batches=loader).history[-1]["loss"] for loader in loaders)
    assert first == second
