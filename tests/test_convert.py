"""quantize_: what it swaps, what it leaves and why, and that the model computes the same afterwards.

The exact check: a weight-only model must equal the float model whose weights were rounded to int8 and back.
"""

import copy
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations, prune

import pycompress
from pycompress import convert
from pycompress.nn import Int8Linear
from pycompress.ops import quantize_weight

transformers = pytest.importorskip("transformers")


def rounded(model, report):
    """A copy of the float model with the weights of the swapped layers rounded to int8 and back."""
    model = copy.deepcopy(model)
    for layer in report.swapped:
        linear = model.get_submodule(layer.name)
        transposed = not isinstance(linear, nn.Linear)
        weight = linear.weight.detach().t() if transposed else linear.weight.detach()
        q, scale = quantize_weight(weight.contiguous())
        dense = (q.float() * scale[:, None]).to(weight.dtype)
        linear.weight.data = dense.t().contiguous() if transposed else dense
    return model


def output(model, *args, **kwargs):
    with torch.no_grad():
        y = model(*args, **kwargs)
    return y if isinstance(y, torch.Tensor) else y[0]


def assert_exact(model, *args, min_swapped=1, valid=..., **kwargs):
    """Quantise a copy weight-only and compare it with the rounded float model; returns (copy, report)."""
    quantised = copy.deepcopy(model)
    report = pycompress.quantize_(quantised, "weight_only")
    assert len(report.swapped) >= min_swapped, report
    actual = output(quantised, *args, **kwargs)
    # torch's fast path takes every nn.GELU for the exact one and goes past an overridden _ff_block.
    torch.backends.mha.set_fastpath_enabled(False)
    expected = output(rounded(model, report), *args, **kwargs)
    torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(actual[valid], expected[valid], rtol=2e-4, atol=2e-5)
    return quantised, report


def reason(report, name):
    return next(layer.reason for layer in report.left if layer.name == name)


def two_layers():
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))


# --- what is swapped ---


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_close_to_float(mode, dtype):
    model = two_layers().to(dtype)
    x = torch.randn(5, 24, dtype=dtype)
    expected = output(model, x)
    report = pycompress.quantize_(model, mode)
    assert [type(m) for m in model] == [Int8Linear, nn.Tanh, Int8Linear]
    assert [layer.name for layer in report.swapped] == ["0", "2"]
    actual = output(model, x)
    assert actual.dtype == dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < 0.03


def test_weight_only_is_exact():
    assert_exact(two_layers(), torch.randn(7, 24), min_swapped=2)


def test_skip_by_name_pattern_and_predicate():
    def fresh():
        return nn.ModuleDict({"head": nn.Linear(8, 8), "body": two_layers(), "header": nn.Linear(8, 8)})

    def swapped(**kwargs):
        return [layer.name for layer in pycompress.quantize_(fresh(), **kwargs).swapped]

    assert swapped(skip="head") == ["body.0", "body.2", "header"]
    assert swapped(skip=["body"]) == ["head", "header"]
    assert swapped(skip=("head*", "body.2")) == ["body.0"]
    assert swapped(skip="*.0") == ["head", "body.2", "header"]
    assert swapped(filter_fn=lambda name, module: module.in_features == 40) == ["body.2"]
    report = pycompress.quantize_(fresh(), skip="head", filter_fn=lambda name, module: name != "body.0")
    assert reason(report, "head") == "skip='head'"
    assert reason(report, "body.0") == "filter_fn said no"


def test_skip_that_matches_nothing_names_the_closest():
    model = nn.ModuleDict({"decoder": nn.ModuleDict({"lm_head": nn.Linear(8, 8), "project": nn.Linear(8, 8)})})
    with pytest.raises(ValueError, match=r"skip='lm_head' matches no module.*'decoder\.lm_head'"):
        pycompress.quantize_(model, skip=["lm_head"])
    with pytest.raises(ValueError, match=r"decoder\.project'"):
        pycompress.quantize_(model, skip="decoder.projct")
    with pytest.raises(TypeError, match="skip holds 3"):
        pycompress.quantize_(model, skip=[3])
    assert isinstance(model["decoder"]["lm_head"], nn.Linear)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"mode": "int8"}, ValueError, "unknown mode 'int8'; expected one of dynamic"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"mode": "static"}, ValueError, r"pycompress\.calibrate"),
        ({"calibration": {"0": (0.0, 1.0)}}, ValueError, "calibration is for mode='static'"),
        ({"mode": "static", "calibration": 3}, TypeError, "calibration is a int"),
        ({"mode": "static", "calibration": {"other": (0.0, 1.0)}}, ValueError, "calibrate this very model"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    model = two_layers()
    before = list(model)
    with pytest.raises(error, match=match):
        pycompress.quantize_(model, **kwargs)
    assert list(model) == before


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_root_must_be_a_container():
    with pytest.raises(ValueError, match=r"needs a parent.*from_float"):
        pycompress.quantize_(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="model is a Tensor"):
        pycompress.quantize_(torch.ones(3))
    with pytest.raises(ValueError, match="ScriptModule"):
        pycompress.quantize_(torch.jit.script(two_layers()))


def test_same_module_under_several_names_stays_shared():
    model = nn.Module()
    model.a = model.b = nn.Linear(8, 8)
    model.part = nn.Sequential(model.a)
    report = pycompress.quantize_(model)
    assert isinstance(model.a, Int8Linear)
    assert model.a is model.b is model.part[0]
    (row,) = report.swapped
    assert (row.name, row.aliases) == ("a", ("b", "part.0"))


def test_second_call_leaves_int8_alone():
    model = two_layers()
    pycompress.quantize_(model, skip="2")
    first = model[0]
    report = pycompress.quantize_(model, "weight_only")
    assert model[0] is first
    assert reason(report, "0") == "already int8 (dynamic)"
    assert model[2].mode == "weight_only"


# --- what is left ---


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _replace_forward(model):
    original = model[0].forward
    model[0].forward = lambda x: original(x) + 1


def _tie(model):
    model[2].weight = model[0].weight


def _tie_by_storage(model):
    model[2].weight = nn.Parameter(model[0].weight.data)


def _hold_in_list(model):
    model.plain = [model[0]]


LEFT = {
    "subclass": (lambda m: m.__setitem__(0, Scaled(16, 16)), "is a Scaled, a subclass"),
    "parametrized": (lambda m: parametrizations.weight_norm(m[0]), "is parametrized"),
    "pruned": (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), "has forward pre hooks"),
    "forward hook": (lambda m: m[0].register_forward_hook(lambda *a: None), "has forward hooks"),
    "pre hook": (lambda m: m[0].register_forward_pre_hook(lambda *a: None), "has forward pre hooks"),
    "backward hook": (lambda m: m[0].register_full_backward_hook(lambda *a: None), "has backward hooks"),
    "state hook": (lambda m: m[0].register_state_dict_post_hook(lambda *a: None), "has state dict hooks"),
    "load hook": (
        lambda m: m[0].register_load_state_dict_post_hook(lambda *a: None),
        "has load state dict post hooks",
    ),
    "own forward": (_replace_forward, "its forward was replaced on the instance"),
    "tied weight": (_tie, r"its weight is tied to 2\.weight"),
    "tied storage": (_tie_by_storage, r"its weight is tied to 2\.weight"),
    "tied bias": (lambda m: setattr(m[2], "bias", m[0].bias), r"its bias is tied to 2\.bias"),
    "plain list": (_hold_in_list, "is also held in plain, a plain attribute"),
    "extra state": (lambda m: m[0].register_buffer("lora", torch.ones(1)), "more than weight and bias: lora"),
    "meta": (lambda m: m[0].to("meta"), "meta device"),
    "float64": (lambda m: m[0].double(), r"torch\.float64; expected float32"),
    "complex": (lambda m: m[0].to(torch.complex64), r"torch\.complex64"),
    "empty": (lambda m: m.__setitem__(0, nn.Linear(0, 16)), "is empty"),
    "lazy": (lambda m: m.__setitem__(0, nn.LazyLinear(16)), "is a LazyLinear"),
    "compiled": (lambda m: m[0].compile(), "compiled by itself"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LEFT)
def test_left_alone_with_a_reason(case):
    change, expected = LEFT[case]
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16))
    change(model)
    first, relu = model[0], model[1]
    report = pycompress.quantize_(model)
    assert model[0] is first
    assert model[1] is relu, "an activation after a layer that stays must stay"
    row = next(layer for layer in report.left if layer.name == "0")
    assert re.search(expected, row.reason), row.reason
    assert isinstance(model[3], Int8Linear), "the others are swapped"


def test_integer_weight_is_left():
    model = two_layers()
    model[0].weight = nn.Parameter(torch.ones(40, 24, dtype=torch.int8), requires_grad=False)
    assert "torch.int8" in reason(pycompress.quantize_(model), "0")


def test_tied_embedding_keeps_the_head():
    model = nn.ModuleDict({"embed": nn.Embedding(30, 16), "body": nn.Linear(16, 16), "head": nn.Linear(16, 30)})
    model["head"].weight = model["embed"].weight
    report = pycompress.quantize_(model)
    assert reason(report, "head") == "its weight is tied to embed.weight"
    assert model["head"].weight is model["embed"].weight
    assert isinstance(model["body"], Int8Linear)


class WindowAttention(nn.Module):
    """As torchvision's Swin: the weight is handed to a function."""

    def __init__(self):
        super().__init__()
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = nn.functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.project(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


def test_weight_read_by_the_forward_around_is_left():
    model, report = assert_exact(nn.Sequential(WindowAttention()), torch.randn(2, 5, 16))
    assert reason(report, "0.qkv") == "WindowAttention.forward reads its weight directly"
    assert isinstance(model[0].project, Int8Linear)


class Readers:
    """Ways to read a weight past its layer."""

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.dec = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

        def forward(self, x):
            return self.fc(self.dec(x))

    class FromAbove(Base):
        def forward(self, x):
            return nn.functional.linear(self.fc(self.dec(x)), self.dec[1].weight)

    class LoopFromAbove(Base):
        def forward(self, x):
            for layer in self.dec:
                x = nn.functional.linear(x, layer.weight)
            return self.fc(x)

    class OnRequest(Base):
        def forward(self, x, tie=False):
            y = self.fc(self.dec(x))
            fc = self.fc
            return nn.functional.linear(y, fc.weight) if tie else y

    class OnData(Base):
        def forward(self, x):
            y = self.fc(self.dec(x))
            return nn.functional.linear(y, self.fc.weight) if y.sum() > 1e9 else y

    class Penalty(Base):
        def penalty(self):
            return self.fc.weight.abs().sum()

    class Itself(nn.Sequential):
        def penalty(self):
            return self[0].weight.abs().sum()


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (Readers.FromAbove(), "dec.1", "FromAbove.forward reads its weight directly"),
        (Readers.LoopFromAbove(), "dec.0", "LoopFromAbove.forward reads its weight directly"),
        (Readers.OnRequest(), "fc", "OnRequest.forward reads its weight directly"),
        (Readers.OnData(), "fc", "OnData.forward reads its weight directly"),
        (Readers.Penalty(), "fc", "Penalty.penalty reads its weight or bias directly"),
        (nn.ModuleDict({"a": Readers.Penalty()}), "a.fc", "Penalty.penalty reads its weight or bias directly"),
        (Readers.Itself(nn.Linear(16, 16)), "0", "Itself.penalty reads its weight or bias directly"),
    ],
)
def test_weight_read_elsewhere_is_left(model, name, why):
    report = pycompress.quantize_(model)
    assert reason(report, name) == why
    swapped = {layer.name for layer in report.swapped}
    assert (not swapped) == isinstance(model, Readers.Itself)


def test_weight_set_by_an_initialiser_or_named_alike_is_swapped():
    class Ordinary(Readers.Base):
        def __init__(self):
            super().__init__()
            self.fc.weight.data.zero_()
            self.linear = nn.Linear(16, 16)

        def _init_weights(self, module):
            self.fc.weight.data.normal_()

        def forward(self, x):
            return self.linear(self.fc(self.dec(x)))

        def other(self, x, layer):
            return nn.functional.linear(x, layer.weight)

    assert len(pycompress.quantize_(Ordinary()).swapped) == 4


class Adapter(nn.Module):
    """As LoRA: the input is cast to the dtype of the weight."""

    def __init__(self):
        super().__init__()
        self.base, self.down = nn.Linear(16, 16), nn.ModuleDict({"default": nn.Linear(16, 4)})
        self.up = nn.Linear(4, 16)

    def forward(self, x):
        small = self.down["default"](x.to(self.down["default"].weight.dtype))
        return self.base(x) + self.up(small)


def test_weight_whose_dtype_is_read_is_left():
    _, report = assert_exact(nn.Sequential(Adapter()), torch.randn(2, 16), min_swapped=2)
    assert reason(report, "0.down.default") == "Adapter.forward reads its weight directly"


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


def encoder(activation="gelu", batch_first=True, norm_first=False, layers=2):
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.1, activation=activation, batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, layers)


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


# --- all or nothing, and what is carried over ---


def snapshot(model):
    return [(name, id(module), dict(module._modules)) for name, module in model.named_modules()]


def test_failure_half_way_changes_nothing(monkeypatch):
    model = encoder(layers=2)
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    original, calls = Int8Linear.from_float, []

    def failing(linear, *args, **kwargs):
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("no memory")
        return original(linear, *args, **kwargs)

    monkeypatch.setattr(Int8Linear, "from_float", failing)
    with pytest.raises(RuntimeError, match=r"layer 'layers\.1\.linear1': no memory.*skip='layers\.1\.linear1'"):
        pycompress.quantize_(model)
    assert snapshot(model) == before
    assert model.use_nested_tensor
    assert model.layers[0].activation is nn.functional.gelu
    assert model.layers[0].activation_relu_or_gelu == 2
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = two_layers()
    model[2].weight.data[1, 3] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer '2'.*skip='2'"):
        pycompress.quantize_(model)
    assert snapshot(model) == before
    assert len(pycompress.quantize_(model, skip="2").swapped) == 1


def test_interrupted_edits_are_undone():
    class Interrupted(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if value == 2:
                raise KeyboardInterrupt

    first, second = {"a": 1}, Interrupted(b=1)
    with pytest.raises(KeyboardInterrupt):
        convert.apply_edits([convert.Edit(first, "a", 2), convert.Edit(second, "b", 2)])
    assert (first, second) == ({"a": 1}, {"b": 1})


def test_flags_and_marks_are_carried_over():
    model = two_layers()
    model.eval()
    model[2].train()
    model[0].bias.requires_grad_(False)
    model[0].is_residual = True
    pycompress.quantize_(model)
    assert [m.training for m in model] == [False, False, True]
    assert not model[0].bias.requires_grad
    assert model[2].bias.requires_grad
    assert model[0].is_residual is True


def test_checkpoint_of_a_swapped_model(tmp_path):
    model = encoder().eval()
    fresh = copy.deepcopy(model)
    pycompress.quantize_(model)
    torch.save(model.state_dict(), tmp_path / "int8.pt")
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    pycompress.quantize_(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "int8.pt", weights_only=True), strict=True)
    x = torch.randn(2, 5, 32)
    assert torch.equal(output(fresh, x), output(model, x))


# --- static ---


def test_static_leaves_what_calibration_did_not_reach():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    report = pycompress.quantize_(model, "static", calibration={"used": (-1.0, 1.0)})
    assert isinstance(model["used"], Int8Linear)
    assert isinstance(model["idle"], nn.Linear)
    assert reason(report, "idle") == "was not reached in calibration"


# --- the report ---


def test_report():
    model = encoder(layers=3)
    report = pycompress.quantize_(model)
    text = str(report)
    assert text.count("layers.*.linear1") == 1, "layers that differ by a number share a row"
    assert "6 swapped, 6 left as they were, 3 with an activation folded in" in text
    assert len(report.layers) == 12
    held = sum(m.memory_bytes() for m in model.modules() if isinstance(m, Int8Linear))
    kept = sum(p.numel() * 4 for n, p in model.named_parameters() if "linear" not in n)
    assert report.bytes_after == held + kept
    assert sum(layer.bytes_after for layer in report.swapped) == held
    assert report.bytes_before == sum(p.numel() * 4 for p in encoder(layers=3).parameters())
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert "layers.*.linear2" in console.file.getvalue()


def test_memory():
    model = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    report = pycompress.quantize_(model)
    int8 = sum(n * (k + 8) for n, k in (layer.shape for layer in report.swapped))
    assert report.bytes_after <= 1.01 * int8
    assert report.bytes_before == 4 * (2 * 768 * 3072 + 3072 + 768)


def test_report_of_nothing():
    report = pycompress.quantize_(nn.Sequential(nn.ReLU()))
    assert not report.layers
    assert "0 swapped" in str(report)
