"""What the tests of folding share: a model to vary, and the check that folding changes no number."""

import copy

import torch
from torch import nn

import pycompress

K = 24


class Wrap(nn.Module):
    """fc, act and out as children, and a forward to vary."""

    def __init__(self, activation=None):
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(K, 40), activation or nn.GELU(), nn.Linear(40, K)

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


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
