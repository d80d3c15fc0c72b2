"""save_pretrained and load_pretrained: the same model again, to the bit, from a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pycompress.atomic_file import replacing
from pycompress.checkpoint import load_pretrained, pretrained_sizes, read_pretrained_header, save, save_pretrained
from pycompress.model_file import ModelFileError
from pycompress.structure import describe
from tests.model_file_models import CASES, Mixed, compressed, fresh, mlp

OLD = Path(__file__).parent / "data" / "checkpoint_version_1"


def _states(model: nn.Module) -> dict[str, tuple[object, ...]]:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: (t.dtype, t.shape, t.requires_grad, t.device) for name, t in tensors.items()}


@pytest.mark.parametrize("compact", [False, True, 1], ids=["plain", "compact", "a group a tensor"])
@pytest.mark.parametrize("name", CASES)
def test_loads_as_saved(name: str, compact: bool | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = compressed(name)
    if compact and compact is not True:  # as large ones are coded
        monkeypatch.setattr(save, "GROUP_BYTES", compact)
    report = save_pretrained(model, tmp_path / "m", compact=bool(compact), max_shard_size=6000, extra={"step": 3})
    for device in ("cpu", "meta"):
        new = fresh(name, device)
        assert load_pretrained(tmp_path / "m", new) is new
        with torch.no_grad():
            assert torch.equal(model(x), new(x))
        assert _states(new) == _states(model)
        assert describe(new) == describe(model)
    assert read_pretrained_header(tmp_path / "m")["extra"] == {"step": 3}
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert report.file_bytes == sum(path.stat().st_size for path in files)
    assert report.files == len(files)
    assert str(pretrained_sizes(tmp_path / "m")) == str(report)
    assert not [path for path in os.listdir(tmp_path / "m") if path.startswith(".")]


def test_shards_are_those_of_hugging_face(tmp_path: Path) -> None:
    model, _ = compressed("int8 dynamic")
    report = save_pretrained(model, tmp_path, max_shard_size="2KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert set(index["weight_map"]) == set(state)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) == report.files > 2
    for file in names:
        tensors = load_file(tmp_path / file)
        assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
        assert sum(t.nbytes for t in tensors.values()) <= 2000 or len(tensors) == 1
    save_pretrained(model, tmp_path)  # the old shards and their index would be taken for this model's
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "pycompress.json"]


@pytest.mark.parametrize("size", ["5 bytes", "", 0, -1, 2.5, "1.5.2GB", None, True, "9" * 400 + "GB"])
def test_a_shard_size_that_is_none(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_pretrained: max_shard_size=.*5GB"):
        save_pretrained(mlp(), tmp_path / "m", max_shard_size=size)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
def test_tied_shared_frozen_and_transient(compact: bool, tmp_path: Path) -> None:
    model: Any = compressed("mixed")[0]
    save_pretrained(model, tmp_path, compact=compact, max_shard_size=2000)
    new: Any = load_pretrained(tmp_path, fresh("mixed", "meta"))
    assert new.head.weight is new.embedding.weight
    assert new.again is new.first
    assert not new.scale.requires_grad
    assert new.lstm._flat_weights[0] is new.lstm.weight_ih_l0
    assert torch.equal(new.offset, model.offset)
    assert "offset" not in new.state_dict()


def test_a_device_is_where_everything_goes(tmp_path: Path) -> None:
    """The meta device stands for a GPU: nothing may stay behind."""
    model, _ = compressed("mixed")
    save_pretrained(model, tmp_path)
    new = fresh("mixed", "cpu")
    new.register_buffer("idle", torch.ones(3), persistent=False)
    load_pretrained(tmp_path, new, device="meta")
    assert {t.device.type for t in (*new.parameters(), *new.buffers())} == {"meta"}
    load_pretrained(tmp_path, fresh("mixed", "meta"), device="cpu")
    with pytest.raises(RuntimeError, match="nowhere"):
        load_pretrained(tmp_path, fresh("mixed", "cpu"), device="nowhere")


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
def test_within_torch_device_meta(compact: bool, tmp_path: Path) -> None:
    """As docs/checkpoints.md has it: the model is built and loaded in one breath."""
    model, x = compressed("mixed")
    save_pretrained(model, tmp_path, compact=compact)
    with torch.device("meta"):
        new = load_pretrained(tmp_path, fresh("mixed", "meta"))
    assert {t.device.type for t in (*new.parameters(), *new.buffers())} == {"cpu"}
    assert torch.equal(new(x), model(x))


# ---- an old checkpoint ----------------------------------------------------------------------------------------------


def old_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))


@pytest.mark.parametrize("form", ["plain", "compact"])
def test_a_checkpoint_of_version_1_still_loads(form: str) -> None:
    model: Any = load_pretrained(OLD / form, old_model())
    kinds = ["Embedding", "Int8Linear", "Identity", "SparseLinear", "Linear"]
    assert [type(layer).__name__ for layer in model] == kinds
    assert not model.training
    with torch.no_grad():
        y = model(torch.arange(8))
    assert torch.allclose(y, torch.tensor(json.loads((OLD / "outputs.json").read_text())), rtol=1e-5, atol=1e-6)
    assert read_pretrained_header(OLD / form)["extra"] == {"note": "written by version 1"}


# ---- crashes --------------------------------------------------------------------------------------------------------


class _Crash(BaseException):
    pass


def _crash_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies, as it were, before the step of that number: nothing is tidied up."""
    steps = 0

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if steps == number:
                raise _Crash
            steps += 1
            return step(*args, **kwargs)

        return run

    for name in ("write_tensors", "write_text"):
        monkeypatch.setattr(save, name, counted(getattr(save, name)))
    monkeypatch.setattr(save.os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
def test_a_crash_leaves_the_old_checkpoint_or_the_new_one(compact: bool, tmp_path: Path) -> None:
    old, new = compressed("int8 dynamic")[0], compressed("int8 dynamic")[0]
    outcomes = []
    for number in range(100):
        folder = tmp_path / str(number)
        save_pretrained(old, folder, max_shard_size=1500)
        with pytest.MonkeyPatch.context() as patch:
            _crash_at(number, patch)
            try:
                save_pretrained(new, folder, max_shard_size=3000, compact=compact)
                done = True
            except _Crash:
                done = False
        found = load_pretrained(folder, mlp()).state_dict()
        is_new = all(torch.equal(found[name], tensor) for name, tensor in new.state_dict().items())
        assert is_new or all(torch.equal(found[name], tensor) for name, tensor in old.state_dict().items()), number
        outcomes.append(is_new)
        save_pretrained(new, folder)
        assert sorted(os.listdir(folder)) == ["model.safetensors", "pycompress.json"]
        if done:
            break
    assert outcomes[0] is False
    assert outcomes == sorted(outcomes)
    assert 4 < len(outcomes) < 100


def test_an_error_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compressed("int8 dynamic")
    save_pretrained(model, tmp_path, max_shard_size=1500)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(path: Path, text: str) -> None:
        with replacing(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(mlp(), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


# ---- of other models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(*list(mlp().children())[:3]), "the model has no layer '3'"),
        (lambda: nn.Sequential(*mlp().children(), nn.Linear(12, 3)), "no tensor for 5.weight, 5.bias"),
        (Mixed, r"has no layer '0'.* A Sequential was saved, and the model is a Mixed"),
    ],
)
def test_another_model_is_refused_and_unchanged(other: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    model, _ = compressed("int8 dynamic")
    save_pretrained(model, tmp_path)
    new = other()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    with pytest.raises(ModelFileError, match=message) as caught:
        load_pretrained(tmp_path, new)
    assert "unchanged" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


def test_without_a_model(tmp_path: Path) -> None:
    save_pretrained(compressed("int8 dynamic")[0], tmp_path / "m")
    with pytest.raises(ModelFileError, match=r"no model of transformers .* load_pretrained\(folder, model\)"):
        load_pretrained(tmp_path / "m")
    with pytest.raises(TypeError, match="model is a list"):
        load_pretrained(tmp_path / "m", [1])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path / "none", mlp())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match=r"has no pycompress.json; save_pretrained writes one"):
        load_pretrained(tmp_path / "empty", mlp())


def test_a_missing_or_foreign_shard_is_named(tmp_path: Path) -> None:
    save_pretrained(compressed("int8 dynamic")[0], tmp_path / "a", max_shard_size=3000)
    save_pretrained(compressed("float")[0], tmp_path / "b")
    shard = next((tmp_path / "a").glob("model-00002-of-0000?.safetensors"))
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ModelFileError, match=r"00002-of-0000\d.* is missing, .* one of \d shards; copy it too"):
        load_pretrained(tmp_path / "a", mlp())
    shutil.copy(tmp_path / "b" / "model.safetensors", shard)
    with pytest.raises(ModelFileError, match="belongs to another checkpoint"):
        load_pretrained(tmp_path / "a", mlp())
    shard.write_bytes(kept)
    os.rename(shard, tmp_path / "elsewhere")  # as the cache of the hub keeps files
    shard.symlink_to(tmp_path / "elsewhere")
    load_pretrained(tmp_path / "a", mlp())


@pytest.mark.parametrize(("version", "remedy"), [(2, "update pycompress"), ("1", "damaged"), (True, "damaged")])
def test_another_version_says_what_to_do(version: object, remedy: str, tmp_path: Path) -> None:
    save_pretrained(mlp(), tmp_path)
    path = tmp_path / "pycompress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(ModelFileError, match=f"has version {version} and this pycompress reads 1; .*{remedy}"):
        load_pretrained(tmp_path, mlp())


# ---- memory ---------------------------------------------------------------------------------------------------------

_PEAK = """
import sys, torch
from torch import nn
from pycompress.bench.memory import peak_extra_bytes
from pycompress.checkpoint import load_pretrained
torch.set_num_threads(1)
with torch.device("meta"):
    warm, model = (nn.Sequential(*(nn.Linear(1024, 2048) for _ in range(n))) for n in (1, 24))
load_pretrained(sys.argv[1], warm)
print(peak_extra_bytes(lambda: load_pretrained(sys.argv[2], model)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
def test_float_weights_are_never_in_memory(compact: bool, tmp_path: Path) -> None:
    """50 MB of int8 weights are 200 MB of float ones."""
    from pycompress.nn import Int8Linear

    for name, layers in (("warm", 1), ("m", 24)):
        model = nn.Sequential(*(Int8Linear(1024, 2048) for _ in range(layers)))
        for layer in model:
            weight = torch.randint(-100, 100, (2048, 1024), dtype=torch.int8)
            layer.load_state_dict({**layer.state_dict(), "weight": weight})
        save_pretrained(model, tmp_path / name, compact=compact)
    arguments = [sys.executable, "-c", _PEAK, str(tmp_path / "warm"), str(tmp_path / "m")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout) < 1.4 * 24 * 1024 * 2048 + 20e6  # a group of 16 MB, or some layers, on the way
