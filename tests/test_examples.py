"""The examples: each recipe is whole as it stands, and runs from end to end with a small model and few steps."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pycompress import cli, info
from pycompress.model_file import load_model
from pycompress.nn import Int8Linear, SparseLinear
from pycompress.recipe import Recipe
from pycompress.workflow.config import load_task

EXAMPLES = Path(__file__).parents[1] / "examples"
FUNCTIONS = ("model", "teacher", "train_batches", "calibration", "eval_fn", "loss_fn")

runner = CliRunner()


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Runs and models are kept below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(info, "collect", lambda **options: {})  # it would try what Triton's interpreter can do
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other longer than a model this small computes
    yield
    torch.set_num_threads(threads)


def quick(name, tmp_path, stage_steps, **arguments):
    """The example's recipe with that many steps in every stage, its model called with `arguments`; returns the file."""
    values = yaml.safe_load((EXAMPLES / name / "recipe.yaml").read_text())
    for function in set(FUNCTIONS) & set(values):
        call = values[function] if isinstance(values[function], dict) else {"call": values[function]}
        values[function] = call | {"call": f"{EXAMPLES / name}/{call['call']}"}
    values["model"] |= arguments
    values["measure"] = {"batch_sizes": [2], "rounds": 3, "layers": False}
    for stage in values["stages"]:
        for options in stage.values() if isinstance(stage, dict) else ():
            training = options if "steps" in options else options.get("train")
            if training:
                training["steps"] = stage_steps
                training.pop("epochs", None)
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(path, out="run"):
    result = runner.invoke(cli.app, ["compress", str(path), "--out", out])
    assert result.exit_code == 0, result.output
    return json.loads(Path(out, "run.json").read_text())


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXAMPLES.glob("*/recipe.yaml")))
def test_recipes_are_whole(name):
    path = EXAMPLES / name / "recipe.yaml"
    task = load_task(path)
    assert {"model", "eval_fn"} <= task.functions.keys()
    assert Recipe.of(path) == task.recipe
    assert f"pycompress compress examples/{name}/recipe.yaml" in path.read_text()


def test_digits_from_end_to_end(tmp_path):
    size = {"width": 64, "depth": 1, "heads": 2, "steps": 150}
    path = quick("digits", tmp_path, stage_steps=30, **size)
    state = run(path)
    assert [stage["name"] for stage in state["stages"]] == ["baseline", "prune", "qat", "sparsify", "quantize"]
    before, _, trained, sparse, after = (stage["metrics"]["accuracy"] for stage in state["stages"])
    assert before > 40  # guessing is right in 10 of 100
    assert sparse == trained  # what was trained is what the kernels compute
    assert state["stages"][3]["sparsity"] > 0.85

    task = load_task(path)
    functions = task.arguments(seed=0)
    compressed = load_model("run/model.safetensors", functions["model"])
    layers = [type(module) for module in compressed.modules() if isinstance(module, (SparseLinear, Int8Linear))]
    assert len(layers) == 8
    assert functions["eval_fn"](compressed)["accuracy"] == after
    original = sum(p.numel() * p.element_size() for p in task.arguments(seed=0)["model"].parameters())
    assert Path("run/model.safetensors").stat().st_size < original / 8


def test_the_digits_model_is_trained_once(tmp_path, capsys):
    make = load_task(EXAMPLES / "digits" / "recipe.yaml").functions["model"]
    models = [make(seed=1, width=16, depth=1, heads=1, steps=3) for _ in range(2)]
    one, two = ({name: value.tolist() for name, value in model.state_dict().items()} for model in models)
    assert one == two
    assert capsys.readouterr().err.count("training the model") == 1
    assert make(seed=2, width=16, depth=1, heads=1, steps=3).head.weight.tolist() != one["head.weight"]
