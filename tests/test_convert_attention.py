"""quantize_(layers="attention"): nn.MultiheadAttention in torch's own transformers and in others'."""

import copy
import itertools

import pytest
import torch
from torch import nn

import pycompress
from pycompress.nn import Int8Linear, Int8MultiheadAttention
from tests.convert_helpers import encoder, output, reason
from tests.layer_models import VisionTransformer, transformer

LAYERS = ("attention", "linear")


def by_hand(model):
    """A copy whose quantised layers are float ones with the rounded weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8MultiheadAttention):
            model.set_submodule(name, module.to_float())
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            model.set_submodule(name, module.to_float())
    return model


def without_fast_path(model, *args, **kwargs):
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return output(model, *args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- torch's own transformers ---


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_with_masks_and_padding(batch_first, norm_first, activation):
    model = encoder(activation, batch_first, norm_first).eval()
    report = pycompress.quantize_(model, "weight_only", layers=LAYERS)
    assert [row.name for row in report.swapped] == [
        f"layers.{i}.{part}" for i in range(2) for part in ("self_attn", "linear1", "linear2")
    ]
    assert not report.left
    assert len(report.fused) == 2
    assert model.layers[0].self_attn.packed
    expected = by_hand(model)
    for layer in expected.modules():  # by_hand leaves the folded activation behind the layer
        assert not isinstance(layer, Int8Linear)
    x = torch.randn(3, 6, 32) if batch_first else torch.randn(6, 3, 32)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:], padding[2, 5:] = True, True
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    for kwargs in ({}, {"src_key_padding_mask": padding}, {"mask": causal}, {"mask": causal, "is_causal": True}):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                actual = model(x, **kwargs).detach()
            seen = ~padding if batch_first else ~padding.T
            wanted = without_fast_path(expected, x, **kwargs)
            assert_close(actual[seen], wanted[seen])


def test_fast_path_is_off_only_where_something_was_swapped():
    model = encoder().eval()
    pycompress.quantize_(model, layers="attention", skip="layers.1")
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [0, 2]
    assert not model.use_nested_tensor
    x, padding = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 4] = True
    actual = output(model, x, src_key_padding_mask=padding)
    assert_close(actual[:, :4], without_fast_path(model, x, src_key_padding_mask=padding)[:, :4])
    swapped = copy.deepcopy(model)
    swapped.layers[0].self_attn.in_proj.weight_scale.mul_(2)
    assert not torch.equal(output(swapped, x), output(model, x)), "the quantised weights are what is read"


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_with_every_mask(batch_first):
    model = transformer(batch_first)
    original = copy.deepcopy(model)
    report = pycompress.quantize_(model, "weight_only", layers=LAYERS)
    assert len(report.swapped) == 14
    assert not report.left
    assert all(layer.self_attn.packed and not layer.multihead_attn.packed for layer in model.decoder.layers)
    expected = by_hand(model)
    source, target = (torch.randn((2, n, 32) if batch_first else (n, 2, 32)) for n in (7, 5))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    masks = ({}, {"tgt_mask": causal, "tgt_is_causal": True})
    pads = ({}, {"src_key_padding_mask": padding, "memory_key_padding_mask": padding})
    for one, other in itertools.product(masks, pads):
        actual = output(model, source, target, **one, **other)
        assert_close(actual, without_fast_path(expected, source, target, **one, **other))
        float_output = without_fast_path(original, source, target, **one, **other)
        assert (actual - float_output).norm() / float_output.norm() < 0.03


def test_training_goes_on_by_the_biases_and_norms():
    model = encoder().train()
    pycompress.quantize_(model, "weight_only", layers=LAYERS)
    model(torch.randn(2, 4, 32)).square().sum().backward()
    assert model.layers[0].norm1.weight.grad is not None
    assert model.layers[0].self_attn.in_proj.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "int4"])
def test_compiles_and_exports_as_one_graph(mode):
    model = encoder("gelu", layers=1).eval()
    pycompress.quantize_(model, mode, layers=LAYERS)
    x = torch.randn(2, 5, 32)
    expected = output(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(output(compiled, x), expected)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert_close(output(program.module(), x), expected)


# --- others' ---


def test_vision_transformer_asks_by_keyword():
    model = VisionTransformer().eval()
    x = torch.randn(2, 3, 16, 16)
    pycompress.quantize_(model, "weight_only", layers=LAYERS)
    assert model.layers[0].self_attention.packed
    assert_close(output(model, x), without_fast_path(by_hand(model), x))


class Cross(nn.Module):
    """As DETR's encoder: positions are added to query and key, not to value."""

    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **kwargs)

    def forward(self, x, positions):
        query = key = x + positions
        return self.attention(query, key, value=x)


def test_three_layers_where_query_key_and_value_differ():
    model = Cross().eval()
    x, positions = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    report = pycompress.quantize_(model, "weight_only", layers="attention")
    assert {key.partition(".")[0] for key in model.attention.state_dict()} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    for actual, expected in zip(model(x, positions), by_hand(model)(x, positions), strict=True):
        assert_close(actual, expected)
    assert report.swapped[0].shape == (16, 16)


def replaced_output(model):
    model.attention.out_proj = nn.Linear(16, 16)


def subclassed(model):
    class Own(nn.MultiheadAttention):
        pass

    model.attention = Own(16, 2)


LEFT = {
    "hook": (lambda m: m.attention.register_forward_hook(lambda *a: None), "has forward hooks"),
    "hook below": (
        lambda m: m.attention.out_proj.register_forward_hook(lambda *a: None),
        "its out_proj has hooks or a forward of its own",
    ),
    "adapter": (replaced_output, "its out_proj is a Linear, which may do more than a linear"),
    "subclass": (subclassed, "is a Own, a subclass that may do more than an attention"),
    "extra": (lambda m: m.attention.register_buffer("table", torch.ones(1)), "holds more than its weights: table"),
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m.attention, "in_proj_weight"),
        "is parametrized",
    ),
    "tied": (lambda m: m.register_parameter("own", m.attention.in_proj_weight), "its in_proj_weight is tied to own"),
    "tied below": (
        lambda m: m.register_parameter("own", m.attention.out_proj.weight),
        "its out_proj.weight is tied to own",
    ),
    "float64": (lambda m: m.attention.double(), "torch.float64; expected"),
    "held": (lambda m: setattr(m, "plain", [m.attention]), "is also held in plain"),
}


@pytest.mark.parametrize("case", LEFT)
def test_attention_that_stays(case):
    change, expected = LEFT[case]
    model = Cross()
    change(model)
    attention = model.attention
    report = pycompress.quantize_(model, layers="all")
    assert model.attention is attention
    (row,) = report.layers
    assert expected in row.reason, row.reason


class ReadsTheWeight(Cross):
    def forward(self, x, positions):
        return super().forward(x.to(self.attention.in_proj_weight.dtype), positions)


class ReadsBelow(Cross):
    def norm(self):
        return self.attention.out_proj.weight.norm()


class ReadsInAMethod(Cross):
    def norm(self):
        return self.attention.in_proj_weight.norm()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ReadsTheWeight, "ReadsTheWeight.forward reads its in_proj_weight directly"),
        (ReadsBelow, "ReadsBelow.norm reads its weight or bias directly"),
        (ReadsInAMethod, "ReadsInAMethod.norm reads its weight or bias directly"),
    ],
)
def test_attention_whose_weight_is_read_stays(model, expected):
    assert reason(pycompress.quantize_(model(), layers="all"), "attention") == expected


def test_one_attention_in_two_places_stays_one():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16), 2, enable_nested_tensor=False)
    layers.layers[1].self_attn = layers.layers[0].self_attn
    report = pycompress.quantize_(layers, layers="all")
    assert layers.layers[0].self_attn is layers.layers[1].self_attn
    assert isinstance(layers.layers[0].self_attn, Int8MultiheadAttention)
    assert report.swapped[0].aliases == ("layers.1.self_attn",)


def test_a_weight_that_is_not_finite_names_the_attention():
    model = encoder()
    model.layers[1].self_attn.in_proj_weight.data[40, 2] = torch.inf
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"layer 'layers\.1\.self_attn'.*skip='layers\.1\.self_attn'"):
        pycompress.quantize_(model, layers="all")
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert model.layers[0].activation_relu_or_gelu == 2


def test_heads_taken_out_by_shrinking_stay_float():
    model = encoder().eval()
    for layer in model.layers:  # two of four heads give nothing
        layer.self_attn.out_proj.weight.data[:, :16] = 0
        layer.self_attn.in_proj_weight.data[64:80] = 0
    pycompress.shrink_(model)
    assert {type(layer.self_attn).__name__ for layer in model.layers} == {"FewerHeadsAttention"}
    x = torch.randn(2, 4, 32)
    before = output(model, x)
    report = pycompress.quantize_(model, "weight_only", layers=LAYERS)
    expected = "is a FewerHeadsAttention, a subclass that may do more than an attention"
    assert [row.reason for row in report.left] == [expected] * 2
    assert (output(model, x) - before).norm() / before.norm() < 0.03
