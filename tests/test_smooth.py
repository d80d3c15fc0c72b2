"""smooth_: the float model's output stays, int8 becomes better, and quantize_ goes on from there."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pycompress
from pycompress.nn import ChannelScale, Int8Linear, MaskedLinear
from pycompress.smooth import smooth_
from tests.smooth_helpers import TOKENS, Block, outputs, reasons, with_outliers

transformers = pytest.importorskip("transformers")

IDS = [{"input_ids": torch.randint(0, 50, (2, n), generator=torch.Generator().manual_seed(n))} for n in (6, 7)]
SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=1, head_dim=8)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=8)
    ),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, norm_first=True, batch_first=True), 2, enable_nested_tensor=False
    ),
    "block": lambda: nn.Sequential(Block(), Block(activation=nn.GELU())),
}
FOLDED = {  # and which the layers go into; the others stay
    "bert": {},
    "gpt2": {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"},
    "llama": {
        "self_attn.q_proj": "input_layernorm", "self_attn.k_proj": "input_layernorm",
        "self_attn.v_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm", "mlp.down_proj": "mlp.up_proj",
    },
    "vit": {
        "attention.q_proj": "layernorm_before", "attention.k_proj": "layernorm_before",
        "attention.v_proj": "layernorm_before", "mlp.fc1": "layernorm_after",
    },
    "encoder": {"linear1": "norm2", "linear2": "linear1"},
}  # fmt: skip


def batches_of(name: str) -> list:
    if name == "vit":
        return [torch.randn(2, 3, 16, 16, dtype=torch.float64)]
    return TOKENS if name in ("encoder", "block") else IDS


def as_double(batches: list) -> list:
    return [b.double() if isinstance(b, torch.Tensor) else b for b in batches]


@pytest.mark.parametrize("where", ["fold", "anywhere"])
@pytest.mark.parametrize("name", MODELS)
def test_the_float_model_stays_what_it_was(name, where):
    """In float64 up to 1e-10, on other batches too; every layer that can go goes."""
    model, batches = MODELS[name]().double().eval(), as_double(batches_of(name))
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at weight 1 and bias 0, which would hide a fault
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = outputs(model, batches)
    report = smooth_(model, batches[:1], 0.7, where=where, progress=False)
    for actual, wanted in zip(outputs(model, batches), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))
    moved = (
        max(row.greatest / row.least for row in report.folded + report.scaled) if report.layers != report.left else 1
    )
    assert name == "bert" or moved > 1.3  # else the test shows nothing
    if name in FOLDED:
        for row in report.folded:
            _, last = re.split(r"\.[01]\.", row.name)
            assert row.into.endswith(FOLDED[name][last]), row
        assert {row.name.partition(".0.")[2] for row in report.folded if ".0." in row.name} == set(FOLDED[name])
    if where == "anywhere":
        assert not any("norm or linear" in row.reason for row in report.layers)
        tied_or_read = ("tied to", "nn.MultiheadAttention")
        assert all(any(word in row.reason for word in tied_or_read) for row in report.left), report
        wrapped = [m for m in model.modules() if isinstance(m, ChannelScale)]
        assert len(wrapped) == len(report.scaled)


def test_the_formula():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    x = torch.randn(50, 4) * torch.tensor([1.0, 5.0, 1.0, 0.1])
    peak = model[0](x).abs().amax(0)
    weight, norm = model[1].weight.detach().clone(), model[0].weight.detach().clone()
    factors = peak**0.3 / weight.abs().amax(0) ** 0.7
    factors = factors.detach().clamp(min=factors.sort().values[1].item())  # their (lower) median
    report = smooth_(model, [x[:20], x[20:]], 0.3, progress=False)
    torch.testing.assert_close(model[1].weight, weight * factors)
    torch.testing.assert_close(model[0].weight, norm / factors)
    row = report.folded[0]
    assert (row.least, row.greatest) == pytest.approx((factors.min().item(), factors.max().item()))


@pytest.mark.parametrize(("mode", "gain"), [("dynamic", 5), ("static", 5)])
@pytest.mark.parametrize("where", ["fold", "anywhere"])
def test_int8_error_falls_by_a_large_factor(mode, gain, where):
    torch.manual_seed(3)
    model = with_outliers(Block(activation=nn.GELU()))
    expected = model(TOKENS[1])

    def error(float_model: nn.Module) -> float:
        int8 = copy.deepcopy(float_model)
        ranges = pycompress.calibrate(int8, TOKENS, progress=False) if mode == "static" else None
        report = pycompress.quantize_(int8, mode, calibration=ranges)
        assert len(report.swapped) == 6
        with torch.no_grad():
            return float((int8(TOKENS[1]) - expected).norm() / expected.norm())

    smoothed = copy.deepcopy(model)
    smooth_(smoothed, TOKENS, where=where, progress=False)
    assert error(smoothed) * gain < error(model)


def test_a_norm_whose_model_is_part_of_another_keeps_what_it_returns():
    """The caller of `model.model` alone would get another last_hidden_state."""
    model = MODELS["llama"]().eval()
    inner = outputs(model.model, IDS)
    report = smooth_(model, IDS, progress=False)
    assert reasons(report)["lm_head"] == "model.norm is also read by the caller of model: it is returned"
    for actual, wanted in zip(outputs(model.model, IDS), inner, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_skipped_and_unreached_layers():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b, self.c = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.b(self.a(self.norm(x)).relu())

    report = smooth_(Some(), TOKENS, skip="a", progress=False)
    assert reasons(report) == {"a": "skip='a'", "c": "the batches did not reach it"}
    assert [(row.name, row.into) for row in report.folded] == [("b", "a")]  # a's rows may still take factors in


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = with_outliers(Block()).to(dtype)
    batches = [x.to(dtype) for x in TOKENS]
    expected = outputs(model, batches)
    report = smooth_(model, batches, where="anywhere", progress=False)
    assert (len(report.folded), len(report.scaled)) == (5, 1)
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {dtype}
    for actual, wanted in zip(outputs(model, batches), expected, strict=True):
        assert float((actual - wanted).float().norm() / wanted.float().norm()) < 20 * torch.finfo(dtype).eps


def test_masks_stay_and_zeros_stay():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    pycompress.prune_(model, 0.75, pattern="4x4")
    masks = [model[i].mask.clone() for i in (1, 3)]
    with torch.no_grad():
        model[0].weight[2] *= 30
    expected = outputs(model, TOKENS)
    assert len(smooth_(model, TOKENS, progress=False).folded) == 2
    for layer, mask in zip((model[1], model[3]), masks, strict=True):
        assert isinstance(layer, MaskedLinear)
        assert torch.equal(layer.mask, mask)
        assert not layer.weight[~mask].any()
    for actual, wanted in zip(outputs(model, TOKENS), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    assert smooth_(model, TOKENS, 0, progress=False).folded  # a column without weights divides by 0 in the formula
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# --- what comes after ---


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_quantize_goes_on_behind_a_channel_scale(mode):
    model = MODELS["bert"]().eval()
    expected = outputs(model, IDS)
    smooth_(model, IDS, where="anywhere", progress=False)
    assert model.encoder.layer[0].intermediate.dense.in_features == 16  # what a model may ask of its layer
    ranges = pycompress.calibrate(model, IDS, progress=False) if mode == "static" else None
    report = pycompress.quantize_(model, mode, calibration=ranges)
    assert len(report.swapped) == 13
    first = model.encoder.layer[0].intermediate.dense
    assert [type(m) for m in first] == [ChannelScale, Int8Linear]
    assert first[1].activation == "gelu"  # folded in behind a ChannelScale too
    actual = outputs(pickle.loads(pickle.dumps(model)), IDS)
    assert F.cosine_similarity(actual[0].flatten(), expected[0].flatten(), dim=0) > 0.999


def test_the_fused_encoder_path_of_torch_is_not_taken_past_a_channel_scale():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", batch_first=True), 2).eval()
    expected = outputs(model, TOKENS)
    report = smooth_(model, TOKENS, where="anywhere", progress=False)
    assert len(report.scaled) == 4
    assert len(pycompress.quantize_(copy.deepcopy(model)).fused) == 2
    with torch.no_grad():
        mask = torch.zeros(3, 5, dtype=torch.bool)
        torch.testing.assert_close(model(TOKENS[0]), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(TOKENS[0], src_key_padding_mask=mask), expected[0], rtol=1e-4, atol=1e-5)


def test_optimizers_flags_and_hooks_are_undisturbed():
    model = Block().train()
    model.norm1.eval()
    parameters = dict(model.named_parameters())
    smooth_(model, TOKENS, where="anywhere", progress=False)
    assert model.training
    assert not model.norm1.training
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters.values()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_channel_scale_keeps_the_dtype():
    scale = ChannelScale(8)
    scale.scale.fill_(2.0)
    y = scale(torch.ones(2, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert bool((y == 2).all())
    assert "features=8" in repr(scale)
    assert not list(scale.parameters())


def test_report():
    report = smooth_(nn.Sequential(Block(), Block(activation=nn.GELU())), TOKENS, progress=False)
    assert report.summary() == "smooth_ alpha=0.5 where=fold: 9 folded, 0 with a ChannelScale, 3 left as they were"
    row = next(row for row in report.rows() if row[0] == "*.q")
    assert row[1:5] == ("2", "16x16", "folded", "*.norm1")
    assert "no norm or linear layer" in str(report)


def test_what_was_smoothed_in_inference_mode_can_be_trained() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(16, 4))
    with torch.inference_mode():
        assert smooth_(model, TOKENS, where="anywhere", progress=False).scaled
    model(TOKENS[0].clone().requires_grad_()).sum().backward()
