"""quantize_ on whole models: torch's attention and transformer layers, and Hugging Face's."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import pycompress
from tests.convert_helpers import assert_exact, encoder, output, reason

transformers = pytest.importorskip("transformers")


# --- attention and transformer layers of torch ---


def test_multihead_attention_is_untouched():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention}).eval()
    x = torch.randn(2, 5, 16)
    before = output(attention, x, x, x)
    report = pycompress.quantize_(model)
    assert not report.swapped
    assert "reads its weight" in reason(report, "attention.out_proj")
    assert "not a layer" in reason(report, "attention.in_proj_weight")
    assert torch.equal(output(attention, x, x, x), before)


ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "module": nn.GELU(approximate="tanh")}


def padded(batch_first=True):
    x = torch.randn(3, 9, 32)
    mask = torch.arange(9)[None] >= torch.tensor([9, 4, 6])[:, None]
    return (x, mask, ~mask) if batch_first else (x.transpose(0, 1), mask, (~mask).T)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_transformer_encoder(activation, norm_first, batch_first, pad):
    model = encoder(ACTIVATIONS[activation], batch_first, norm_first).eval()
    x, mask, valid = padded(batch_first)
    kwargs = {"src_key_padding_mask": mask} if pad else {}
    quantised, report = assert_exact(
        model, x, min_swapped=4, valid=valid if pad else ..., **kwargs
    )  # eval and no_grad: where torch takes its fast path
    assert len(report.fused) == 2
    expected = output(quantised, x, **kwargs)
    for other in (copy.deepcopy(quantised), pickle.loads(pickle.dumps(quantised))):
        assert torch.equal(output(other, x, **kwargs), expected)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_cloned_from_a_swapped_layer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    pycompress.quantize_(layer, "weight_only")
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask, valid = padded()
    with_mask = output(model, x, src_key_padding_mask=mask)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    slow = output(model, x, src_key_padding_mask=mask)
    torch.testing.assert_close(with_mask[valid], slow[valid], rtol=1e-4, atol=1e-5)


def test_encoder_where_nothing_is_swapped_keeps_its_fast_path():
    model = encoder()
    pycompress.quantize_(model, skip="layers")
    assert model.use_nested_tensor
    assert all(layer.activation_relu_or_gelu == 2 for layer in model.layers)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transformer_decoder_and_whole(norm_first, activation):
    layer = nn.TransformerDecoderLayer(
        32, 4, 64, activation=ACTIVATIONS[activation], batch_first=True, norm_first=norm_first
    )
    tgt, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    _, report = assert_exact(nn.TransformerDecoder(layer, 2).eval(), tgt, memory, min_swapped=4)
    assert len(report.fused) == 2


def test_subclass_of_encoder_layer_with_own_block_is_not_folded():
    class Odd(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            h = self.linear1(x)
            return self.linear2(self.activation(h) + h)

    _, report = assert_exact(Odd(32, 4, 64, batch_first=True).eval(), torch.randn(2, 5, 32), min_swapped=2)
    assert not report.fused


# --- Hugging Face ---

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
}


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **SIZES))


def distilbert():
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=99)
    )


@pytest.mark.parametrize(
    ("make", "fused"), [(bert, "gelu"), (gpt2, "gelu_tanh"), (llama, "silu"), (distilbert, "gelu")]
)
def test_hugging_face(make, fused):
    model = make().eval()
    ids = torch.randint(0, 90, (2, 7))
    quantised, report = assert_exact(model, ids, min_swapped=8)
    assert [layer.activation for layer in report.fused] == [fused] * 2
    assert {layer.name for layer in report.left} <= {"lm_head"}, report
    assert torch.equal(output(copy.deepcopy(quantised), ids), output(quantised, ids))
    dynamic = copy.deepcopy(model)
    pycompress.quantize_(dynamic)
    expected, actual = output(model, ids), output(dynamic, ids)
    assert (actual - expected).norm() / expected.norm() < 0.05


def test_gpt2_keeps_the_tied_head():
    model = gpt2()
    report = pycompress.quantize_(model)
    assert reason(report, "lm_head") == "its weight is tied to transformer.wte.weight"
    row = next(layer for layer in report.swapped if layer.name == "transformer.h.0.mlp.c_fc")
    assert row.shape == (128, 32)


def test_transformers_is_not_imported():
    code = (
        "import sys, torch, pycompress\n"
        "pycompress.quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)))\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
