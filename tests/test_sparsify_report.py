"""sparsify_: folding activations in, failing without a trace, and the report."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from pycompress.cost_core import DTYPES
from pycompress.nn import Int8Linear, MaskedLinear, SparseLinear
from pycompress.sparsify import sparsify_
from tests.sparsify_models import (
    DENSE,
    SPARSE,
    assert_close,
    hook_pruned,
    masked,
    output,
    parametrized,
    row,
    two_layers,
    zeroed,
)

transformers = pytest.importorskip("transformers")


# --- activations ---


@pytest.mark.parametrize("make", [zeroed, masked, hook_pruned, parametrized])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_activations_are_folded_in(make, dtype):
    model = nn.Sequential(make(nn.Linear(24, 40)), nn.GELU(), make(nn.Linear(40, 8)), nn.ReLU()).eval()
    x = torch.randn(20, 24)
    expected = output(model, x)
    report = sparsify_(model, dtype, cost_model=SPARSE)
    assert [type(m) for m in model] == [SparseLinear, nn.Identity, SparseLinear, nn.Identity]
    assert [layer.activation for layer in report.fused] == ["gelu", "relu"]
    assert_close(output(model, x), expected, dtype)
    unfused = nn.Sequential(make(nn.Linear(24, 40)), nn.GELU())
    assert not sparsify_(unfused, dtype, cost_model=SPARSE, fuse=False).fused
    assert isinstance(unfused[1], nn.GELU)


def test_only_int8_folds_into_a_dense_layer():
    model = nn.Sequential(masked(nn.Linear(24, 40)), nn.GELU())
    assert not sparsify_(model, cost_model=DENSE).fused
    assert [type(m) for m in model] == [nn.Linear, nn.GELU]
    model = nn.Sequential(masked(nn.Linear(24, 40)), nn.GELU())
    report = sparsify_(model, "int8", cost_model=DENSE)
    assert [layer.activation for layer in report.fused] == ["gelu"]
    assert [type(m) for m in model] == [Int8Linear, nn.Identity]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("pad", [False, True])
def test_transformer_encoder(pad):
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    for part in model.layers:
        zeroed(part.linear1)
        zeroed(part.linear2)
    x = torch.randn(3, 9, 32)
    lengths = torch.tensor([9, 4, 6])[:, None]
    kwargs = {"src_key_padding_mask": torch.arange(9)[None] >= lengths} if pad else {}
    valid = torch.arange(9)[None] < lengths if pad else ...
    with torch.no_grad():
        expected = model(x, **kwargs)[valid]
        report = sparsify_(model, cost_model=SPARSE)
        actual = model(x, **kwargs)[valid]
    assert len(report.swapped) == 4
    assert [layer.activation for layer in report.fused] == ["gelu"] * 2
    assert_close(actual, expected)
    assert any("MultiheadAttention" in layer.reason for layer in report.left)


def test_hugging_face():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)).eval()
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            zeroed(module)
    ids = torch.randint(0, 90, (2, 17))
    expected = output(model, ids)
    report = sparsify_(model, cost_model=SPARSE)
    assert len(report.swapped) == 12
    assert [layer.activation for layer in report.fused] == ["gelu"] * 2
    assert row(report, "pooler.dense").reason == "its weight has no zeros"
    assert_close(output(model, ids), expected)


# --- all or nothing ---


def snapshot(model):
    return [(name, id(module), dict(module._modules)) for name, module in model.named_modules()]


def test_failure_half_way_changes_nothing(monkeypatch):
    model = nn.Sequential(two_layers(masked), nn.ReLU(), two_layers(hook_pruned))
    before, state = snapshot(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original, calls = SparseLinear.from_dense, []

    def failing(linear, *args, **kwargs):
        calls.append(linear)
        if len(calls) == 4:
            raise MemoryError("no memory")
        return original(linear, *args, **kwargs)

    monkeypatch.setattr(SparseLinear, "from_dense", failing)
    with pytest.raises(RuntimeError, match=r"sparsify_: layer '2\.2': no memory.*skip='2\.2'"):
        sparsify_(model, cost_model=SPARSE)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_weights_that_are_not_finite(value, dtype):
    model = two_layers()
    model[2].weight.data[1, 3] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"sparsify_: layer '2'.*unchanged.*skip='2'"):
        sparsify_(model, dtype, cost_model=SPARSE)
    assert snapshot(model) == before
    assert len(sparsify_(model, dtype, cost_model=SPARSE, skip="2").swapped) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fully_pruned_layer(dtype):
    model = nn.Sequential(zeroed(nn.Linear(24, 40), 2.0))
    x = torch.randn(20, 24)
    expected = output(model, x)
    report = sparsify_(model, dtype, cost_model=SPARSE)
    assert report.layers[0].sparsity == 1.0
    torch.testing.assert_close(output(model, x), expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"dtype": "fp32"}, ValueError, "unknown dtype 'fp32'; expected one of float32"),
        ({"format": "csr"}, ValueError, "unknown format 'csr'; expected one of auto"),
        ({"format": "dense"}, ValueError, "would make nothing sparse"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"tokens": ()}, ValueError, "tokens=.*expected a sequence of integers, each at least 1"),
        ({"tokens": (0,)}, ValueError, "tokens=.*each at least 1"),
        ({"tokens": 8}, ValueError, "tokens=8; expected a sequence"),
        ({"tokens": (2**70,)}, ValueError, "tokens="),
        ({"min_sparsity": 1.5}, ValueError, "min_sparsity=1.5"),
        ({"min_sparsity": float("nan")}, ValueError, "min_sparsity=nan"),
        ({"min_sparsity": "half"}, ValueError, "min_sparsity='half'"),
        ({"skip": "head"}, ValueError, "skip='head' matches no module"),
        ({"skip": 2}, TypeError, "skip=2; expected a qualified name"),
        ({"cost_model": "builtin"}, TypeError, "cost_model is a str; expected the result of calibrate_cost_model"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    model = two_layers()
    before = list(model)
    with pytest.raises(error, match=match):
        sparsify_(model, **{"cost_model": SPARSE, **kwargs})
    assert list(model) == before


def test_root_must_be_a_container():
    with pytest.raises(ValueError, match=r"sparsify_: the model is itself a MaskedLinear.*SparseLinear\.from_dense"):
        sparsify_(MaskedLinear(4, 4))
    with pytest.raises(TypeError, match="model is a Tensor"):
        sparsify_(torch.ones(3))


# --- the report ---


def test_report():
    model = nn.Sequential(*(nn.Sequential(zeroed(nn.Linear(64, 64)), nn.ReLU()) for _ in range(3)), nn.Linear(64, 8))
    report = sparsify_(model, cost_model=SPARSE)
    text = str(report)
    assert "*.*  " in text, "layers that differ by a number share a row"
    assert "3 swapped, 0 faster dense, 1 left as they were, 3 with an activation folded in" in text
    assert "1: 9, 8: 9" in text
    assert len(report.rows()) == 2
    assert re.fullmatch(r"0\.7\d+\.\.0\.7\d+", report.rows()[0][3])
    saved = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert report.state_bytes == saved
    assert f"checkpoint {saved / 1e6:.4f} MB" in report.summary()
    held = sum(module.memory_bytes() for module in model.modules() if isinstance(module, SparseLinear))
    assert report.bytes_after == held + 4 * (64 * 8 + 8)
    assert report.bytes_before == 4 * (3 * 64 * 65 + 65 * 8)
    assert sum(layer.bytes_after for layer in report.swapped) == held
    console = Console(file=io.StringIO(), width=250)
    console.print(report)
    assert "speed-up at M" in console.file.getvalue()


def test_report_of_nothing():
    report = sparsify_(nn.Sequential(nn.ReLU()))
    assert not report.layers
    assert "0 swapped" in str(report)
