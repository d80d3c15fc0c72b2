"""What compress() refuses before any work: the message names the stage, the value and the remedy; no file is left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pycompress.recipe import RecipeError
from pycompress.workflow import PreflightError, compress
from tests.workflow_models import Encoder, token_batch
from tests.workflow_runs import QUIET, accuracy, make_data, make_loader, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = {"steps": 2}


def refused(out: Path, stages: list[Any], message: str, kind: type[Exception] = PreflightError, **options: Any) -> None:
    model = options.pop("model", None) or make_model()
    with pytest.raises(kind, match=message):
        compress(model, {"stages": stages, **QUIET}, out=out, progress=False, **options)
    assert not out.exists()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run"


def test_training_without_batches(out: Path) -> None:
    refused(out, [{"finetune": TRAIN}], r"stage 1 \(finetune\): it trains, and train_batches is None")
    stages = [{"prune": {"sparsity": 0.5}}, {"distill": {"train": TRAIN}}]
    refused(out, stages, r"stage 2 \(distill\): it trains", calibration=[make_data()[0]])


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"quantize": {"mode": "static"}}, "mode='static' needs sample inputs; pass calibration"),
        ({"quantize": {"smooth": 0.5}}, "smooth needs sample inputs"),
        ({"quantize": {"sensitivity": {}}}, "sensitivity needs sample inputs"),
        ({"prune": {"sparsity": 0.5, "method": "wanda"}}, "method='wanda' needs sample inputs"),
        ({"prune": {"sparsity": 0.5, "method": "taylor"}}, "method='taylor' needs gradients of the loss"),
    ],
)
def test_sample_inputs_are_missing(out: Path, stage: dict[str, Any], message: str) -> None:
    refused(out, [stage], rf"stage 1 \({next(iter(stage))}\): {message}")


def test_taylor_is_not_content_with_inputs_without_labels(out: Path) -> None:
    stages = [{"prune": {"sparsity": 0.5, "method": "taylor"}}]
    refused(out, stages, "needs gradients of the loss, and train_batches is None", calibration=[make_data()[0]])


def test_iterators_that_are_used_up(out: Path) -> None:
    refused(out, [{"finetune": TRAIN}], "gone through only once", kind=TypeError, train_batches=iter(make_loader()))
    x, _ = make_data()
    refused(out, ["quantize"], "gone through only once", kind=TypeError, calibration=iter([x]))


def test_things_of_the_wrong_kind(out: Path) -> None:
    refused(out, ["quantize"], "eval_fn is a int; expected a function", kind=TypeError, eval_fn=3)
    refused(out, ["quantize"], "teacher is a str; expected a torch.nn.Module", kind=TypeError, teacher="bert")
    refused(out, ["quantize"], "expected a torch.nn.Module", kind=TypeError, model="bert")
    refused(out, ["quantise"], "unknown stage 'quantise'; did you mean 'quantize'", kind=RecipeError)
    refused(out, ["sparsify", {"prune": {"sparsity": 0.5}}], "cannot come after sparsify", kind=RecipeError)


def test_a_name_that_is_not_there(out: Path) -> None:
    refused(out, [{"quantize": {"skip": ["lm_head"]}}], r"stage 1 \(quantize\): .*lm_head")
    stages = [{"finetune": {**TRAIN, "freeze": ["embeddings"]}}]
    refused(out, stages, r"stage 1 \(finetune\): .*embeddings", train_batches=make_loader())


def test_a_pattern_that_does_not_fit(out: Path) -> None:
    stages = [{"prune": {"sparsity": 0.5, "pattern": "head"}}]
    refused(out, stages, r"stage 1 \(prune\)")
    low_rank = {"low_rank": {"rank": 4, "skip": ["6"]}}
    stages = [low_rank, {"prune": {"sparsity": 0.5, "pattern": "8x8"}}]
    refused(out, stages, r"stage 2 \(prune\): .*layer '6'")
    stages = [low_rank, {"prune": {"sparsity": 0.5, "pattern": "8x8", "train": TRAIN}}]
    refused(out, stages, r"stage 2 \(prune\): .*layer '6'", train_batches=make_loader())
    stages = [{"prune": {"sparsity": 0.5, "schedule": {"end": 9}, "train": TRAIN}}]
    refused(out, stages, r"stage 1 \(prune\): schedule.end=9 is after the last of 2 steps", train_batches=make_loader())


def test_a_teacher_that_does_not_match(out: Path) -> None:
    other = nn.Sequential(nn.Linear(16, 5))
    stages = [{"distill": {"train": TRAIN}}]
    refused(out, stages, r"stage 1 \(distill\): .*(4|5)", train_batches=make_loader(), teacher=other)
    narrow = nn.Sequential(nn.Linear(8, 4))
    refused(out, stages, r"stage 1 \(distill\): .*teacher", train_batches=make_loader(), teacher=narrow)
    stages = [{"distill": {"train": TRAIN, "hidden": {"layers": {"3": "nowhere"}}}}]
    refused(out, stages, r"stage 1 \(distill\): .*nowhere", train_batches=make_loader())


def test_attention_maps_that_dropout_has_changed(out: Path) -> None:
    """Dropout shows in train mode alone, as the student will run."""
    stages = [{"distill": {"alpha": 0, "loss": "none", "attention": {"weight": 1}, "train": TRAIN}}]
    batches = [token_batch(4, 6)]
    message = r"stage 1 \(distill\): .*rows do not sum to 1: dropout"
    refused(out, stages, message, model=Encoder(dropout=0.5), teacher=Encoder(1), train_batches=batches)


def test_batches_that_the_model_does_not_take(out: Path) -> None:
    refused(out, ["quantize"], "calibration: ", calibration=[torch.zeros(2, 7)])
    refused(out, ["quantize"], "calibration is empty", calibration=[])
    x, labels = make_data()
    refused(out, [{"finetune": TRAIN}], "train_batches", train_batches=[(x[:, :3], labels)])
    refused(out, [{"finetune": TRAIN}], "train_batches", train_batches=[3])
    refused(out, [{"finetune": TRAIN}], "train_batches is empty", train_batches=[])


def test_a_loss_that_is_none(out: Path) -> None:
    nan = [(torch.full((2, 16), float("nan")), torch.zeros(2, dtype=torch.long))]
    refused(out, [{"finetune": TRAIN}], "first batch's loss is nan", train_batches=nan)
    options = {"train_batches": make_loader(), "loss_fn": lambda output, batch: output}
    refused(out, [{"finetune": TRAIN}], r"stage 1 \(finetune\): .*loss_fn", **options)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "eval_fn returned None"),
        (True, "eval_fn returned True"),
        ("good", "eval_fn returned 'good'"),
        ({}, "eval_fn returned {}"),
        ({"a": [1]}, r"eval_fn returned 'a': \[1\]"),
        ({1: 1.0}, "eval_fn returned {1: 1.0}"),
        (torch.zeros(2), r"eval_fn returned a tensor \(2,\)"),
        (float("nan"), "metric = nan for the model as it came"),
        ({"a": 1.0, "b": float("inf")}, "b = inf"),
    ],
)
def test_an_evaluation_that_gives_no_number(out: Path, answer: Any, message: str) -> None:
    refused(out, ["quantize"], f"eval_fn, on the model as it came: .*{message}", eval_fn=lambda model: answer)


def test_an_evaluation_that_raises(out: Path) -> None:
    def eval_fn(model: nn.Module) -> float:
        raise KeyError("validation")

    refused(out, ["quantize"], "eval_fn, on the model as it came: KeyError: 'validation'", eval_fn=eval_fn)
    with pytest.raises(PreflightError) as found:
        compress(make_model(), {"stages": ["quantize"], **QUIET}, eval_fn=eval_fn)
    assert isinstance(found.value.__cause__, KeyError)


def test_a_disk_that_is_too_small(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out.anchor)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    stages = [{"finetune": TRAIN}]
    refused(out, stages, r"has 1.00 MB free, and the files of this run may take 1\.\d+ MB", train_batches=make_loader())


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(PreflightError, match=r"is a file|Not a directory"):
            compress(make_model(), {"stages": ["quantize"], **QUIET}, out=out)
    assert (tmp_path / "file").read_text() == "x"
    assert os.listdir(tmp_path) == ["file"]


def test_a_model_that_cannot_be_copied(out: Path) -> None:
    model = make_model()
    model.scale = nn.Linear(2, 2)(torch.ones(2))  # a result, with a graph behind it
    refused(out, ["quantize"], "the model cannot be copied", model=model)


def test_models_stay_as_they_were(tmp_path: Path) -> None:
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = {"stages": [{"prune": {"sparsity": 0.5}}, {"distill": {"train": TRAIN}}], **QUIET}
    with pytest.raises(PreflightError):
        compress(model, recipe, train_batches=make_loader(), teacher=nn.Linear(16, 5), eval_fn=accuracy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
