"""Where an activation must not be folded: something else reads the value between, or might."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pycompress
from tests.fuse_helpers import K, Listed, OneActivationForAll, Wrap, X, check, note

# --- where something else reads the value, or might ---


class Residual(Wrap):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h) + h)


class Returned(Wrap):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h)), h


class OnlyInTraining(Wrap):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h)) + (h.mean() if self.training else 0)


class OnlyInEval(Wrap):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h)) + (0 if self.training else h.mean())


class WithFlag(Wrap):
    def forward(self, x, with_hidden=False):
        h = self.fc(x)
        y = self.out(self.act(h))
        return (y, h) if with_hidden else y


class WithOptional(Wrap):
    def forward(self, x, other=None):
        h = self.fc(x)
        y = self.out(self.act(h))
        return y if other is None else y + h.sum()


class OnData(Wrap):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h)) + (h.sum() if x.sum() > 1e9 else 0)


class ActivationTwice(Wrap):
    def forward(self, x):
        return self.out(self.act(self.fc(x))) + self.act(x)


class LinearTwice(Wrap):
    def forward(self, x):
        return self.out(self.act(self.fc(x))) + self.fc(x).mean()


class InPlace(Wrap):
    def forward(self, x):
        h = self.fc(x)
        h.add_(1)
        return self.out(self.act(h))


class Kept(Wrap):
    """The value between is kept on the module."""

    def forward(self, x):
        self.last = self.fc(x)
        y = self.out(self.act(self.last))
        return y + self.last.mean()


class ReadsWeight(Wrap):
    def forward(self, x):
        return self.out(self.act(self.fc(x))) + self.act.forward(self.fc.weight.float().sum())


class Untraceable(Wrap):
    def forward(self, x):
        y = self.out(self.act(self.fc(x)))
        return y + torch.tensor(x.tolist()).sum()


class Caller(nn.Module):
    def forward(self, function, x):
        return function(x)


class PassedOn(Wrap):
    """What is done with the layer cannot be seen: it is handed to another module."""

    def __init__(self):
        super().__init__()
        self.caller = Caller()

    def forward(self, x):
        return self.out(self.act(self.fc(x))) + self.caller(self.fc, x).mean()


class Encodes(Wrap):
    """A second method that callers use for the value before the activation."""

    def encode(self, x):
        return self.fc(x)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Residual(), "also read by add"),
        (Returned(), "also read by the caller"),
        (OnlyInTraining(), "also read by mean"),
        (OnlyInEval(), "also read by mean"),
        (WithFlag(), "also read by the caller"),
        (WithOptional(), "also read by sum"),
        (OnData(), "also read by sum"),
        (ActivationTwice(), "called on another value"),
        (LinearTwice(), "also read by mean"),
        (InPlace(), ""),
        (Kept(), "also read by mean"),
        (Untraceable(), "cannot be traced"),
        (PassedOn(), "passed on as a value"),
        (Encodes(), "Encodes.encode uses one of them without the other"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_not_folded(model, why):
    report = check(model, X)
    assert not report.fused
    assert why in note(report)


class Features(nn.Module):
    """Loops over a Sequential that it holds and keeps the values before each activation."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K), nn.ReLU())

    def forward(self, x):
        features = []
        for layer in self.body:
            x = layer(x)
            features.append(x)
        return tuple(features)


def test_not_folded_when_called_from_above():
    report = check(Features(), X)
    assert not report.fused
    assert "Features.forward uses one of them by itself" in note(report, "body.0")


class Body(nn.Module):
    """A Sequential that forward calls whole; each subclass finds another way to the value between."""

    def __init__(self):
        super().__init__()
        self.net, self.blk = nn.Sequential(nn.Linear(K, K), nn.GELU(), nn.Linear(K, K)), Wrap()

    def forward(self, x):
        return self.blk(self.net(x))


class FeaturesOnRequest(Body):
    def forward(self, x, return_features=False):
        if not return_features:
            return self.net(x)
        features = []
        for layer in self.net:
            x = layer(x)
            features.append(x)
        return torch.cat(features, -1)


class FeaturesOnData(Body):
    def forward(self, x):
        return self.net[0](x) if x.sum() > -1e9 else self.net(x)


class UntraceableAbove(Body):
    def forward(self, x):
        features = [x * int(x.sum() > 1e9)]
        for layer in self.net:
            features.append(layer(features[-1]))
        return torch.cat(features, -1)


class WalksChildren(Body):
    def forward(self, x):
        first = next(iter(next(iter(self.children()))))
        return first(x) * int(x.sum() > -1e9)


class MethodAbove(Body):
    def call(self, x):
        return self.net[0](x)


class NamedFromAbove(Body):
    def call(self, x):
        return self.blk.fc(x)


class ByString(Body):
    def call(self, x):
        return getattr(self.blk, "fc")(x)  # noqa: B009


class PropertyAbove(Body):
    @property
    def first(self):
        return self.net[0]

    def call(self, x):
        return self.first(x)


class DecoratedAbove(Body):
    @torch.no_grad()
    def call(self, x):
        return self.net[0](x)


class ListedEncodes(Listed):
    def call(self, x):
        return self.layers[0](x)


class IndexesItself(nn.Sequential):
    def call(self, x):
        return self[0](x)


class UsesBothApart(Wrap):
    def call(self, x, activate=False):
        h = self.fc(x)
        return self.act(h) if activate else h


class EncoderReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(K, 2, 32, activation="gelu")

    def forward(self, x):
        return self.encoder(x)

    def call(self, x):
        return self.encoder.linear1(x)


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (FeaturesOnRequest(), "net.0", "FeaturesOnRequest.forward uses one of them by itself"),
        (FeaturesOnData(), "net.0", "FeaturesOnData.forward uses one of them by itself"),
        (UntraceableAbove(), "net.0", "UntraceableAbove.forward may use one of them by itself; it cannot be traced"),
        (WalksChildren(), "net.0", "it cannot be traced"),
        (MethodAbove(), "net.0", "MethodAbove.call may use one of them by itself"),
        (NamedFromAbove(), "blk.fc", "NamedFromAbove.call may use one of them by itself"),
        (ByString(), "blk.fc", "ByString.call may use one of them by itself"),
        (PropertyAbove(), "net.0", "PropertyAbove.first may use one of them by itself"),
        (DecoratedAbove(), "net.0", "DecoratedAbove.call may use one of them by itself"),
        (nn.Sequential(NamedFromAbove()), "0.blk.fc", "NamedFromAbove.call may use one of them by itself"),
        (ListedEncodes(), "layers.0", "ListedEncodes.call may use one of them without the other"),
        (IndexesItself(nn.Linear(K, K), nn.GELU()), "0", "IndexesItself.call may use one of them without the other"),
        (UsesBothApart(), "fc", "UsesBothApart.call uses them too"),
        (EncoderReader(), "encoder.linear1", "EncoderReader.call may use one of them by itself"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_not_folded_when_other_code_may_read_the_value_between(model, name, why):
    model = model.eval()
    quantised = copy.deepcopy(model)
    report = pycompress.quantize_(quantised, "weight_only")
    assert why in note(report, name)
    way = {FeaturesOnRequest: lambda m: m(X, return_features=True)}.get(type(model))
    way = way or (lambda m: m.call(X) if hasattr(m, "call") else m(X))
    with torch.no_grad():
        expected, actual = way(model), way(quantised)
    assert (actual - expected).norm() / expected.norm() < 0.03


def test_folded_below_a_forward_that_only_calls_the_whole():
    assert len(check(Body(), X).fused) == 2
    assert len(check(nn.Sequential(Body(), Body()), X).fused) == 4

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body()

        def forward(self, x):
            return self.body(x) * int(x.sum() > -1e9)

    assert len(check(Untraceable(), X).fused) == 2


def test_not_folded_when_the_activation_is_shared_or_hooked():
    activation = nn.ReLU()
    model = nn.Sequential(nn.Linear(K, K), activation, nn.Linear(K, K), nn.Tanh(), activation)
    assert not check(model, X).fused
    hooked = Wrap()
    hooked.act.register_forward_hook(lambda module, args, out: out + 1)
    report = check(hooked, X)
    assert not report.fused
    assert "it has hooks" in note(report)


def test_not_folded_when_one_linear_of_a_shared_activation_stays():
    model = OneActivationForAll()
    model.out.register_forward_hook(lambda *args: None)
    report = check(model, X)
    assert not report.fused
    assert "called on another value" in note(report)


def test_function_in_forward_is_explained():
    class Functional(Wrap):
        def forward(self, x):
            return self.out(F.relu(self.fc(x)))

    report = check(Functional(nn.Tanh()), X)
    assert "relu not folded in: forward calls a function" in note(report)
