"""save_model and load_model: the same model again, to the bit, from one small file."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import pycompress
from pycompress.model_file import (
    ModelFileError,
    file_bytes,
    load_model,
    read_model_header,
    save_model,
    tensor_sizes,
)
from pycompress.structure import describe
from tests.model_file_models import CASES, Mixed, compressed, fresh, mlp


def _states(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """What has to come back of every parameter and buffer."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: (t.dtype, t.shape, t.requires_grad, t.is_meta) for name, t in tensors.items()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize("name", CASES)
def test_loads_as_saved(name: str, compact: bool, device: str, tmp_path: Path) -> None:
    model, x = compressed(name)
    path = tmp_path / "model.safetensors"
    size = save_model(model, path, compact=compact, extra={"step": 3})
    assert size == path.stat().st_size
    assert compact or size == file_bytes(model, extra={"step": 3})
    new = fresh(name, device)
    assert load_model(path, new) is new
    with torch.no_grad():
        assert torch.equal(model(x), new(x))
    assert _states(new) == _states(model)
    assert [n for n, _ in new.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [(n, type(m), m.training) for n, m in new.named_modules()] == [
        (n, type(m), m.training) for n, m in model.named_modules()
    ]
    assert describe(new) == describe(model)
    assert read_model_header(path)["extra"] == {"step": 3}


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize("name", ["masked", "masked dense", "qat static, masked"])
def test_training_goes_on_as_it_would_have(name: str, compact: bool, tmp_path: Path) -> None:
    model, x = compressed(name)
    model.train()
    save_model(model, tmp_path / "m.safetensors", compact=compact)
    new = load_model(tmp_path / "m.safetensors", fresh(name, "meta"))
    for each in (model, new):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for (key, ours), theirs in zip(model.state_dict().items(), new.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
def test_shared_is_stored_once_and_shared_again(compact: bool, tmp_path: Path) -> None:
    model, _ = compressed("mixed")
    save_model(model, tmp_path / "m.safetensors", compact=compact)
    names = {row[0] for row in tensor_sizes(tmp_path / "m.safetensors").tensors}
    assert "embedding.weight" in names
    assert not {"head.weight", "again.weight"} & names
    new = load_model(tmp_path / "m.safetensors", fresh("mixed", "meta"))
    assert new.head.weight is new.embedding.weight
    assert new.again is new.first
    assert isinstance(new.first, pycompress.nn.Int8Linear)
    assert not new.scale.requires_grad
    assert new.lstm._flat_weights[0] is new.lstm.weight_ih_l0


def test_layers_of_one_class_that_share_only_in_the_saved_model(tmp_path: Path) -> None:
    model = mlp()
    model[4] = nn.Linear(48, 48)
    model[2] = model[4]
    pycompress.quantize_(model)
    save_model(model, tmp_path / "m.safetensors")
    new = mlp()
    new[4] = nn.Linear(48, 48)
    load_model(tmp_path / "m.safetensors", new)
    assert new[2] is new[4]


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
def test_equal_models_give_equal_files(compact: bool, tmp_path: Path) -> None:
    model, _ = compressed("masked")
    for name in ("a", "b"):
        save_model(model, tmp_path / name, compact=compact)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_safetensors_reads_the_file(tmp_path: Path) -> None:
    model, _ = compressed("int8 dynamic")
    save_model(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        assert json.loads(file.metadata()["description"])["structure"] == describe(model)
    state = model.state_dict()
    assert set(read) == set(state)
    assert all(torch.equal(read[name], state[name]) for name in read)


def test_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    model, x = compressed("float")
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    new = load_model(path, mlp())
    path.write_bytes(b"\0" * path.stat().st_size)
    with torch.no_grad():
        assert torch.equal(model(x), new(x))


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.9, 35), (0.8, 19)])
def test_compact_size_of_pruned_int8_layers(sparsity: float, ratio: float, tmp_path: Path) -> None:
    """Of normal weights, which are about as hard to code as trained ones."""
    model = nn.Sequential(nn.Linear(512, 768), nn.Linear(768, 512)).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.normal_()
    plain = save_model(model, tmp_path / "float.safetensors")
    pycompress.prune_(model, sparsity, pattern="4x4")
    pycompress.sparsify_(model, "int8", "index")
    size = save_model(model, tmp_path / "m.safetensors", compact=True)
    assert plain / size >= ratio, f"{plain / size:.2f}"
    sizes = tensor_sizes(tmp_path / "m.safetensors")
    assert sizes.file_bytes == size
    assert sum(row[-1] for row in sizes.tensors) < size
    assert "weight_bitmap" in str(sizes)


def test_pruned_weights_are_small_in_any_layer(tmp_path: Path) -> None:
    """A mask is kept as bits, and zeros as such in float and int8 layers."""
    model, _ = compressed("masked")
    plain, compact = tmp_path / "plain", tmp_path / "compact"
    save_model(model, plain)
    mask = next(row for row in tensor_sizes(plain).tensors if row[0] == "0.mask")
    assert mask[-1] == 48 * 32 / 8
    save_model(model, compact, compact=True)
    how = {name: (way, size) for name, *_, way, size in tensor_sizes(compact).tensors}
    assert how["0.weight"][0] == "sparse"
    assert how["0.weight"][1] < 0.3 * 48 * 32 * 4
    pycompress.quantize_(model := nn.Sequential(*(m.to_linear() for m in model if hasattr(m, "to_linear"))))
    save_model(model, compact, compact=True)
    how = {name: (way, size) for name, *_, way, size in tensor_sizes(compact).tensors}
    assert how["0.weight"][1] < 0.35 * 48 * 32


# ---- writing that fails ---------------------------------------------------------------------------------------------


@contextmanager
def _disk_of(size: int) -> Iterator[None]:
    """No file may become larger; the system then fails as it does for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(mlp(), path)
    old = path.read_bytes()
    with _disk_of(len(old) // 2), pytest.raises(OSError, match="too large"):
        save_model(mlp(), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


class _Stateful(nn.Linear):
    def get_extra_state(self) -> object:
        return {"a": 1}


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2, device="meta")), ValueError, "0.weight is on the meta device"),
        (nn.Sequential(nn.LazyLinear(2)), ValueError, "0.weight is not initialised"),
        (nn.Sequential(_Stateful(2, 2)), TypeError, "'0' .* extra state"),
        (nn.Linear(2, 2, dtype=torch.complex128), TypeError, "weight is torch.complex128"),
        ([1], TypeError, "model is a list"),
    ],
    ids=["meta", "lazy", "extra state", "dtype", "no module"],
)
def test_what_cannot_be_saved_is_named(model: nn.Module, kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        save_model(model, tmp_path / "m.safetensors")
    assert not os.listdir(tmp_path)


def test_extra_has_to_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="extra is no JSON"):
        save_model(mlp(), tmp_path / "m.safetensors", extra={"a": float("nan")})


# ---- files of other models ------------------------------------------------------------------------------------------


def _narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 12))


def _longer() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Linear(12, 3))


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 12))


def _quantized() -> nn.Module:
    model = mlp()
    pycompress.quantize_(model)
    return model


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("int8 dynamic", _narrow, r"layer '2' .*\(48, 48\) .* \(40, 48\); build the model with the same sizes"),
        ("float", _narrow, r"2.weight is torch.float32 \(48, 48\) in the file, expected torch.float32 \(40, 48\)"),
        ("int8 dynamic", _longer, "no tensor for 5.weight, 5.bias, which the model has"),
        ("float", lambda: mlp()[:3], "no place for: 4.bias, 4.weight"),
        ("int8 dynamic", lambda: mlp()[:3], "the model has no layer '3'"),
        ("int8 dynamic", _normed, "layer '2' .* the model has a LayerNorm there"),
        ("float", _quantized, "layer '0' is a Int8Linear in the model and none in the description"),
        ("shrunk", _narrow, r"was \(48, 48\)|it is \(48, 48\)"),
    ],
)
def test_another_model_is_refused_and_unchanged(
    name: str, other: type[nn.Module], message: str, compact: bool, tmp_path: Path
) -> None:
    model, _ = compressed(name)
    save_model(model, tmp_path / "m.safetensors", compact=compact)
    new = other()
    modules, tensors = list(new.named_modules()), list(new.state_dict().values())
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ModelFileError, match=message) as caught:
        load_model(tmp_path / "m.safetensors", new)
    assert "unchanged" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert list(new.named_modules()) == modules
    assert all(map(torch.equal, new.state_dict().values(), before))


def test_a_state_dict_is_no_model_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(Mixed().lstm.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=r"no model file of pycompress .*state_dict"):
        load_model(tmp_path / "m.safetensors", mlp())


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "m.safetensors", mlp())
