"""quantize_(layers="conv2d"): a convolution takes in the norm and the activation behind it, where nothing can tell."""

import copy
import re

import pytest
import torch
from torch import nn

import pycompress
from pycompress import layer_kinds
from pycompress.layer_kinds import folded
from pycompress.nn import Int8Conv2d, Int8Linear
from pycompress.ops import quantize_weight
from tests.convert_helpers import output, reason
from tests.layer_models import resnet

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def every_conv(monkeypatch):
    """Convolutions are taken however small: which are worth it is tested with the layer."""
    monkeypatch.setattr(layer_kinds, "why_not", lambda conv: "")


def with_statistics(model):
    """In eval mode, with norms that do something."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


class Block(nn.Module):
    """conv, norm and act, and a forward to vary."""

    def __init__(self, norm=None, act=None, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, **kwargs)
        self.norm, self.act = norm or nn.BatchNorm2d(8), act or nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


X = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(2))


def rounded(conv):
    """The float convolution with its weight rounded to int8 and back, an output channel a scale."""
    conv = copy.deepcopy(conv)
    q, scale = quantize_weight(conv.weight.detach().flatten(1))
    conv.weight.data = (q.float() * scale[:, None]).view_as(conv.weight)
    return conv


def by_hand(conv, norm):
    """norm(conv(x)) as one convolution, in float64, then rounded to int8 as the layer does."""
    factor = 1.0 / (norm.running_var.double() + norm.eps).sqrt()
    weight = norm.weight.detach().double() if norm.affine else torch.ones_like(factor)
    bias = norm.bias.detach().double() if norm.affine else torch.zeros_like(factor)
    own = conv.bias.detach().double() if conv.bias is not None else torch.zeros_like(factor)
    new = copy.deepcopy(conv)
    new.weight = nn.Parameter((conv.weight.detach().double() * (factor * weight).view(-1, 1, 1, 1)).float())
    new.bias = nn.Parameter(((own - norm.running_mean.double()) * factor * weight + bias).float())
    return rounded(new)


def exact(model):
    """The model with float activations, so that its weights alone are seen."""
    for module in model.modules():
        if isinstance(module, (Int8Conv2d, Int8Linear)):
            module.mode = "weight_only"
    return model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_goes_into_the_convolution(affine, bias, groups):
    model = with_statistics(nn.Sequential(Block(nn.BatchNorm2d(8, affine=affine), bias=bias, groups=groups)))
    block = copy.deepcopy(model[0])
    torch.testing.assert_close(folded(block.conv, block.norm)(X), block.norm(block.conv(X)), rtol=1e-4, atol=1e-5)
    report = pycompress.quantize_(model, layers="conv2d")
    (row,) = report.swapped
    assert (row.reason, row.activation, row.shape) == ("norm folded in", "relu", (8, 8 // groups, 3, 3))
    assert type(model[0].conv) is Int8Conv2d
    assert type(model[0].norm) is type(model[0].act) is nn.Identity
    assert model[0].conv.activation == "relu"
    expected = torch.relu(by_hand(block.conv, block.norm)(X))
    torch.testing.assert_close(output(exact(model), X), expected, rtol=1e-4, atol=1e-4)
    assert row.bytes_before == sum(t.nbytes for t in block.state_dict().values())


def test_without_fusing():
    model = with_statistics(Block())
    block = copy.deepcopy(model)
    report = pycompress.quantize_(model, layers="conv2d", fuse=False)
    assert report.swapped[0].reason == ""
    assert type(model.norm) is nn.BatchNorm2d
    expected = block.act(block.norm(rounded(block.conv)(X)))
    torch.testing.assert_close(output(exact(model), X), expected, rtol=1e-4, atol=1e-5)


class Twice(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.act(self.norm(y)) + y


class NormOfAnother(Block):
    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + self.norm(x))


class OneNormForTwo(Block):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class Sometimes(Block):
    def forward(self, x, raw=False):
        y = self.conv(x)
        return y if raw else self.act(self.norm(y))


class Penalty(Block):
    """As network slimming: the norm's weight is read."""

    def penalty(self):
        return self.norm.weight.abs().sum()


class Features(Block):
    def features(self, x):
        return self.conv(x)


class OnData(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) if y.sum() > 0 else self.norm(2 * y)


def in_training():
    return with_statistics(Block()).train()


def hooked():
    model = with_statistics(Block())
    model.norm.register_forward_hook(lambda *a: None)
    return model


APART = {
    "read twice": (lambda: with_statistics(Twice()), "the value between is also read by add"),
    "another value": (lambda: with_statistics(NormOfAnother()), "it is also called on another value"),
    "two convolutions": (lambda: with_statistics(OneNormForTwo()), "it is also called on another value"),
    "sometimes alone": (lambda: with_statistics(Sometimes()), "the value between is also read by the caller"),
    "weight read": (lambda: with_statistics(Penalty()), "Penalty.penalty"),
    "another method": (lambda: with_statistics(Features()), "Features.features uses one of them without the other"),
    "depends on data": (lambda: with_statistics(OnData()), "it is also called on another value"),
    "training": (in_training, r"it is in training mode; call model.eval\(\) first"),
    "no statistics": (
        lambda: with_statistics(Block(nn.BatchNorm2d(8, track_running_stats=False))),
        "it has no running statistics",
    ),
    "hooks": (hooked, "it has hooks"),
}


@pytest.mark.parametrize("case", APART)
def test_what_must_stay_apart_does(case):
    build, expected = APART[case]
    model = build()
    norm, before = model.norm, output(copy.deepcopy(model), X)
    report = pycompress.quantize_(model, layers="conv2d")
    assert model.norm is norm
    row = next(row for row in report.swapped if row.name == "conv")
    assert re.search(expected, row.reason), row.reason
    assert row.reason.startswith("norm not folded in: ")
    torch.testing.assert_close(output(model, X), before, rtol=0.1, atol=0.1)


def test_other_norms_stay():
    for norm in (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.SyncBatchNorm(8)):
        model = Block(norm).eval()
        report = pycompress.quantize_(model, layers="conv2d")
        assert model.norm is norm
        assert report.swapped[0].activation == ""


def test_a_convolution_that_stays_keeps_its_norm(monkeypatch):
    monkeypatch.setattr(layer_kinds, "why_not", lambda conv: "is depthwise" if conv.groups > 1 else "")
    model = with_statistics(nn.Sequential(Block(groups=8), Block()))
    depthwise = model[0].conv
    report = pycompress.quantize_(model, layers="all")
    assert reason(report, "0.conv") == "is depthwise"
    assert model[0].conv is depthwise
    assert type(model[0].norm) is nn.BatchNorm2d
    assert type(model[1].norm) is nn.Identity


@pytest.mark.parametrize("mode", ["weight_only", "int4", "nf4"])
def test_a_mode_with_float_activations_leaves_convolutions(mode):
    model = with_statistics(Block())
    block = copy.deepcopy(model)
    report = pycompress.quantize_(model, mode, layers="all")
    assert reason(report, "conv") == (
        f"mode='{mode}' is not for convolutions, which take dynamic, static; pass mode={{'conv': 'dynamic'}}"
    )
    assert torch.equal(output(model, X), output(block, X))
    pycompress.quantize_(model, {"*": mode, "conv": "dynamic"}, layers="all")
    assert (type(model.conv), model.conv.mode, model.conv.activation) == (Int8Conv2d, "dynamic", "relu")


def test_convolutions_that_stay():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    plain = [nn.Conv2d(4, 4, 1) for _ in range(3)]
    model = nn.ModuleList([Own(4, 4, 1), *plain[:2], nn.LazyConv2d(4, 1), plain[2]])
    model[1].register_forward_hook(lambda *a: None)
    model[2].weight = model[4].weight
    report = pycompress.quantize_(model, layers="conv2d")
    assert reason(report, "0") == "is a Own, a subclass that may do more than a convolution"
    assert reason(report, "1") == "has forward hooks"
    assert reason(report, "2") == "its weight is tied to 4.weight"
    assert "Lazy" in reason(report, "3") or "not initialised" in reason(report, "3")
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.Conv1d(4, 4, 1))
    report = pycompress.quantize_(transposed, layers="all")
    assert not report.layers
    assert [row.name for row in report.others] == ["0.weight", "1.weight"]


def test_failure_half_way_changes_nothing(monkeypatch):
    model = resnet()
    before = [(name, id(module)) for name, module in model.named_modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    original, calls = Int8Conv2d.from_float, []

    def failing(conv, *args, **kwargs):
        calls.append(conv)
        if len(calls) == 5:
            raise MemoryError("no memory")
        return original(conv, *args, **kwargs)

    monkeypatch.setattr(Int8Conv2d, "from_float", failing)
    with pytest.raises(RuntimeError, match=r"layer 'layer1\.1\.conv2': no memory\. The model is unchanged"):
        pycompress.quantize_(model, layers="all")
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- a residual network ---


def test_resnet_is_what_was_built_by_hand():
    torch.manual_seed(0)
    model = resnet()
    expected = copy.deepcopy(model)
    report = pycompress.quantize_(model, layers="all")
    assert not report.left
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()), report
    assert {type(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, Int8Linear, Int8Conv2d))} == {
        *(Int8Conv2d, Int8Linear)
    }
    rows = {row.name: row for row in report.swapped}
    assert rows["conv1"].activation == "relu"
    assert rows["layer2.1.conv2"].activation == "silu"
    assert rows["layer1.0.conv1"].activation == "", "its ReLU is used twice"
    assert rows["layer2.0.downsample.0"].reason == "1 folded in"
    for parent in list(expected.modules()):
        norms = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"} if hasattr(parent, "conv1") else {}
        norms |= {"0": "1"} if "1" in parent._modules and isinstance(parent._modules["1"], nn.BatchNorm2d) else {}
        for conv, norm in norms.items():
            if conv in parent._modules:
                parent._modules[conv] = by_hand(parent._modules[conv], parent._modules[norm])
                parent._modules[norm] = nn.Identity()
    q, scale = quantize_weight(expected.fc.weight.detach())
    expected.fc.weight.data = q.float() * scale[:, None]
    torch.testing.assert_close(output(exact(model), IMAGES), output(expected, IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_resnet_is_close(mode):
    torch.manual_seed(0)
    model = resnet()
    calibration = None
    if mode == "static":
        calibration = pycompress.calibrate(model, [IMAGES], layers="all", progress=False)
        assert len(calibration) == 12
    expected = output(model, IMAGES)
    report = pycompress.quantize_(model, mode, layers="all", calibration=calibration)
    actual = output(model, IMAGES)
    assert (actual - expected).norm() / expected.norm() < 0.05
    assert report.bytes_before / report.bytes_after > 3.5
    channels_last = output(model, IMAGES.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, actual, rtol=1e-4, atol=1e-4)
    for row, image in enumerate(IMAGES):  # no image depends on the others
        torch.testing.assert_close(output(model, image[None])[0], actual[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = with_statistics(Block()).to(dtype)
    expected = output(model, X.to(dtype)).float()
    pycompress.quantize_(model, layers="all")
    assert model.conv.bias.dtype == dtype
    actual = output(model, X.to(dtype))
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() / expected.norm() < 0.03


def test_norm_with_gradients_leaves_a_bias_that_can_be_trained():
    model = with_statistics(Block(bias=False))
    pycompress.quantize_(model, layers="all")
    model(X).square().sum().backward()
    assert model.conv.bias.grad is not None
    frozen = with_statistics(Block(bias=False)).requires_grad_(False)
    pycompress.quantize_(frozen, layers="all")
    assert not frozen.conv.bias.requires_grad


def test_convolutions_that_are_not_faster_stay(monkeypatch):
    monkeypatch.undo()
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(1, 8, 3), nn.Conv2d(32, 32, 3)).eval()
    report = pycompress.quantize_(model, layers="all")
    assert "groups=64 leave each output 1 channel, too few" in reason(report, "0")
    assert "an output sums only 9 products" in reason(report, "1")
    assert [row.name for row in report.swapped] == ["2"]
    assert [row.name for row in pycompress.quantize_(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())).others] == []
