"""Folding activations: where it happens, and that the numbers are the same either way."""

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
from tests.fuse_helpers import K, Listed, OneActivationForAll, Wrap, X, check, note


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
