"""quantize_(layers=...): convolutions, embeddings and attention beside linear layers, and 4-bit modes."""

import copy

import pytest
import torch
from torch import nn

import pycompress
from pycompress import layer_kinds
from pycompress.nn import Int4Linear, Int8Conv2d, Int8Embedding, Int8EmbeddingBag, Int8Linear, Int8MultiheadAttention
from pycompress.report import model_bytes, state_bytes
from tests.convert_helpers import output, reason
from tests.layer_models import BagClassifier, LSTMClassifier, TiedLanguageModel, VisionTransformer, resnet, transformer

pytestmark = pytest.mark.usefixtures("every_conv")
IDS = torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def every_conv(monkeypatch):
    """Convolutions are taken however small: which are worth it is not tested here."""
    monkeypatch.setattr(layer_kinds, "why_not", lambda conv: "")


def made(kind, seed=0):
    torch.manual_seed(seed)
    return kind().eval()


def kinds(model):
    ours = (Int4Linear, Int8Conv2d, Int8Embedding, Int8EmbeddingBag, Int8Linear, Int8MultiheadAttention)
    return {type(module) for module in model.modules() if isinstance(module, ours)}


def bags():
    return torch.tensor([3, 5, 9, 9, 2, 7, 1]), torch.tensor([0, 3, 3, 6])


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# --- what each name takes ---


def test_linear_is_the_default_and_the_others_are_named_with_the_remedy():
    model = made(VisionTransformer)
    report = pycompress.quantize_(model)
    assert kinds(model) == {Int8Linear}
    (conv, positions) = report.others
    assert (conv.name, conv.kind, conv.action) == ("conv_proj", "conv2d", "float")
    assert "layers='conv2d' takes it" in conv.reason
    assert positions.name == "pos_embedding"
    assert positions.reason == "a parameter of VisionTransformer, which no layer here replaces"
    assert report.summary().endswith("; not asked for: 1 convolution (layers='all' takes them)")
    assert "layers='attention' takes it" in reason(report, "layers.0.self_attention.in_proj_weight")
    assert "pos_embedding" in str(report)
    plain = pycompress.quantize_(nn.Sequential(nn.Linear(4, 4)))
    assert plain.others == []
    assert "not asked" not in plain.summary()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("linear", {Int8Linear}),
        ("conv2d", {Int8Conv2d}),
        ("attention", {Int8MultiheadAttention, Int8Linear}),
        (["conv2d", "linear"], {Int8Conv2d, Int8Linear}),
        ("all", {Int8Conv2d, Int8MultiheadAttention, Int8Linear}),
    ],
)
def test_each_name_takes_its_kind(layers, expected):
    model = made(VisionTransformer)
    before = output(model, IMAGES)
    report = pycompress.quantize_(model, layers=layers)
    assert kinds(model) == expected
    assert isinstance(model.head, nn.Linear) == ("linear" not in layers and layers != "all")
    assert not report.left or layers in ("linear", "conv2d") or layers == ["conv2d", "linear"]
    assert 0 < error(output(model, IMAGES), before) < 0.05


def test_lstm_classifier():
    model = made(LSTMClassifier)
    before, lstm = output(model, IDS), model.lstm
    report = pycompress.quantize_(model, layers="all")
    assert [type(m) for m in model.children()] == [Int8Embedding, nn.LSTM, Int8Linear]
    assert model.lstm is lstm
    assert {row.reason for row in report.others} == {"a parameter of LSTM, which no layer here replaces"}
    assert (report.swapped[0].mode, report.swapped[0].shape) == ("int8", (50, 16))
    assert report.mode == "dynamic", "that embeddings have one mode makes nothing mixed"
    assert error(output(model, IDS), before) < 0.02


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_classifier(mode):
    model = made(lambda: BagClassifier(mode))
    table = model.embedding.weight.detach()
    report = pycompress.quantize_(model, layers="embedding")
    assert isinstance(model.embedding, Int8EmbeddingBag)
    assert isinstance(model.fc, nn.Linear)
    scale = table.abs().amax(1) / 127
    expected = copy.deepcopy(model)
    expected.embedding = nn.EmbeddingBag(60, 16, mode=mode, _weight=(table / scale[:, None]).round() * scale[:, None])
    torch.testing.assert_close(output(model, *bags()), output(expected, *bags()), rtol=1e-5, atol=1e-5)
    assert report.swapped[0].mode == "int8"


def test_tied_embedding_and_head_stay():
    model = made(TiedLanguageModel)
    report = pycompress.quantize_(model, layers="all")
    assert reason(report, "embedding") == "its weight is tied to head.weight"
    assert reason(report, "head") == "its weight is tied to embedding.weight"
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.positions, Int8Embedding)
    assert pycompress.quantize_(made(TiedLanguageModel)).others[0].name == "positions", "no remedy for what is tied"


class ReadByForward(nn.Module):
    """The head is a function of the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.other = nn.Embedding(20, 8), nn.Embedding(20, 8)

    def forward(self, ids):
        return nn.functional.linear(self.embedding(ids) + self.other(ids), self.embedding.weight)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 4 * super().forward(ids)


def test_embeddings_that_stay():
    report = pycompress.quantize_(ReadByForward(), layers="embedding")
    assert reason(report, "embedding") == "ReadByForward.forward reads its weight directly"
    assert [row.name for row in report.swapped] == ["other"]
    model = nn.ModuleList([Scaled(4, 4), nn.Embedding(4, 4, max_norm=1.0), nn.Embedding(4, 4, dtype=torch.float64)])
    report = pycompress.quantize_(model, layers="all")
    assert reason(report, "0") == "is a Scaled, a subclass that may do more than an embedding"
    assert "has max_norm" in reason(report, "1")
    assert "torch.float64" in reason(report, "2")


# --- modes ---


@pytest.mark.parametrize("mode", ["int4", "nf4"])
def test_4_bit_modes(mode):
    model = made(VisionTransformer)
    before = output(model, IMAGES)
    options = {} if mode == "nf4" else {"symmetric": False}
    report = pycompress.quantize_(model, mode, layers="all", group_size=16, **options)
    assert kinds(model) == {Int4Linear, Int8MultiheadAttention}
    assert reason(report, "conv_proj") == (
        f"mode='{mode}' is not for convolutions, which take dynamic, static; pass mode={{'conv_proj': 'dynamic'}}"
    )
    for layer in (model.head, model.layers[0].self_attention.in_proj, model.layers[1].self_attention.out_proj):
        assert (type(layer), layer.format, layer.group_size) == (Int4Linear, mode, 16)
        assert (layer.weight_zero_point is not None) == (mode == "int4")
    assert model.layers[0].mlp[0].activation == "gelu"
    assert {row.mode for row in report.swapped} == {mode}
    actual = output(model, IMAGES)
    assert error(actual, before) < 0.3
    for name, module in list(model.named_modules()):  # the same by the float layers with the dequantised weights
        if isinstance(module, Int8MultiheadAttention):
            model.set_submodule(name, module.to_float())
    for name, module in list(model.named_modules()):
        if isinstance(module, Int4Linear):
            model.set_submodule(name, module.to_float())
    torch.testing.assert_close(output(model, IMAGES), actual, rtol=1e-4, atol=1e-4)


def test_modes_by_pattern():
    model = made(VisionTransformer)
    modes = {"*": "int4", "conv_proj": "dynamic", "layers.1": "float", "head": "nf4", "*.mlp.0": "dynamic"}
    report = pycompress.quantize_(model, modes, layers="all", symmetric=False)
    found = {row.name: row.mode for row in report.swapped}
    assert found == {
        **{"conv_proj": "dynamic", "layers.0.self_attention": "int4", "layers.0.mlp.0": "dynamic"},
        **{"layers.0.mlp.2": "int4", "layers.1.mlp.0": "dynamic", "head": "nf4"},
    }
    assert reason(report, "layers.1.self_attention") == "mode={'layers.1': 'float'}"
    assert report.mode == "mixed"
    tables = made(LSTMClassifier)
    report = pycompress.quantize_(tables, {"embedding": "float"}, layers="all")
    assert reason(report, "embedding") == "mode={'embedding': 'float'}"
    report = pycompress.quantize_(made(LSTMClassifier), {"embedding": "int4"}, layers="all")
    assert {row.name: row.mode for row in report.swapped} == {"embedding": "int8", "fc": "dynamic"}


class AsksForInt8(nn.Module):
    """As T5: casts its input to the weight's dtype, unless that is int8."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.relu(self.wi(x))
        if self.wo.weight.dtype != torch.int8:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


def test_code_that_knows_of_int8_weights_keeps_4_bit_ones_away():
    x = torch.randn(2, 8)
    model = nn.Sequential(AsksForInt8())
    expected = output(model, x)
    report = pycompress.quantize_(model, "int4", group_size=8)
    assert "weight" in reason(report, "0.wo")
    assert isinstance(model[0].wi, Int4Linear)
    assert error(output(model, x), expected) < 0.3


# --- static ---


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_static_mode_of_every_kind(method):
    attention = {"layers.0.self_attention.k_proj", "layers.1.self_attention.out_proj"}
    for kind, inputs, names in (
        (VisionTransformer, (IMAGES,), {"conv_proj", *attention}),
        (LSTMClassifier, (IDS,), {"fc"}),
    ):
        model = made(kind)
        before, structure = output(model, *inputs), str(model)
        calibration = pycompress.calibrate(model, [inputs], method, layers="all", progress=False)
        assert str(model) == structure
        assert torch.equal(output(model, *inputs), before)
        assert names <= set(calibration)
        report = pycompress.quantize_(model, "static", layers="all", calibration=calibration)
        assert not report.left
        assert error(output(model, *inputs), before) < 0.08


def test_static_ranges_are_those_of_the_inputs():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.conv = attention, nn.Conv2d(1, 4, 1)

        def forward(self, x, memory):
            return self.attention(x, memory, 2 * memory)[0], self.conv(x[:, None])

    model, x, memory = Cross(), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    calibration = pycompress.calibrate(model, [(x, memory)], layers=("attention", "conv2d"), progress=False)
    extremes = {"q_proj": x, "k_proj": memory, "v_proj": 2 * memory}
    for name, values in extremes.items():
        assert calibration[f"attention.{name}"] == pytest.approx((float(values.min()), float(values.max())))
    assert calibration["conv"] == pytest.approx((float(x.min()), float(x.max())))
    rows = (t.detach()[16:] for t in (attention.in_proj_weight, attention.in_proj_bias))
    value = nn.functional.linear(2 * memory, *rows)
    low, high = calibration["attention.out_proj"]
    assert float(value.min()) <= low < high <= float(value.max()), "a mean of values"
    report = pycompress.quantize_(model, "static", layers="all", calibration=calibration)
    assert not model.attention.packed, "query, key and value differ"
    assert {row.name for row in report.swapped} == {"attention", "conv"}


def test_calibration_of_fewer_layers():
    model = made(VisionTransformer)
    calibration = pycompress.calibrate(model, [IMAGES], progress=False)
    assert "conv_proj" not in calibration
    report = pycompress.quantize_(model, "static", layers="all", calibration=calibration)
    wants = "was not reached in calibration; calibrate wants the same layers="
    assert reason(report, "conv_proj") == wants + "'conv2d'"
    assert reason(report, "layers.0.self_attention") == wants + "'attention'"
    assert isinstance(model.layers[0].self_attention, nn.MultiheadAttention)
    assert isinstance(model.head, Int8Linear)
    with pytest.raises(ValueError, match="mode='static' needs the range of each layer's input"):
        pycompress.quantize_(made(VisionTransformer), "static", layers="conv2d")
    tables = made(LSTMClassifier)
    assert len(pycompress.quantize_(tables, "static", layers="embedding").swapped) == 1, "needs no range"


def test_calibrate_puts_attention_back_whatever_happens():
    model = made(VisionTransformer)
    before = str(model)
    with pytest.raises(RuntimeError):
        pycompress.calibrate(model, [torch.zeros(1, 2, 16, 16)], layers="all", progress=False)
    assert str(model) == before
    with pytest.raises(ValueError, match="nothing to calibrate"):
        pycompress.calibrate(made(LSTMClassifier), [IDS], layers="embedding", progress=False)


# --- arguments; all or nothing ---


@pytest.mark.parametrize(
    ("kwargs", "kind", "match"),
    [
        ({"layers": "conv"}, ValueError, "layers has 'conv'; expected one or more of linear, conv2d, embedding, att"),
        ({"layers": ["linear", 3]}, ValueError, "layers has 3; expected"),
        ({"layers": ()}, ValueError, "layers is empty"),
        ({"layers": 5}, TypeError, "layers=5; expected"),
        ({"group_size": 32}, ValueError, "group_size is for the modes int4 and nf4; mode='dynamic' would ignore it"),
        ({"mode": "int4", "group_size": 0}, ValueError, "group_size=0; expected a positive number"),
        ({"mode": "int4", "group_size": 8.0}, ValueError, r"group_size=8\.0"),
        ({"symmetric": False}, ValueError, "symmetric=False is for mode='int4'"),
        ({"mode": "nf4", "symmetric": False}, ValueError, "symmetric=False is for mode='int4'; mode='nf4'"),
        ({"mode": {"fc": "int4"}, "backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"mode": "int4", "calibration": {}}, ValueError, "mode='int4' would ignore it"),
    ],
)
def test_bad_arguments(kwargs, kind, match):
    model = made(LSTMClassifier)
    before = str(model)
    with pytest.raises(kind, match=match):
        pycompress.quantize_(model, **kwargs)
    assert str(model) == before


def test_the_model_is_itself_a_layer():
    for layer, name in ((nn.Conv2d(1, 1, 1), "conv2d"), (nn.MultiheadAttention(4, 1), "attention")):
        with pytest.raises(ValueError, match=r"a swap in place needs a parent; pass nn\.Sequential\(model\)"):
            pycompress.quantize_(layer, layers=name)
    assert pycompress.quantize_(nn.Conv2d(1, 1, 1)).others == []


@pytest.mark.parametrize("bad", ["embedding", "fc"])
def test_weights_that_are_not_finite(bad):
    model = made(LSTMClassifier)
    getattr(model, bad).weight.data[2, 3] = float("nan")
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=rf"layer '{bad}'.*The model is unchanged.*skip='{bad}'"):
        pycompress.quantize_(model, layers="all")
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert len(pycompress.quantize_(model, layers="all", skip=bad).swapped) == 1


def test_skip_and_filter_cover_every_kind():
    model = made(VisionTransformer)
    report = pycompress.quantize_(model, layers="all", skip=["conv_proj", "layers.0.self_attention.out_proj"])
    assert reason(report, "conv_proj") == "skip='conv_proj'"
    assert reason(report, "layers.0.self_attention") == "skip='layers.0.self_attention.out_proj'"
    assert isinstance(model.layers[1].self_attention, Int8MultiheadAttention)
    asked = []
    pycompress.quantize_(made(VisionTransformer), layers="all", filter_fn=lambda n, m: asked.append(type(m)) or False)
    assert set(asked) == {nn.Conv2d, nn.MultiheadAttention, nn.Linear}


def test_a_second_call_goes_on():
    model = made(VisionTransformer)
    pycompress.quantize_(model, "int4", layers=["linear", "attention"])
    report = pycompress.quantize_(model, "dynamic", layers="all")
    assert {row.reason for row in report.left} == {"already 4-bit (int4)"}
    assert [row.name for row in report.swapped] == ["conv_proj"]
    report = pycompress.quantize_(made(LSTMClassifier), layers="all")
    assert len(report.swapped) == 2


# --- what it is afterwards ---


@pytest.mark.parametrize("build", [VisionTransformer, LSTMClassifier, resnet, transformer])
def test_state_copies_flags_and_sizes(build):
    model = made(build)
    inputs = {LSTMClassifier: (IDS,), transformer: (torch.randn(2, 5, 32), torch.randn(2, 3, 32))}.get(build, (IMAGES,))
    report = pycompress.quantize_(model, layers="all")
    assert not any(module.training for module in model.modules())
    expected = output(model, *inputs)
    assert torch.equal(output(copy.deepcopy(model), *inputs), expected)
    fresh = made(build, seed=5)
    pycompress.quantize_(fresh, layers="all")
    assert not torch.equal(output(fresh, *inputs), expected)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(fresh, *inputs), expected)
    assert report.bytes_after == model_bytes(model)
    state = {id(t): t.nbytes for t in model.state_dict().values()}
    assert state_bytes(model) == sum(state.values())
    assert sum(row.bytes_before - row.bytes_after for row in report.layers) == report.bytes_before - report.bytes_after
    model.train()
    assert all(module.training for module in model.modules())


def test_training_flags_and_marks():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 4))
    model[0].eval()
    model[0].stage = 3
    model[2].bias.requires_grad_(False)
    pycompress.quantize_(model, layers="all")
    assert [m.training for m in model] == [False, True, True]
    assert model[0].stage == 3
    assert not hasattr(model[0], "transposed"), "no mark of the model's"
    assert model[0].bias.requires_grad
    assert not model[2].bias.requires_grad
