"""Going on with a run: from its last stage or step, to the same bits; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pycompress import cost_model, info
from pycompress.cost_core import CostModel, Shape
from pycompress.sparsify import sparsify_ as real
from pycompress.workflow import CompressError, PreflightError
from tests.workflow_runs import QUIET, RECIPE, STAGES, accuracy, digest, make_loader, make_model, run

pytestmark = pytest.mark.usefixtures("one_thread", "no_machine")


class Broken(Exception): ...


class FailingLoader:
    """Batches until one of the `last`; then it breaks."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __iter__(self) -> Iterator[Any]:
        for batch in make_loader():
            self.left -= 1
            if self.left < 0:
                raise Broken("the network is down")
            yield batch

    def __len__(self) -> int:
        return len(make_loader())


def stop_at(out: Path, batches: int, **options: Any) -> CompressError:
    with pytest.raises(CompressError) as found:
        run(out, train_batches=FailingLoader(batches), **options)
    return found.value


def state_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


# The preflight takes an epoch for calibration, and a batch for each of 3 stages; these train on 6, 5 and 4, after one.
_BEFORE = 5 + 3


@pytest.mark.parametrize("batches", [_BEFORE + 2, _BEFORE + 5, _BEFORE + 9, _BEFORE + 12, _BEFORE + 15])
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, whole: str, batches: int) -> None:
    out = tmp_path / "run"
    error = stop_at(out, batches)
    assert isinstance(error.__cause__, Broken)
    assert "the network is down" in str(error)
    assert "the same call goes on from there" in str(error)
    assert state_of(out)["status"] == "failed"
    assert "the network is down" in state_of(out)["error"]
    result = run(out)
    assert digest(out / "model.safetensors") == whole
    assert result.notes == []
    assert state_of(out)["status"] == "finished"
    assert state_of(out)["error"] is None
    steps = [(line["stage"], line["step"]) for line in result.history]
    assert steps == [(stage, step) for stage, count in ((1, 6), (2, 5), (3, 4)) for step in range(1, count + 1)]


def test_a_failing_evaluation_costs_no_training(tmp_path: Path, whole: str) -> None:
    out, calls = tmp_path / "run", []

    def eval_fn(model: nn.Module) -> dict[str, float]:
        calls.append(model)
        if len(calls) == 3:
            raise Broken("out of memory")
        return accuracy(model)

    with pytest.raises(CompressError, match=r"the evaluation after stage 2 \(distill\) failed: Broken: out of memory"):
        run(out, eval_fn=eval_fn)
    assert [stage["name"] for stage in state_of(out)["stages"]] == ["baseline", "prune"]
    before = digest(out / "stages" / "2-distill.safetensors")
    result = run(out)
    assert digest(out / "stages" / "2-distill.safetensors") == before
    assert result.records[2].steps == 5
    assert digest(out / "model.safetensors") == whole


def test_an_evaluation_that_changes_the_model_changes_nothing(tmp_path: Path, whole: str) -> None:
    def eval_fn(model: nn.Module) -> float:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return 0.0

    run(tmp_path / "run", eval_fn=eval_fn)
    assert digest(tmp_path / "run" / "model.safetensors") == whole


def test_a_conversion_that_raises(tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    def sparsify_(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel for this")

    with monkeypatch.context() as patch:
        patch.setattr("pycompress.workflow.stages.sparsify_", sparsify_)
        message = r"stage 4 \(sparsify\) failed: no kernel for this.*after stage 3 \(qat\)"
        with pytest.raises(CompressError, match=message):
            run(out)
    run(out)
    assert digest(out / "model.safetensors") == whole


def test_what_was_found_by_timing_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's figures change between the two processes; the second one goes by those of the first."""
    out, seen = tmp_path / "run", []
    figures = iter([2.0, 3.0])

    def default_cost_model(device: object = None) -> CostModel:
        found = cost_model.default_cost_model(device)
        changed = CostModel(found.fits, threads=found.threads, measured=found.measured)
        changed.correct("dense", 8, Shape.random(8, 8, 0.5, "float32"), next(figures))
        return changed

    def sparsify_(model: nn.Module, *args: Any, **options: Any) -> Any:
        if "cost_model" in options:
            seen.append(options["cost_model"].corrections)
            if len(seen) == 1:
                raise Broken("killed")
        return real(model, *args, **options)

    monkeypatch.setattr("pycompress.workflow.stages.default_cost_model", default_cost_model)
    monkeypatch.setattr("pycompress.workflow.stages.sparsify_", sparsify_)
    recipe = {"stages": [{"prune": {"sparsity": 0.5}}, "sparsify"], **QUIET}
    with pytest.raises(CompressError):
        run(out, recipe=recipe)
    assert "cost_model" in state_of(out)["choices"]["2"]
    run(out, recipe=recipe)
    assert seen[0] == seen[1]
    assert next(figures) == 3.0
    assert state_of(out)["choices"] == {}


def test_another_number_of_threads_is_told(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = state_of(copied)
    content["machine"] = {"threads": {"torch": 64}}
    (copied / "run.json").write_text(json.dumps(content))
    monkeypatch.setattr(info, "collect", lambda: {"threads": {"torch": 1}})
    with pytest.warns(UserWarning, match=r"began with threads.torch=64 and goes on with 1: last bits may differ"):
        run(copied)


def test_a_calibration_that_raises_in_the_middle(tmp_path: Path) -> None:
    class Inputs:
        calls = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            Inputs.calls += 1
            yield torch.ones(4, 16)
            if Inputs.calls > 1:  # the first was the preflight
                raise Broken("a corrupt image")

    recipe = {"stages": [{"finetune": {"steps": 2}}, {"quantize": {"mode": "static"}}], **QUIET}
    with pytest.raises(CompressError, match=r"stage 2 \(quantize\) failed: Broken: a corrupt image"):
        run(tmp_path / "run", recipe=recipe, calibration=Inputs())
    result = run(tmp_path / "run", recipe=recipe, calibration=[torch.ones(4, 16)])
    assert result.records[-1].name == "quantize"


def test_a_loss_that_becomes_nan_leaves_the_last_good_step(tmp_path: Path, whole: str) -> None:
    out, calls = tmp_path / "run", []

    def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
        calls.append(1)
        loss = nn.functional.cross_entropy(output, batch[1])
        return loss * float("nan") if len(calls) == limit else loss

    recipe = {"stages": [{"finetune": {"steps": 8, "lr": 0.01}}], **QUIET}
    limit = 0
    run(tmp_path / "whole", recipe=recipe, loss_fn=loss_fn)
    calls.clear()
    limit = 8
    with pytest.raises(CompressError, match=r"stage 1 \(finetune\) failed: train: the loss is nan at step \d of 8"):
        run(out, recipe=recipe, loss_fn=loss_fn)
    assert (out / "checkpoint.safetensors").exists()
    limit = 0
    run(out, recipe=recipe, loss_fn=loss_fn)
    assert digest(out / "model.safetensors") == digest(tmp_path / "whole" / "model.safetensors")


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped in stage 2 behind a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYCOMPRESS_COST_MODEL", "builtin")
        patch.setattr(info, "collect", dict)
        out = tmp_path_factory.mktemp("stopped") / "run"
        stop_at(out, _BEFORE + 11)
    assert (out / "checkpoint.safetensors").exists()
    assert len(state_of(out)["stages"]) == 2
    return out


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    recipe = json.loads(json.dumps(RECIPE))
    place = recipe
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return recipe


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (changed(["stages", 0, "prune", "sparsity"], 0.5), r"stage 1 \(prune\) had sparsity=0.75 and has sparsity=0.5"),
        (changed(["stages", 1, "distill", "train", "lr"], 0.1), r"stage 2 \(distill\) had train.lr=0.01 and has"),
        (changed(["stages", 1, "distill", "tau"], 3.0), r"stage 2 \(distill\) had tau left out and has 3.0"),
        (changed(["stages", 1], {"finetune": {"steps": 2}}), "stage 2 was 'distill' and is 'finetune'"),
        (changed(["stages"], STAGES[:3]), "the recipe had 4 stages and has 3"),
        (changed(["seed"], 3), "the recipe's seed was 0 and is 3"),
    ],
)
def test_a_run_of_another_recipe(copied: Path, recipe: dict[str, Any], message: str) -> None:
    before = (copied / "run.json").read_bytes()
    with pytest.raises(PreflightError, match=f"holds another run: {message}.*resume=False"):
        run(copied, recipe=recipe)
    assert (copied / "run.json").read_bytes() == before


def test_saving_and_timing_may_change(copied: Path, whole: str) -> None:
    run(copied, recipe={"stages": STAGES, "checkpoint_seconds": 100.0, "measure": {"rounds": 1, "batch_sizes": [2]}})
    assert digest(copied / "model.safetensors") == whole


def test_a_run_of_another_model(copied: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model[3].bias[5] += 1e-6
    with pytest.raises(PreflightError, match=r"the model is another: '3.bias' has other values"):
        run(copied, model=model)
    with pytest.raises(PreflightError, match=r"the model is another: its parameters was 1796 and is"):
        run(copied, model=nn.Sequential(nn.Linear(16, 4)))
    with pytest.raises(PreflightError, match="the run had no teacher of its own"):
        run(copied, teacher=make_model())


def test_anew(copied: Path, whole: str) -> None:
    recipe = {"stages": [{"finetune": {"steps": 2}}], **QUIET}
    result = run(copied, recipe=recipe, resume=False)
    assert sorted(path.name for path in (copied / "stages").iterdir()) == ["1-finetune.safetensors"]
    assert not (copied / "checkpoint.safetensors").exists()
    assert {line["stage"] for line in result.history} == {1}
    run(copied, resume=False)
    assert digest(copied / "model.safetensors") == whole


def test_killed_while_it_began_anew(copied: Path, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"stages": [{"finetune": {"steps": 2}}], **QUIET}
    with monkeypatch.context() as patch:
        patch.setattr("pycompress.workflow.run_folder.RunFolder.remove_run", lambda self: 1 / 0)
        with pytest.raises(CompressError):
            run(copied, recipe=recipe, resume=False)
    assert state_of(copied)["restarting"]
    assert run(copied, recipe=recipe).records[-1].name == "finetune"
    assert not (copied / "stages" / "1-prune.safetensors").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "is damaged: not JSON"),
        (lambda text: "", "is damaged: not JSON"),
        (lambda text: "[]", "is no 'pycompress.run' file"),
        (lambda text: text.replace('"version": 1,', '"version": 2,', 1), "has version 2, of pycompress .*: upgrade"),
        (lambda text: text.replace('"status"', '"statu"', 1), "is damaged: it lacks 'status'"),
        (lambda text: text.replace('"name": "prune"', '"name": 3', 1), "is damaged: a stage has name=3"),
        (lambda text: text.replace('"index": 1', '"index": 2', 1), "its stages are not 0, 1, 2"),
        (lambda text: text.replace('"bytes":', '"byte":', 1), "is damaged: the file"),
    ],
)
def test_a_damaged_run_json(copied: Path, damage: Any, message: str) -> None:
    path = copied / "run.json"
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    with pytest.raises(PreflightError, match=message) as found:
        run(copied)
    assert "resume=False" in str(found.value)
    assert path.read_bytes() == before
    run(copied, resume=False, recipe={"stages": ["quantize"], **QUIET})


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 1.0])
def test_a_damaged_checkpoint_costs_its_stage_alone(copied: Path, whole: str, place: float) -> None:
    flip(copied / "checkpoint.safetensors", place)
    with pytest.warns(UserWarning, match=r"checkpoint.safetensors .*; stage 2 \(distill\) begins anew"):
        result = run(copied)
    assert len(result.notes) == 1
    assert digest(copied / "model.safetensors") == whole


def test_a_checkpoint_of_another_run(copied: Path, tmp_path: Path, whole: str) -> None:
    other = tmp_path / "other"
    stop_at(other, _BEFORE + 11, recipe={**RECIPE, "seed": 1})
    (other / "checkpoint.safetensors").replace(copied / "checkpoint.safetensors")
    with pytest.warns(UserWarning, match="is of another run"):
        run(copied)
    assert digest(copied / "model.safetensors") == whole


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_stage_is_done_again(copied: Path, whole: str, how: str) -> None:
    path = copied / "stages" / "1-prune.safetensors"
    if how == "flip":
        flip(path, 0.9)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=r"1-prune.safetensors .*; stage 1 \(prune\) is done again"):
        run(copied)
    assert digest(copied / "model.safetensors") == whole


def test_a_damaged_final_model_is_made_anew(tmp_path: Path, whole: str) -> None:
    out = tmp_path / "run"
    run(out)
    flip(out / "model.safetensors", 0.8)
    with pytest.warns(UserWarning, match="model.safetensors is damaged.*made anew"):
        run(out)
    assert digest(out / "model.safetensors") == whole


def test_a_torn_line_of_history_is_dropped(copied: Path, whole: str) -> None:
    with open(copied / "history.jsonl", "a") as file:
        file.write('{"stage": 2, "step": 5, "lo')
    result = run(copied)
    assert [line["step"] for line in result.history if line["stage"] == 2] == [1, 2, 3, 4, 5]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    for resume in (True, False):
        with pytest.raises(PreflightError, match=r"holds model.safetensors and no run.json"):
            run(tmp_path, resume=resume)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    def eval_fn(model: nn.Module) -> float:
        with pytest.raises(PreflightError, match="this process is working in"):
            run(tmp_path / "run")
        return 1.0

    run(tmp_path / "run", recipe={"stages": ["quantize"], **QUIET}, eval_fn=eval_fn)
    run(tmp_path / "run", recipe={"stages": ["quantize"], **QUIET})
