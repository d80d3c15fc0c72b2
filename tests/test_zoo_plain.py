"""Plain torch: nn.Transformer, an LSTM classifier, a small ResNet, compressed, saved and loaded to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pycompress
from pycompress.nn import Int8Conv2d, Int8Embedding, Int8Linear, MaskedLinear, SparseLinear

pytestmark = pytest.mark.usefixtures("one_thread")
Inputs = tuple[Tensor, ...]


class Translator(nn.Module):
    """nn.Transformer between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.transformer = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 40)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)


class Classifier(nn.Module):
    """The last state of an LSTM over a bag of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24, padding_idx=0)
        self.lstm = nn.LSTM(24, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(x + y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "transformer": (Translator, lambda: (_tokens(2, 6), _tokens(2, 5))),
    "lstm": (Classifier, lambda: (_tokens(3, 7),)),
    "resnet": (ResNet, lambda: (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)),
}


def _make(name: str) -> tuple[nn.Module, Inputs]:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
    return model.eval(), inputs()


def _run(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


def _check(model: nn.Module, inputs: Inputs, folder: Path) -> None:
    """Into a fresh model and into one on the meta device, from a folder and from a file."""
    expected, build = _run(model, inputs), type(model)
    pycompress.save_pretrained(model, folder / "plain")
    pycompress.save_pretrained(model, folder / "compact", compact=True)
    pycompress.save_model(model, folder / "file.safetensors")
    with torch.device("meta"):
        empty = build()
    for loaded in (
        pycompress.load_pretrained(folder / "plain", build()),
        pycompress.load_pretrained(folder / "plain", empty),
        pycompress.load_pretrained(folder / "compact", build()),
        pycompress.load_model(folder / "file.safetensors", build()),
    ):
        assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(_run(loaded, inputs), expected)


def _error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "static", "int4", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_quantised_saved_and_loaded(name: str, mode: str, tmp_path: Path) -> None:
    model, inputs = _make(name)
    expected, before = _run(model, inputs), dict(model.named_modules())
    calibration = pycompress.calibrate(model, [inputs], layers="all") if mode == "static" else None
    report = pycompress.quantize_(model, mode, layers="all", calibration=calibration)
    assert 0 < _error(_run(model, inputs), expected) < (0.2 if mode in ("int4", "nf4") else 0.03)
    reasons = {row.name: row.reason for row in (*report.layers, *report.others)}
    for layer, module in before.items():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)):
            replaced = dict(model.named_modules()).get(layer) is not module
            assert replaced or reasons.get(layer) or any(layer.startswith(f"{name}.") for name in reasons), layer
    _check(model, inputs, tmp_path)


def test_what_becomes_of_each_layer() -> None:
    model, _ = _make("transformer")
    pycompress.quantize_(model, layers="all")
    assert type(model.embedding) is Int8Embedding
    assert type(model.head) is Int8Linear
    assert {type(module).__name__ for module in model.modules() if "Attention" in type(module).__name__} == {
        "Int8MultiheadAttention"
    }
    assert not [name for name, p in model.named_parameters() if p.dim() > 1]
    model, _ = _make("resnet")
    report = pycompress.quantize_(model, layers="all")
    assert sum(type(module) is Int8Conv2d for module in model.modules()) == 4
    assert [row.name for row in report.layers if row.action == "left"] == ["stem.0"]  # too few inputs to be worth it
    assert [name for name, p in model.named_parameters() if p.dim() > 1] == ["stem.0.weight"]


def test_what_no_layer_replaces_is_reported_with_its_size() -> None:
    model, _ = _make("lstm")
    lstm = dict(model.lstm.named_parameters())
    report = pycompress.quantize_(model, layers="all")
    rows = {row.name: row for row in report.others}
    for key in ("weight_ih_l0", "weight_hh_l1_reverse"):
        assert rows[f"lstm.{key}"].bytes_after == lstm[key].numel() * 4
        assert "LSTM" in rows[f"lstm.{key}"].reason
    assert "lstm.weight_ih" in str(report)


@pytest.mark.parametrize("name", MODELS)
def test_pruned_then_sparse(name: str, tmp_path: Path) -> None:
    model, inputs = _make(name)
    pycompress.prune_(model, 0.6)
    assert any(type(module) is MaskedLinear for module in model.modules())
    expected = _run(model, inputs)
    _check(model, inputs, tmp_path / "pruned")
    report = pycompress.sparsify_(model)
    assert all(row.reason for row in report.layers if row.action == "left")
    assert any(type(module) is SparseLinear for module in model.modules())
    assert _error(_run(model, inputs), expected) < 1e-5
    _check(model, inputs, tmp_path / "sparse")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, inputs = _make(name)
    expected = _run(model, inputs)
    pycompress.quantize_(model, layers="all")
    model.to(dtype)
    cast = tuple(each.to(dtype) if each.is_floating_point() else each for each in inputs)
    output = _run(model, cast)
    assert output.dtype == dtype
    assert _error(output.float(), expected) < 0.06
