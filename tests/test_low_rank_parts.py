"""LowRankLinear in a model: what quantize_, prune_, sparsify_ and folding make of its parts; the module and report."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pycompress
from pycompress.low_rank import factorize_
from pycompress.nn import Int8Linear, LowRankLinear, MaskedLinear, SparseLinear
from tests.prune_helpers import mlp, reason

# --- what goes on with the parts ---


def factorized_mlp():
    torch.manual_seed(0)
    model = mlp(48, 64, 32)
    factorize_(model, rank=12)
    return model


def test_quantize_takes_both_parts_and_folds_the_activation():
    model = factorized_mlp()
    x = torch.randn(10, 48)
    expected = model(x).detach()
    report = pycompress.quantize_(model)
    assert [layer.name for layer in report.swapped] == ["0.down", "0.up", "2.down", "2.up"]
    assert {type(part) for part in (*model[0], *model[2])} == {Int8Linear}
    assert (model[0].up.activation, model[0].down.activation) == ("relu", "none")
    assert type(model[1]) is nn.Identity
    assert F.cosine_similarity(model(x), expected, dim=1).min() > 0.999
    assert (model[0].in_features, model[0].rank, model[0].out_features) == (48, 12, 64)
    with pytest.raises(ValueError, match="a part is a Int8Linear"):
        model[0].to_linear()


def test_the_activation_stays_where_somebody_watches_the_layer():
    model = factorized_mlp()
    model[0].register_forward_hook(lambda *args: None)
    pycompress.quantize_(model)
    assert type(model[1]) is nn.ReLU
    assert model[0].up.activation == "none"


def test_prune_and_sparsify_take_the_parts():
    model = factorized_mlp()
    report = pycompress.prune_(model, 0.5)
    assert {type(part) for part in (*model[0], *model[2])} == {MaskedLinear}
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    x = torch.randn(6, 48)
    expected = model(x).detach()
    pycompress.sparsify_(model, format="index")
    assert {type(part) for part in (*model[0], *model[2])} == {SparseLinear}
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_torch_transformer_encoder():
    """In eval mode torch's own fast path reads linear1.weight, which is no longer there."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    before = model(x, src_key_padding_mask=padding)
    report = factorize_(model, rank={"*.linear*": 12})
    with torch.no_grad():
        close = model(x, src_key_padding_mask=padding)
        assert F.cosine_similarity(close[0], before[0], dim=-1).min() > 0.9
        assert "nn.MultiheadAttention" in reason(report, "layers.0.self_attn.in_proj_weight")
        assert pycompress.quantize_(model).fused
        assert F.cosine_similarity(model(x, src_key_padding_mask=padding)[0], close[0], dim=-1).min() > 0.99


def test_bert_folds_gelu_behind_the_factors():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    ids = torch.arange(12)[None]
    factorize_(model, ratio=0.6, batches=[ids], progress=False)
    expected = model(ids).last_hidden_state
    report = pycompress.quantize_(model)
    assert [layer.name for layer in report.fused] == ["encoder.layer.0.intermediate.dense.up"]
    assert F.cosine_similarity(model(ids).last_hidden_state, expected, dim=-1).min() > 0.99


# --- the module ---


def test_module_round_trips():
    torch.manual_seed(0)
    linear = nn.Linear(12, 20)
    layer = LowRankLinear.from_linear(linear, 4)
    x = torch.randn(3, 2, 12)
    assert layer(x).shape == (3, 2, 20)
    assert list(layer.state_dict()) == ["down.weight", "up.weight", "up.bias"]
    torch.testing.assert_close(layer.to_linear()(x), layer(x))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    fresh = LowRankLinear(12, 20, 4)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert "in_features=12, out_features=20, rank=4" in repr(layer)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_module_refuses():
    linear = nn.Linear(4, 6)
    for rank in (0, 5, 1.5, True):
        with pytest.raises(ValueError, match=r"rank=.*expected an integer from 1 to min\(K, N\) = 4"):
            LowRankLinear.from_linear(linear, rank)
    with pytest.raises(ValueError, match="rank=0; expected an integer from 1 on"):
        LowRankLinear(4, 6, 0)
    with pytest.raises(ValueError, match="got ReLU"):
        LowRankLinear.from_linear(nn.ReLU(), 1)
    with pytest.raises(ValueError, match="MaskedLinear would lose its zeros"):
        LowRankLinear.from_linear(MaskedLinear(4, 6), 1)
    with pytest.raises(ValueError, match=r"second_moment has shape \(6, 6\); the weight has K=4"):
        LowRankLinear.from_linear(linear, 1, second_moment=torch.eye(6))
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        LowRankLinear.from_linear(linear, 1)


def test_report_prints():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 1))
    text = str(factorize_(model, rank=3))
    assert "288" in text  # 3 layers of 3 * (16 + 16)
    assert "factorize_: 3 factorized, 1 left as they were; linear weights 784 -> 304 (0.388 of them)" in text
    assert "rank 3, which takes 51 weights where 1x16 takes 16; no rank shrinks it" in text
