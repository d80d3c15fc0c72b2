"""quantize_: the layers it leaves, each with its reason, and those it nearly leaves."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import pycompress
from pycompress.nn import Int8Linear
from tests.convert_helpers import assert_exact, reason, two_layers

transformers = pytest.importorskip("transformers")


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


class AsksForInt8(nn.Module):
    """As T5: it knows of int8 weights, and not of layers without any."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = torch.tanh(self.wi(x))
        if isinstance(self.wo.weight, torch.Tensor) and self.wo.weight.dtype != torch.int8:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


@pytest.mark.parametrize(
    ("convert", "leaves"),
    [
        (pycompress.quantize_, False),
        (pycompress.prepare_qat_, False),
        (lambda model: pycompress.factorize_(model, rank=4), True),
        (lambda model: pycompress.smooth_(model, [torch.randn(2, 16)], where="anywhere"), True),
        (lambda model: pycompress.sparsify_(model, format="bitmap"), True),
    ],
)
def test_code_that_asks_for_int8_keeps_a_layer_with_a_weight(convert, leaves):
    model = nn.Sequential(AsksForInt8())
    with torch.no_grad():
        model[0].wi.weight[1:, ::2] = model[0].wo.weight[1:, ::2] = 0
    report = convert(model)
    left = {layer.name: layer.reason for layer in report.layers if layer.action == "left"}
    assert left == ({"0.wo": "AsksForInt8.forward reads its weight or bias directly"} if leaves else {})
    assert model(torch.randn(2, 16)).shape == (2, 16)
