"""Folding activations: where it happens, where it must not, and that the numbers are the same either way."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import pycompress
from pycompress.fuse import activation_name
from pycompress.nn import Int8Linear

K = 24


class Wrap(nn.Module):
    """fc, act and out as children, and a forward to vary."""

    def __init__(self, activation=None):
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(K, 40), activation or nn.GELU(), nn.Linear(40, K)

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


def check(model, *args, **kwargs):
    """Quantise a copy with and without folding; both must agree. Returns the report of the folded one."""
    model = model.eval()
    fused, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = pycompress.quantize_(fused, "weight_only")
    assert not pycompress.quantize_(plain, "weight_only", fuse=False).fused
    for training in (False, True):
        fused.train(training), plain.train(training)
        with torch.no_grad():
            actual, expected = fused(*args, **kwargs), plain(*args, **kwargs)
        for a, e in zip(*(y if isinstance(y, tuple) else (y,) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    return report


def note(report, name="fc"):
    return next(layer.reason for layer in report.swapped if layer.name == name)


X = torch.randn(3, 5, K)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
    ],
)
def test_sequential(activation, name):
    model = nn.Sequential(nn.Linear(K, 40), activation, nn.Linear(40, K))
    report = check(model, X)
    assert [layer.activation for layer in report.swapped] == [name, ""]
    pycompress.quantize_(model)
    assert type(model[1]) is nn.Identity
    assert model[0].activation == name
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


def test_transformers_activations():
    activations = pytest.importorskip("transformers").activations
    x = torch.linspace(-9, 9, 4001)
    functions = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
    }
    known = {}
    for key in activations.ACT2CLS:
        module = activations.ACT2FN[key]
        if name := activation_name(module):
            known[key] = name
            torch.testing.assert_close(module(x), functions[name](x), rtol=1e-5, atol=2e-6)
    assert set(known.values()) == set(functions)
    assert {"gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "relu"} <= set(known)
    assert "quick_gelu" not in known


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"),
        (F.gelu, "gelu"),
        (F.silu, "silu"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (functools.partial(F.gelu, approximate="erf"), None),
        (torch.tanh, None),
        (lambda x: x, None),
        (nn.LeakyReLU(), None),
        (None, None),
    ],
)
def test_activation_name(function, name):
    assert activation_name(function) == name


class Gated(Wrap):
    def __init__(self):
        super().__init__(nn.SiLU())
        self.up = nn.Linear(K, 40)

    def forward(self, x):
        return self.out(self.act(self.fc(x)) * self.up(x))


class Listed(nn.Module):
    """Layers in an nn.ModuleList that forward loops over."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(K, 40), nn.ReLU(), nn.Linear(40, K), nn.ReLU()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class OneActivationForAll(Wrap):
    def forward(self, x):
        return self.act(self.out(self.act(self.fc(x))))


class Branches(Wrap):
    """Branches on the input and its arguments, none of which touches the value between."""

    def forward(self, x, scale=None, double: bool = False, *, shift=None):
        assert x.shape[-1] == K, "wrong width"
        if x.dim() == 2:
            x = x.unsqueeze(0)
        b, n, k = x.shape
        h = self.act(self.fc(x.reshape(b * n, k)))
        if h.dtype == torch.float16 and torch.isinf(h).any():
            h = h.clamp(max=torch.finfo(h.dtype).max)
        if scale is not None:
            h = h * scale
        if double:
            h = 2 * h
        return self.out(h).reshape(b, n, k)


class FromMethod(Wrap):
    def forward(self, x):
        return self.out(self.hidden(x))

    def hidden(self, x):
        return self.act(self.fc(x))


class Checkpointed(Wrap):
    def forward(self, x):
        return self.out(self.act(torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)))


class Named(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("model", "fused"),
    [
        (Wrap(), 1),
        (Gated(), 1),
        (Listed(), 2),
        (OneActivationForAll(), 2),
        (Branches(), 1),
        (FromMethod(), 1),
        (Checkpointed(), 1),
        (Named(nn.Linear(K, K), nn.ReLU()), 1),
        (nn.Sequential(nn.Sequential(nn.Linear(K, K), nn.ReLU()), nn.Linear(K, K), nn.SiLU()), 2),
        (nn.ModuleList([Wrap()])[0], 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_folded(model, fused):
    assert len(check(model, X).fused) == fused


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


class Program(nn.Module):
    """A random straight-line program over three linears and two activations, with one branch."""

    def __init__(self, steps, returned):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(K, K) for _ in range(3))
        self.relu, self.silu = nn.ReLU(), nn.SiLU()
        self.steps, self.returned = steps, returned

    def forward(self, x, flag=False):
        values = [x]
        for kind, index, source in self.steps:
            value = values[source % len(values)]
            if kind == "linear":
                values.append(self.linears[index](value))
            elif kind == "add":
                values.append(value + values[index % len(values)])
            elif kind == "branch":
                values.append(value * 2 if flag else values[-1])
            else:
                values.append(self.relu(value) if kind == "relu" else self.silu(value))
        return tuple(values[i % len(values)] for i in self.returned)


STEPS = st.tuples(
    st.sampled_from(["linear", "linear", "relu", "silu", "add", "branch"]),
    st.integers(0, 2),
    st.integers(0, 7),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=2, max_size=7), st.lists(st.integers(0, 7), min_size=1, max_size=2))
def test_folding_never_changes_a_result(steps, returned):
    for flag in (False, True):
        check(Program(steps, returned), X, flag)


# --- tracing leaves no trace ---


class Stateful(Wrap):
    """Counts its calls, draws random numbers, keeps a history and updates a buffer."""

    def __init__(self):
        super().__init__()
        self.calls, self.history = 0, []
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.history.append(x)
        noise = torch.rand(())
        y = self.out(self.act(self.fc(x))) + 0 * noise
        self.steps.add_(1)
        return y


def test_tracing_does_not_touch_the_model():
    model = Stateful()
    model.act.eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    report = pycompress.quantize_(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.calls, model.history, model.steps.item()) == (0, [], 0)
    assert [m.training for m in model.modules()] == flags
    assert [layer.activation for layer in report.swapped] == ["gelu", ""]
    assert set(vars(model)) == set(vars(Stateful()))


def test_model_that_cannot_be_copied_is_swapped_unfolded():
    class Locked:
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a lock")

    inside, outside = Wrap(), nn.Sequential(Wrap())
    inside.lock, outside.lock = Locked(), Locked()
    report = pycompress.quantize_(inside)
    assert len(report.swapped) == 2
    assert "cannot be copied" in note(report)
    assert len(pycompress.quantize_(outside).fused) == 1, "the part that can be copied is"


def test_training_through_a_folded_layer():
    model = Wrap()
    pycompress.quantize_(model)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    assert isinstance(model.fc, Int8Linear)
    assert model.fc.bias.grad is not None
